"""How much memory the served page holds after many jobs on two models in turns.

    python pipelines/check_memory.py emoji-sd cifar-sit --switches 42

Starts the page in a separate process, draws through its endpoint, and prints the resident memory of that process in MiB
after the first picture, after every tenth switch, and at the end. Linux only: it reads /proc.
"""

from typing import Annotated, Any

import typer
from gradio_client import Client
from served_page import Served, served_page


def main(
    first: Annotated[str, typer.Argument(help="A model of the page.")],
    second: Annotated[str, typer.Argument(help="Another one.")],
    switches: Annotated[int, typer.Option(help="Changes of the model.", min=2)] = 42,
    steps: Annotated[int, typer.Option(help="Steps of each picture.")] = 3,
    prompts: Annotated[str, typer.Option(help="What to draw with the first and the second, with a comma.")] = "tent,1",
) -> None:
    """Draw, and print the memory."""
    with served_page() as page:
        most = _draw(page, [first, second], prompts.split(","), switches, steps)
    typer.echo(f"most after a job: {most} MiB")


def _draw(page: Served, models: list[str], prompts: list[str], switches: int, steps: int) -> int:
    """Draw with the models in turns. → the most memory held after a job"""
    client: Any = Client(page.address, verbose=False, download_files=False)
    most = 0
    for i in range(switches + 1):
        client.predict(prompt=prompts[i % 2], model=models[i % 2], steps=steps, seed=i, api_name="/generate")
        held = page.resident()
        most = max(most, held)
        if i == 0 or i % 10 == 0 or i == switches:
            typer.echo(f"after {i} switches: {held} MiB")
    return most


if __name__ == "__main__":
    typer.run(main)
