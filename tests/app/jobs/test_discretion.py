"""What a visitor types never reaches the log, whatever goes wrong."""

import logging
from pathlib import Path
from typing import Any

import pytest
from support import web

from diffattn.app.jobs.discretion import quiet_libraries, without_words

pytestmark = pytest.mark.filterwarnings("ignore::diffattn.DiffAttnWarning")  # so small a model gains nothing

SECRET = "visitorsword"


def test_the_stack_of_an_error_is_told_without_its_messages() -> None:
    def inner() -> None:
        raise KeyError(SECRET)

    def outer() -> None:
        try:
            inner()
        except KeyError as error:
            raise ValueError(f"no {SECRET}") from error

    with pytest.raises(ValueError, match=SECRET) as raised:
        outer()
    said = without_words(raised.value)
    assert SECRET not in said
    assert "ValueError\ncaused by" in said
    assert said.endswith("KeyError")
    assert "in inner" in said


@pytest.fixture
def heard() -> Any:
    """Everything that diffusers logs, which does not pass it on to pytest."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


@pytest.mark.slow
def test_a_prompt_that_is_too_long_is_not_quoted_in_the_log(
    tmp_path: Path, heard: list[str], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    worker = web.tiny_worker(web.save_models(tmp_path / "models"), prompt=1000)
    asked = web.ask(worker, prompt=f"word {SECRET} " * 20)
    list(worker.generate("a", asked))
    list(worker.compare("a", asked, ["automatic"]))
    told = "".join([*heard, *(record.getMessage() for record in caplog.records), *capfd.readouterr()])
    assert SECRET not in told
    pipe = web.loaded(worker)
    pipe(asked.prompt, num_inference_steps=1)  # outside of a job the library warns as ever
    assert SECRET in "".join(heard)


def test_the_levels_of_the_libraries_come_back() -> None:
    before = logging.getLogger("diffusers").level
    with quiet_libraries():
        assert logging.getLogger("diffusers").level == logging.ERROR
    assert logging.getLogger("diffusers").level == before
    with pytest.raises(RuntimeError), quiet_libraries():
        raise RuntimeError
    assert logging.getLogger("diffusers").level == before
