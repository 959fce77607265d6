"""The page served by a process of its own, for programs that measure it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")
PATIENCE = 60.0  # seconds


@dataclass(frozen=True)
class Served:
    """A page that runs."""

    address: str
    process: "subprocess.Popen[str]"
    folder: Path  # where its visitors' files are

    def resident(self) -> int:
        """MiB that it holds in memory."""
        return resident(self.process.pid)

    def interrupt(self) -> float:
        """End it as Ctrl+C does. → seconds until it had ended"""
        begin = time.perf_counter()
        self.process.send_signal(signal.SIGINT)
        self.process.wait(PATIENCE)
        return time.perf_counter() - begin

    def files(self) -> list[Path]:
        """What it has left on the disk."""
        return [path for path in self.folder.rglob("*") if path.is_file()]


@contextmanager
def served_page(*options: str) -> Iterator[Served]:
    """Serve the page with these options of `diffattn app` on this machine, until the block ends."""
    words = [sys.executable, "-u", "-m", "diffattn", "app", "--device", "cpu", "--no-hub", *options]
    with TemporaryDirectory() as folder:
        environment = os.environ | {"GRADIO_TEMP_DIR": folder}
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:
            try:
                assert process.stdout is not None
                address = next(match[0] for line in process.stdout if (match := ADDRESS.search(line)))
                yield Served(address, process, Path(folder))
            finally:
                process.kill()


def resident(process: int) -> int:
    """MiB that a process holds in memory. Linux only: it reads /proc."""
    status = Path(f"/proc/{process}/status").read_text()
    return next(int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("VmRSS"))
