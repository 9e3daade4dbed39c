"""Beside mkdocs for `make docs`: README becomes the first page, and files that pages link to come along."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?:\.\./)?(?:docs/)?([^)#:\s]+)")  # to a file of the repository


def from_the_root(text: str) -> str:
    """A page whose links start at the root of the site, where docs/ and the repository are one folder."""
    return LINK.sub(r"\1", text)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README, and what pages link to outside of docs/: figures, tables, the notebook."""
    readme = from_the_root((ROOT / "README.md").read_text(encoding="utf-8"))
    files.append(File.generated(config, "index.md", content=readme))
    pages = [readme, *(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md")))]
    for path in sorted({name for page in pages for name in LINK.findall(page)}):
        if not (ROOT / "docs" / path).exists() and (ROOT / path).is_file():
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links of a page of docs/ lead out of that folder, which the site does not have."""
    return from_the_root(markdown)
