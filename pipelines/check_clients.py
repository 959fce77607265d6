"""Whether many visitors at once each get their own pictures from the served page, and how long they wait.

    python pipelines/check_clients.py cifar-sit --prompt 1 --clients 8 --jobs 3

Starts the page in a process of its own. All clients draw at once, each its own seeds; a job is right if the record in
its picture's file has the seed that was asked for and nobody else got that file. Then the page is ended as by Ctrl+C
while a job runs and a visitor is there. Linux only: it reads /proc.
"""

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from gradio_client import Client
from served_page import Served, served_page

from diffattn.drawing.request import record_of


@dataclass(frozen=True)
class Job:
    """One that has ended."""

    asked: int  # seed
    drawn: int
    file: str
    seconds: float  # from the request to the picture


def main(
    model: Annotated[str, typer.Argument(help="A model of the page.")],
    prompt: Annotated[str, typer.Option(help="What to draw.")] = "tent",
    clients: Annotated[int, typer.Option(help="Visitors at once.", min=2, max=12)] = 8,
    jobs: Annotated[int, typer.Option(help="Jobs of each, one after the other.", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="Steps of each picture.", min=1, max=100)] = 3,
) -> None:
    """Draw, and print what came of it."""
    given = {"prompt": prompt, "model": model, "steps": steps}
    with served_page() as page:
        found = _all_at_once(page.address, given, clients, jobs)
        waits = [job.seconds for job in found]
        typer.echo(f"{right(found)} of {clients * jobs} jobs of {clients} clients right")
        typer.echo(f"seconds to a picture: median {statistics.median(waits):.1f}, most {max(waits):.1f}")
        typer.echo(f"memory afterwards: {page.resident()} MiB")
        typer.echo(f"ended {_interrupted(page, given):.1f} s after Ctrl+C, files left: {len(page.files())}")


def right(jobs: Sequence[Job]) -> int:
    """How many drew what was asked for, into a file of their own."""
    files = [job.file for job in jobs]
    return sum(job.drawn == job.asked and files.count(job.file) == 1 for job in jobs)


def _all_at_once(address: str, given: dict[str, Any], clients: int, jobs: int) -> list[Job]:
    def visit(number: int) -> list[Job]:
        client: Any = Client(address, verbose=False, download_files=False)
        return [_draw(client, given, 1000 * number + i) for i in range(jobs)]

    with ThreadPoolExecutor(clients) as pool:
        return [job for found in pool.map(visit, range(clients)) for job in found]


def _draw(client: Any, given: dict[str, Any], seed: int) -> Job:
    begin = time.perf_counter()
    files = client.predict(**given, seed=seed, api_name="/generate")[2]
    seconds = time.perf_counter() - begin
    path = files[0]["path"]
    return Job(seed, record_of(Path(path))["seed"], path, seconds)


def _interrupted(page: Served, given: dict[str, Any]) -> float:
    """Seconds from Ctrl+C to the end, while a job runs and a page is open."""
    client: Any = Client(page.address, verbose=False, download_files=False)
    job = client.submit(**(given | {"steps": 100, "num_images": 8}), api_name="/generate")
    while not any("step " in str(told) for told in job.outputs()):
        if job.done():
            raise RuntimeError("the job was over before the page was interrupted")
        time.sleep(0.05)
    with httpx.stream("GET", f"{page.address}/gradio_api/heartbeat/visitor", timeout=60):
        return page.interrupt()


if __name__ == "__main__":
    typer.run(main)
