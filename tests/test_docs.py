"""Every code block of the documentation runs, on small models; the site is complete."""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from support import documents, tiny, tiny_pictures, web
from support.tiny_dit import tiny_dit

from diffattn.metrics.adm import write_pictures

sys.path.insert(0, str(documents.ROOT / "docs" / "hooks"))

EMOJI = ("footprints", "T-Rex", "tent", "man vampire", "green heart", "crab", "snail", "key")


def emoji_zip(path: Path) -> Path:
    """Eight captioned pictures in one subgroup each, as `noto-emoji-512.zip` has them."""
    rows = [{"file_name": f"{i}.png", "text": text, "subgroup": f"group {i % 2}"} for i, text in enumerate(EMOJI * 3)]
    content = {str(row["file_name"]): tiny_pictures.png(i, 64) for i, row in enumerate(rows)}
    return tiny_pictures.packed(path, content | {"metadata.jsonl": tiny_pictures.as_lines(*rows)})


def labelled_zip(path: Path, count: int) -> Path:
    """Pictures of two classes, as CIFAR-10's zips have them."""
    content = {f"{'cat' if i % 2 else 'ship'}/{i}.png": tiny_pictures.png(i, 32) for i in range(count)}
    labels = as_labels(content)
    return tiny_pictures.packed(path, content | {"dataset.json": tiny_pictures.as_json({"labels": labels})})


def as_labels(content: Mapping[str, bytes]) -> list[list[object]]:
    return [[name, int(name.startswith("cat"))] for name in content]


