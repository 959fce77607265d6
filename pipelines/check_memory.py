"""How much memory the served page holds after many jobs on two models in turns.

    python pipelines/check_memory.py emoji-sd cifar-sit --switches 42

Starts the page in a separate process, draws through its endpoint, and prints the resident memory of that process in MiB
after the first picture, after every tenth switch, and at the end. Linux only: it reads /proc.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from gradio_client import Client

ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")


def main(
    first: Annotated[str, typer.Argument(help="A model of the page.")],
    second: Annotated[str, typer.Argument(help="Another one.")],
    switches: Annotated[int, typer.Option(help="Changes of the model.", min=2)] = 42,
    steps: Annotated[int, typer.Option(help="Steps of each picture.")] = 3,
    prompts: Annotated[str, typer.Option(help="What to draw with the first and the second, with a comma.")] = "tent,1",
) -> None:
    """Draw, and print the memory."""
    words = [sys.executable, "-u", "-m", "diffattn", "app", "--device", "cpu", "--no-hub"]
    with TemporaryDirectory() as folder:
        environment = os.environ | {"GRADIO_TEMP_DIR": folder}
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as server:
            try:
                assert server.stdout is not None
                address = next(match[0] for line in server.stdout if (match := ADDRESS.search(line)))
                client: Any = Client(address, verbose=False, download_files=False)
                most = _draw(client, server.pid, [first, second], prompts.split(","), switches, steps)
            finally:
                server.terminate()
                server.wait()
    typer.echo(f"most after a job: {most} MiB")


def _draw(client: Any, process: int, models: list[str], prompts: list[str], switches: int, steps: int) -> int:
    """Draw with the models in turns. → the most memory held after a job"""
    most = 0
    for i in range(switches + 1):
        client.predict(prompt=prompts[i % 2], model=models[i % 2], steps=steps, seed=i, api_name="/generate")
        held = resident(process)
        most = max(most, held)
        if i == 0 or i % 10 == 0 or i == switches:
            typer.echo(f"after {i} switches: {held} MiB")
    return most


def resident(process: int) -> int:
    """MiB that a process holds in memory."""
    status = Path(f"/proc/{process}/status").read_text()
    return next(int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("VmRSS"))


if __name__ == "__main__":
    typer.run(main)
