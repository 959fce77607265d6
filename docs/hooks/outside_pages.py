"""Brings files from outside docs/ into the site: README as the home page, CHANGELOG, model cards, samples.

Pages link to them as GitHub needs it (`../samples/…`); on the way into the site the links are rewritten.
"""

import re
from os.path import relpath
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]

MODELS = ("emoji-sd", "emoji-mmdit", "emoji-sit", "cifar-sit", "emoji-classifier", "cifar-classifier")
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    **{f"diffattn/assets/{name}/README.md": f"models/{name}.md" for name in MODELS},
}
"""Path in the repository -> page of the site."""

LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[)#])")
"""The target of a Markdown link or picture, anchors and addresses excepted."""


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """mkdocs: add the pages, and everything under samples/."""
    outside = {page: ROOT / source for source, page in PAGES.items()}
    outside |= {p.relative_to(ROOT).as_posix(): p for p in sorted((ROOT / "samples").rglob("*")) if p.is_file()}
    for name, path in outside.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """mkdocs: links between files of the repository become links between pages of the site."""
    name = page.file.src_uri
    source = next((s for s, p in PAGES.items() if p == name), name if name.startswith("samples/") else f"docs/{name}")
    return LINK.sub(lambda link: site_link(link[1], Path(source), Path(name)), markdown)


def site_link(link: str, source: Path, page: Path) -> str:
    """A link of the file `source` of the repository, as the page `page` of the site needs it."""
    target = Path(relpath(ROOT / source.parent / link, ROOT)).as_posix()
    inside = PAGES.get(target, target.removeprefix("docs/"))
    return Path(relpath(inside, page.parent)).as_posix()