def pictures(count: int, side: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(256, (count, 3, side, side), generator=generator).to(torch.uint8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all files that the blocks name, small."""
    place = tmp_path_factory.mktemp("docs")
    documents.copy_assets(place)
    tiny.pipeline("sd", place / "tokenizer").save_pretrained(place / "tiny-sd")
    sit = web.save_sits(place / "outputs" / "cifar-sit", "pipeline") / "pipeline"
    index = json.loads((sit / "model_index.json").read_text())
    (sit / "model_index.json").write_text(json.dumps(index | {"id2label": {"0": "cat", "1": "ship"}}))
    save_file({k: v.contiguous() for k, v in tiny_dit().to_official().items()}, place / "official-sit.safetensors")
    emoji_zip(place / "noto-emoji-512.zip")
    labelled_zip(place / "cifar10-train.zip", 24)
    labelled_zip(place / "cifar10-test.zip", 12)
    (place / "imagenet").mkdir()
    tiny_pictures.folder(place / "imagenet" / "train", tiny_pictures.class_folders({"tench": 8, "goldfish": 8}))
    tiny_pictures.packed(place / "coco.zip", {f"{i}.png": tiny_pictures.png(i, 48) for i in range(6)})
    write_pictures(place / "samples.npz", pictures(4, 32))
    write_pictures(place / "VIRTUAL_imagenet256_labeled.npz", pictures(6, 32))
    (place / "prompts.txt").write_text("T-Rex\ntent\n")
    entries = [{"num_mediators": n} for n in (4, 16, 64)]
    change = {"kind": "latent_change", "entries": entries, "thresholds": [1.0, 0.9]}
    (place / "change.json").write_text(json.dumps({"method": "mediator", "schedule": change}))
    (place / "models").mkdir()
    return place


@pytest.fixture(scope="module")
def ran() -> set[str]:
    """The commands of earlier pages, which need not run again: what they wrote is still there."""
    return set()


@pytest.fixture(scope="module")
def address(place: Path) -> Iterator[str]:
    """Where the page is served, of the embedded models."""
    web.need_gradio()
    from diffattn.app.jobs import Models, Worker

    with web.served(Worker(Models(place / "models"), device="cpu")) as found:
        yield found


@pytest.mark.filterwarnings("ignore::diffattn.DiffAttnWarning")  # so small a model gains nothing
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[] if page == "README.md" else pytest.mark.slow)
        for page in documents.PAGES
        if documents.blocks_of(page)
    ],
)
def test_every_block_of_a_page_runs(
    page: str, place: Path, ran: set[str], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("DIFFATTN_THRESHOLDS", str(place / "thresholds.json"))
    blocks = documents.blocks_of(page)
    needs_page = any("http://127.0.0.1" in block.code for block in blocks)
    small = partial(documents.substituted, page_address=request.getfixturevalue("address") if needs_page else "")
    names: dict[str, object] = {"__name__": "docs"}  # the Python blocks of a page follow from each other
    for block in blocks:
        if block.language == "python":
            exec(compile(small(block.code), str(block), "exec"), names)
        elif block.language == "json":
            json.loads(block.code)
        elif block.language == "sh":
            for words in documents.commands(small(block.code)):
                if shlex.join(words) not in ran:
                    documents.run(words)
                    ran.add(shlex.join(words))


def test_the_exceptions_are_few() -> None:
    assert len(documents.EXCEPTIONS) <= 5


@pytest.mark.parametrize(
    "command",
    ["diffattn draw", "diffattn generate --prompt x --size 3", "diffattn app --side 3", "pip install other",
     "pip install '.[more]'", "python pipelines/train.py --presets x"],
)  # fmt: skip
def test_a_command_that_cannot_run_fails(command: str) -> None:
    (words,) = documents.commands(command)
    with pytest.raises(AssertionError):
        documents.run(words)


def test_a_target_that_make_lacks_fails() -> None:
    with pytest.raises(subprocess.CalledProcessError):
        documents.run(["make", "tea"])


def test_commands_are_read_as_a_shell_reads_them() -> None:
    code = 'diffattn generate --prompt "a cat" \\\n    --steps 3  # quick\n\n# nothing\nmake docs\n'
    words = ["diffattn", "generate", "--prompt", "a cat", "--steps", "3"]
    assert [*documents.commands(code)] == [words, ["make", "docs"]]


def test_the_readme_can_be_finished() -> None:
    assert len((documents.ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", documents.PAGES)
def test_links_and_pictures_lead_to_files(page: str) -> None:
    from outside_pages import LINK

    text = documents.FENCE.sub("", (documents.ROOT / page).read_text(encoding="utf-8"))
    here = (documents.ROOT / page).parent
    assert [link for link in LINK.findall(text) if not (here / link).exists()] == []


def test_every_page_of_docs_has_a_place_in_the_navigation() -> None:
    class Loader(yaml.SafeLoader):
        """Reads tags of mkdocs as nothing."""

    Loader.add_multi_constructor("", lambda *_: None)
    found = json.dumps(yaml.load((documents.ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"])
    missing = [path.name for path in (documents.ROOT / "docs").glob("*.md") if f'"{path.name}"' not in found]
    assert missing == [], "add these to nav in mkdocs.yml"


def test_links_are_rewritten_for_the_site() -> None:
    from outside_pages import site_link

    readme, card = Path("README.md"), Path("diffattn/assets/emoji-sd/README.md")
    assert site_link("docs/tuning.md", readme, Path("index.md")) == "tuning.md"
    assert site_link(str(card), readme, Path("index.md")) == "models/emoji-sd.md"
    assert site_link("../samples/a.png", Path("docs/page.md"), Path("page.md")) == "samples/a.png"
    assert site_link("../../../README.md", card, Path("models/emoji-sd.md")) == "../index.md"


def test_the_table_of_coexistence_is_read_off_the_tests() -> None:
    from coexistence_table import TESTS, coexistence_table, on_page_markdown, rows

    table = coexistence_table().splitlines()
    tests = "".join(path.read_text(encoding="utf-8") for path in TESTS.glob("test_*.py"))
    assert len(table) - 2 == tests.count("\n@coexists(") > 20
    page = on_page_markdown((documents.ROOT / "docs" / "coexistence.md").read_text(encoding="utf-8"))
    assert table[-1] in page
    source = '@coexists("A", "first", on=["B", "C"], holds="it works", needs="a GPU")\ndef test(): ...\n'
    assert [*rows(source)] == [("A", "first", "`B`, `C`", "it works (untested so far: it needs a GPU)")]
    with pytest.raises(ValueError, match="malformed"):
        [*rows('@coexists("A", how, on=["B"], holds="it works")\ndef test(): ...\n')]


def test_the_package_graph_is_drawn_from_the_table() -> None:
    from package_graph import package_graph, read_table, reduced, svg

    drawn = package_graph()
    for name in ("patching", "app.page", "functional"):
        assert f">{name}</text>" in drawn
    graph = read_table('MAY_IMPORT = {"a": "b c", "b": "c", "c": ""}')
    assert reduced(graph) == {"a": {"b"}, "b": {"c"}, "c": set()}
    assert svg(graph).count("<path") == 2
    with pytest.raises(ValueError, match="MAY_IMPORT"):
        read_table("x = 1")


def test_a_graph_is_drawn_with_its_importers_above() -> None:
    from package_graph import layers_of

    assert layers_of({"a": frozenset({"b"}), "b": frozenset({"c"}), "c": frozenset()}) == {"a": 2, "b": 1, "c": 0}
