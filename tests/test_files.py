"""Files are replaced whole or not at all; hostile JSON is refused with a message."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.full_disk import full_disk

from diffattn.files import (
    MAX_DEPTH,
    CannotWrite,
    decode_text,
    read_json,
    read_lines,
    read_text,
    split_lines,
    write_json,
    write_whole,
)
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


# Text from elsewhere.


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_of_any_program_is_read(tmp_path: Path, coding: str, end: str) -> None:
    lines = ["é cat", "", "a dog\u2028on a mat\x85and\x0bon\x0cit\x1c.", "ship"]
    data = end.join([*lines, ""]).encode(coding)
    (tmp_path / "a.txt").write_bytes(data)
    assert read_lines(tmp_path / "a.txt") == read_lines(data) == lines
    assert read_lines(data.removesuffix(end.encode(coding.replace("-sig", "").replace("16", "16-le")))) == lines


@pytest.mark.parametrize("coding", ["utf-16-be", "utf-32-be"])
def test_the_mark_says_the_order_of_the_bytes(coding: str) -> None:
    assert decode_text("\ufeffcat".encode(coding)) == "cat"


def test_joined_files_have_marks_inside() -> None:
    assert split_lines("\ufeffcat\n\ufeffdog\n") == ["cat", "dog"]
    assert read_lines(b"") == read_lines(b"\xef\xbb\xbf") == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"cat\r\ncaf\xe9 noir\n", r"line 2 contains bytes that are not UTF-8 \(e9 20 6e 6f\); save the file as UTF-8"),
        (b"cat\ncat\n\n\xff", "line 4 contains bytes that are not UTF-8"),
        ("cat\ndog\n".encode("utf-16")[:-1], "line 2 contains bytes that are not UTF-16-LE|line 3 contains bytes"),
        ("cat\ndog".encode("utf-16-le"), "line 1 contains a NUL character"),
    ],
)
def test_what_is_no_text_names_the_line(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_lines(data)


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16"])
def test_json_files_may_have_a_mark(tmp_path: Path, coding: str) -> None:
    file = tmp_path / "a.json"
    file.write_bytes('{"protocol": {"model": "é"}}'.encode(coding))
    for read in (read_json, read_recipe):
        assert read(file)["protocol"]["model"] == "é"


@pytest.mark.parametrize("flush", [False, True])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, flush: bool) -> None:
    file = tmp_path / "new folder" / ("n" * 250)
    write_whole(file, lambda part: part.write_text("old"), flush=flush)

    def fails(part: Path) -> None:
        part.write_text("half")
        assert file.read_text() == "old"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(file, fails, flush=flush)
    assert (file.read_text(), [*file.parent.iterdir()]) == ("old", [file])
    write_whole(file, lambda part: part.write_text("new"), flush=flush)
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("new", 0o644)


def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"old": 1})
    tensors = {"x": torch.zeros(999)}
    for write in (lambda part: part.write_text("x" * 999), lambda part: save_file(tensors, part)):
        with full_disk(), pytest.raises(CannotWrite) as failure:
            write_whole(file, write)
        assert str(failure.value) == f"cannot write to {str(file)!r}: File too large"
        assert failure.value.strerror == "File too large"
    assert (read_json(file), [*tmp_path.iterdir()]) == ({"old": 1}, [file])


@pytest.mark.parametrize(
    ("name", "reason"), [("folder", "Is a directory"), ("file/a", "File exists"), ("file/a/b", "Not a directory")]
)
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite, match=rf"^cannot write to '.*/{name}': {reason}$"):
        write_json(tmp_path / name, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_links_and_pipes_stay_what_they_are(tmp_path: Path) -> None:
    real, link, pipe = tmp_path / "real/a.json", tmp_path / "link.json", tmp_path / "pipe"
    link.symlink_to(real)
    write_json(link, {"a": 1})
    assert link.is_symlink()
    assert read_json(real) == {"a": 1}
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_json(pipe, {"a": 1})
    assert json.loads(os.read(reader, 99)) == {"a": 1}
    os.close(reader)
    assert pipe.is_fifo()
