"""JSON as strangers send it: ordinary text is read as ever, hostile text is refused in words."""

import json
from pathlib import Path

import pytest

from diffattn.files import MAX_DEPTH, read_json, read_text
from diffattn.patching.recipe import read_recipe


def test_ordinary_text_is_read_as_json_reads_it() -> None:
    text = json.dumps({"a": [1, -2, 2**63, 1.5, 1e300, None, True, "x"], "b": {"c": [{}]}, "d": []})
    assert read_text(text) == json.loads(text)
    assert read_text("[" * MAX_DEPTH + "]" * MAX_DEPTH)


HOSTILE = [
    pytest.param("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "more than 32 deep", id="deep"),
    pytest.param("[" * 200_000, "more than 32 deep", id="deeper than Python follows"),
    pytest.param('{"a":' * 900 + "1" + "}" * 900, "more than 32 deep", id="deep objects"),
    pytest.param("1" + "0" * 400, "401 digits", id="a number that no float holds"),
]


@pytest.mark.parametrize(("value", "says"), HOSTILE)
def test_hostile_text_is_refused(tmp_path: Path, value: str, says: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(f'{{"protocol": {value}}}')
    for read in (read_json, read_recipe):
        with pytest.raises(ValueError, match=rf"a\.json.* is not a readable JSON file: .*{says}"):
            read(file)


def test_files_are_utf8_whatever_the_locale_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("io.text_encoding", lambda encoding, *_: encoding or "ascii")
    file = tmp_path / "a.json"
    file.write_bytes('{"protocol": {"model": "é"}}'.encode())
    for read in (read_json, read_recipe):
        assert read(file)["protocol"]["model"] == "é"
