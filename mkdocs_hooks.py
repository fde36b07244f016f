"""Hooks of mkdocs that keep links valid both in the repository and in the built site.

Pages link to each other by their places in the repository. The site has README.md as index.md,
docs/ at its top, and every other linked file at its path in the repository.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent
TABLE_ROW = re.compile(r"^\|.*$", re.MULTILINE)
CODE = re.compile(r"`[^`]+`")
LINK = re.compile(r"(?<=\]\()(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?(?=\))")


def on_files(files: Files, *, config: Any) -> Files:
    """Add README.md, and the files outside docs/ to which a page links."""
    pages = ["README.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    added = set(pages) - {"README.md"}
    for path in iter(pages):  # grows in the loop
        if path not in added:
            added.add(path)
            source = str(ROOT / path)
            files.append(File.generated(config, site_path(path), abs_src_path=source))
        if path.endswith(".md"):
            pages.extend(target for target in linked_files(path) if target not in pages)
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Replace places in the repository by places in the site, and adapt tables to mkdocs."""
    here = page.file.src_uri
    origin = repository_path(here)

    def replacement(match: re.Match[str]) -> str:
        target = resolve(origin, match["path"])
        if target is None:
            return match[0]
        path = posixpath.relpath(site_path(target), posixpath.dirname(here) or ".")
        return path + (match["anchor"] or "")

    return TABLE_ROW.sub(with_plain_pipes, LINK.sub(replacement, markdown))


def with_plain_pipes(row: re.Match[str]) -> str:
    """Return a row of a table without the backslashes that GitHub needs before pipes in code.

    Python-Markdown shows them, and does not take a pipe in code for the border of a cell.
    """
    return CODE.sub(lambda code: code[0].replace("\\|", "|"), row[0])


def linked_files(path: str) -> Iterator[str]:
    """Yield the files of the repository to which a page links."""
    for match in LINK.finditer((ROOT / path).read_text(encoding="utf-8")):
        target = resolve(path, match["path"])
        if target is not None:
            yield target


def resolve(page: str, link: str) -> str | None:
    """Return the linked file of the repository, the README of a directory, or None."""
    if "://" in link:
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    if (ROOT / target).is_dir():
        target = f"{target}/README.md"
    return target if (ROOT / target).is_file() else None


def site_path(path: str) -> str:
    """Return the place in the site of a file of the repository."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def repository_path(path: str) -> str:
    """Return the place in the repository of a page of the site."""
    if path == "index.md":
        return "README.md"
    in_docs = f"docs/{path}"
    return in_docs if (ROOT / in_docs).is_file() else path
