"""Prompts from tables, and DrawBench by its name, without a network."""

from pathlib import Path

import pytest

from diffattn.evaluation import load_prompts
from diffattn.evaluation.prompts import DRAWBENCH_COUNT

TABLE = 'Prompts,Category\nA red car.,Colors\n"A cat, and ""two"" dogs.\non a mat",Counting\n,Text\n ship ,Text\n'
EXPECTED = ["A red car.", 'A cat, and "two" dogs.\non a mat', "ship"]


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_column_of_a_table_is_read(tmp_path: Path, coding: str) -> None:
    (tmp_path / "a.CSV").write_bytes(TABLE.encode(coding))
    assert load_prompts(tmp_path / "a.CSV") == EXPECTED
    (tmp_path / "a.tsv").write_bytes("id\tcaption\n1\ta, b\n2\tc\n3\n".encode(coding))
    assert load_prompts(str(tmp_path / "a.tsv")) == ["a, b", "c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", r"none of its columns \(a, b\) is named prompt, prompts, text, caption"),
        ("", "none of its columns"),
        ("prompt\n  \n", "has no prompts"),
    ],
)
def test_a_table_without_prompts_says_what_is_missing(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(ValueError, match=rf"prompts file '.*a.csv' .*{message}"):
        load_prompts(tmp_path / "a.csv")


def cached(cache: Path, count: int) -> Path:
    """As huggingface_hub keeps what it has downloaded."""
    place, revision = cache / "datasets--sayakpaul--drawbench", 40 * "a"
    folder = place / "snapshots" / revision
    folder.mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(revision)
    (folder / "DrawBench Prompts.csv").write_text("Prompts,Category\n" + "".join(f"p {i},x\n" for i in range(count)))
    return cache


def test_drawbench_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = load_prompts("drawbench", cached(tmp_path / "cache", DRAWBENCH_COUNT))
    assert found == [f"p {i}" for i in range(DRAWBENCH_COUNT)]
    assert load_prompts("DrawBench", tmp_path / "cache") == found
    monkeypatch.chdir(tmp_path)
    Path("drawbench").write_text("my own\n")
    assert load_prompts("drawbench", tmp_path / "cache") == ["my own"]  # a file of that name comes first


def test_another_data_set_is_not_taken_for_drawbench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"DrawBench could not be downloaded from the hub \(sayakpaul/drawbench\): .*; give a"
    ):
        load_prompts("drawbench", cached(tmp_path / "few", 3))
    with pytest.raises(ValueError, match="DrawBench could not be downloaded"):
        load_prompts("drawbench", tmp_path / "empty")
