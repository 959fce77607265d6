"""The code blocks of the documentation, and how each is run on small models in this process.

A command runs with the options it is printed with; `SMALLER` appends options that make it small (the last one given
wins). `EXCEPTIONS` lists all that is not run as printed.
"""

import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from packaging.requirements import Requirement
from typer.main import get_command
from typer.testing import CliRunner

from diffattn.cli import app
from diffattn.machine import dtype_name, fastest_dtype

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "diffattn/assets/*/README.md", "samples/*/README.md")
    for path in ROOT.glob(pattern)
)

EXCEPTIONS = {
    "pip install": "nothing is installed: names and extras are looked up in pyproject.toml",
    "make": "`make --dry-run`: the target exists",
    "accelerate launch": "several GPUs or machines: its options are parsed, and the program runs in one process",
    "diffattn app": "its options are parsed; the test serves the page that the Python blocks then use",
}
"""What is not run as printed, and what is checked instead."""

LANGUAGES = {"sh": "sh", "": "sh", "python": "python", "json": "json", "text": "text"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

SUBSTITUTES = {
    r"stable-diffusion-v1-5/stable-diffusion-v1-5": "tiny-sd",
    r"width=1024, height=1024": "width=32, height=32",
    r"\b(num_inference_steps|steps)=\d+": r"\1=2",
    r"\.compile\(\)": '.compile(backend="eager")',
    r"\bsamples=16\b": "samples=8",
    r"(diffattn\.tune\(pipe, \[[^]]*\])": r"\1, width=256, height=256",
    r"http://127\.0\.0\.1:7860": "{page}",
}
"""Pattern in a block -> what stands for it: hub ids become folders, many steps two."""

FEW_STEPS = "--steps 2 --device cpu"
TWO_STEPS = (
    "run.steps=2 run.save_every=2 optim.batch=4 run.sample_every=0 run.trackers=[] run.precision=fp32 --device cpu"
)
QUICK_BENCH = "--rounds 1 --device cpu --dtype float32 --time-budget 10"
SMALLER = {
    "diffattn demo": "--size 128 --steps 2 --rounds 1 --device cpu",
    "diffattn generate": FEW_STEPS,
    "diffattn info": "--size 64 --rounds 1 --device cpu",
    "diffattn tune": f"{FEW_STEPS} --dtype float32",
    "diffattn tune --prompts": "--bands 1 --cost flops",
    "diffattn tune --min-speedup": "--min-speedup 1.0001",
    "diffattn tune emoji-sd": "--width 256 --height 256",
    "diffattn tune --budget": "--samples 1",
    "diffattn train": TWO_STEPS,
    "diffattn train optim.lr=0.002": "--dry-run",
    "diffattn train sit-256": "--dry-run data.vae=tiny-sd/vae data.size=32 model.mediators=[4]",
    "diffattn evaluate": "--num-pictures 4 --extractor emoji-classifier --device cpu",
    "diffattn evaluate --model": FEW_STEPS,
    "diffattn evaluate --paired": "--num-pictures 2",
    "diffattn evaluate reference": "--size 32 --extractor emoji-classifier --device cpu",
    "diffattn bench thresholds": "--time-budget 0.01 --device cpu --dtype float32",
    "diffattn bench attention": f"--models tiny --sizes 64 {QUICK_BENCH}",
    "diffattn bench mediator": f"--sizes 16 --mediators 4 --what block {QUICK_BENCH}",
    "compare_peers.py speed": "--unets tiny --sizes 64 --rounds 1 --threads 1 --device cpu --dtype float32",
    "compare_peers.py quality": "--model tiny-sd --pictures 1 --batch 2 --steps 4 --rounds 1 --warm-up 0 --threads 1"
    " --device cpu --dtype float32",
    "compare_peers.py quality --size": "--size 64",
    "compare_peers.py quality --reference": "--kid-pictures 4 --every 1 --seed-sets 1",
    "check_never_slower.py": "--models tiny --sizes 64 --rounds 1 --seconds 0 --device cpu --dtype float32",
    "attention_error.py": "--steps 3 --prompts tent --size 128",
    "compare_linear.py cores": "--tokens 64 --mediators 4 --rounds 1 --width 24 --heads 2",
    "compare_linear.py train": "--subjects softmax,inline --second-seeds 0 --samples 4 --steps 2 --batch 4 --rounds 1"
    " run.steps=2 run.save_every=2 optim.batch=4 run.trackers=[] run.precision=fp32",
    "compare_mediators.py": "--samples 8 --steps 2 --rounds 1 --batch 8",
    "compare_mediators.py --timed-batch": "--sizes 512 --steps 1",
    "compare_mediators.py --repeats": "--repeats 2 --samples 4 --batch 4 --only softmax,tuned --repeated softmax",
    "train_emoji_sit.py train": "--steps 1 --every 3 optim.batch=2 model.hidden_size=16 model.num_layers=1"
    " model.num_heads=2 run.precision=fp32 run.trackers=[]",
    "train_emoji_sit.py judge": "--steps 1 --every 3 --dtype float32",
    "train_emoji_sd.py train": "--dry-run",
    "train_emoji_mmdit.py train": "--dry-run",
    "train_emoji_mmdit.py evaluate": "--steps 1 --limit 1 --no-write",
    "train_emoji_sd.py evaluate": "--vae-pictures 1 --steps 1 --limit 1",
    "train_emoji_sd.py evaluate --sweep-names": "--sweep-names 1",
    "train_classifiers.py": "--steps 1 --batch 8",
    "gpu_day.py": "--plan --tiny --device cpu --dtype float32",
}
"""Program, command, and what else must be among its words -> options that are appended."""


@dataclass(frozen=True)
class Block:
    """A fenced block of code in a page."""

    page: str  # path in the repository
    line: int  # of its fence
    language: str  # as `LANGUAGES` reads it
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> list[Block]:
    """The blocks of a page in order; `ValueError` for a language that nothing here runs."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for fence in FENCE.finditer(text):
        line = text.count("\n", 0, fence.start()) + 1
        if fence[1] not in LANGUAGES:
            raise ValueError(f"{page}:{line} is in {fence[1]!r}, which no test runs; allowed: {', '.join(LANGUAGES)}")
        found.append(Block(page, line, LANGUAGES[fence[1]], fence[2]))
    return found


def substituted(code: str, page_address: str) -> str:
    """A block's code with small models in the place of large ones."""
    for pattern, small in SUBSTITUTES.items():
        code = re.sub(pattern, small.replace("{page}", page_address), code)
    return code


def commands(code: str) -> Iterator[list[str]]:
    """The words of every command of a shell block; comments and line continuations are resolved."""
    for line in code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def smaller(words: Sequence[str]) -> list[str]:
    """Words of a program with the options appended that make it small, `--help` excepted; nothing runs in a precision
    that this machine emulates."""
    if "--help" in words:
        return [*words]
    fastest = dtype_name(fastest_dtype(torch.device("cpu")))
    words = [fastest if word == "bfloat16" else word for word in words]
    own = {part for word in words for part in (word, word.rsplit("/", 1)[-1])}
    extra = [options for key, options in SMALLER.items() if _applies(key.split(), words, own)]
    return [*words, *shlex.split(" ".join(extra))]


def _applies(key: Sequence[str], words: Sequence[str], own: set[str]) -> bool:
    program, *others = key
    if words[0].rsplit("/", 1)[-1] != program or not set(others) <= own:
        return False
    is_subcommand = len(words) > 2 and key == ["diffattn", "evaluate"] and words[2] in ("reference", "compare")
    needs_model = key == ["diffattn", "info"] and "--model" not in words
    return not (is_subcommand or needs_model)


def run(words: list[str]) -> None:
    """Run one command of a shell block, or check it as `EXCEPTIONS` says; fails the test if it fails."""
    match words:
        case ["pip", "install", *rest]:
            check_install(rest)
        case ["make", *targets]:
            subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, check=True, capture_output=True)
        case ["accelerate", "launch", *rest]:
            launched = launch_command_parser().parse_args(rest)
            assert launched.config_file is None or (ROOT / launched.config_file).is_file()
            module = ["python", "-m"] if launched.module else ["python"]
            run([*module, launched.training_script, *launched.training_script_args])
        case ["diffattn", "app", *rest]:
            check_options("app", rest)
        case ["python", "-m", "diffattn", *rest] | ["diffattn", *rest]:
            command_line(smaller(["diffattn", *rest])[1:])
        case ["python", "pipelines/train.py", *rest]:
            command_line(smaller(["diffattn", "train", *rest])[1:])
        case ["python", program, *rest]:
            run_program(smaller([program, *rest]))
        case _:
            pytest.fail(f"nothing here runs {words[0]!r}")


