"""`.ci/run` with Chromium installed, with one that can be installed, and without any."""

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

PROGRAM = Path(__file__).parents[1] / ".ci" / "run"
STUBS = {
    "make": 'echo "make $* required=${DIFFATTN_REQUIRE_WEB:-}" >> log',
    "sudo": '"$@"',
    "installing": 'echo "apt-get $*" >> log; if [ "$1" = install ]; then cp "$BIN/make" "$BIN/chromium"; fi',
    "failing": 'echo "apt-get $*" >> log; [ "$1" != install ]',
    "useless": 'echo "apt-get $*" >> log',
}
APT = ["apt-get update", "apt-get install -y chromium"]
MADE = [f"make {target} required=1" for target in ("lint", "docs", "test")]


@pytest.mark.parametrize(
    ("there", "apt", "log"),
    [(True, "installing", MADE), (False, "installing", APT + MADE), (False, "failing", APT), (False, "useless", APT)],
)
def test_chromium_is_installed_if_missing_and_required(tmp_path: Path, there: bool, apt: str, log: list[str]) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "cp", "dirname", "id"):
        (tools / tool).symlink_to(shutil.which(tool) or tool)
    stubs = {"make": "make", "sudo": "sudo", "apt-get": apt} | ({"chromium": "make"} if there else {})
    for name, stub in stubs.items():
        (tools / name).write_text(f"#!{shutil.which('bash')}\n{STUBS[stub]}\n")
        (tools / name).chmod(0o755)
    (tmp_path / ".ci").mkdir()
    shutil.copy(PROGRAM, tmp_path / ".ci")
    words = [str(tools / "bash"), str(tmp_path / ".ci" / "run")]
    done = subprocess.run(words, env={"PATH": str(tools), "BIN": str(tools)}, capture_output=True, check=False)
    assert (tmp_path / "log").read_text().splitlines() == log
    assert (done.returncode == 0) == (log[-1] == MADE[-1]), done.stderr


def test_the_oldest_diffusers_that_is_tested_is_the_oldest_allowed() -> None:
    root = PROGRAM.parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    allowed = next(Requirement(line) for line in project["dependencies"] if line.startswith("diffusers"))
    makefile = (root / "Makefile").read_text()
    tested = next(line.split(":=")[1] for line in makefile.splitlines() if line.startswith("OLDEST_DIFFUSERS"))
    assert Version(tested.strip()) == min(Version(s.version) for s in allowed.specifier if s.operator == ">=")