def command_line(words: list[str]) -> None:
    """`diffattn WORDS`, in this process."""
    done = CliRunner().invoke(app, words)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, f"diffattn {shlex.join(words)}: {done.output}"


def run_program(words: list[str]) -> None:
    """`python WORDS`, in this process."""
    path, before = ROOT / words[0], sys.argv
    sys.argv = [str(path), *words[1:]]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise AssertionError(f"python {shlex.join(words)} ended with {end.code}") from end
    finally:
        sys.argv = before


def check_options(command: str, words: list[str]) -> None:
    """The options of a command of `diffattn` that is not run."""
    try:
        get_command(app).commands[command].make_context(command, words)  # type: ignore[attr-defined]
    except Exception as error:  # typer's own, which have no public class
        raise AssertionError(f"diffattn {command} {shlex.join(words)}: {error}") from error


def check_install(words: list[str]) -> None:
    """`pip install`: every extra and every name is one of this project's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [word for before, word in zip(["", *words], words, strict=False) if before != "-c" and word != "-c"]
    for name in names:
        wanted = Requirement(name.replace(".", project["name"], 1) if name.startswith(".") else name)
        assert wanted.name == project["name"]
        assert wanted.extras <= set(project["optional-dependencies"])


def copy_assets(place: Path) -> None:
    """What blocks name by its path in the repository and may write to."""
    for folder in (
        "diffattn/assets/emoji-sd",
        "diffattn/assets/emoji-mmdit",
        "diffattn/assets/emoji-sit",
        "diffattn/assets/cifar-sit",
        "samples/peers",
    ):
        shutil.copytree(ROOT / folder, place / folder)
    for folder in ("emoji-classifier", "cifar-classifier"):
        shutil.copytree(ROOT / "diffattn/assets" / folder, place / "diffattn/assets" / folder)
    shutil.copytree(ROOT / "pipelines" / "accelerate", place / "pipelines" / "accelerate")
