"""The rest of the repository in these pages: reports of studies become pages, and links to files lead somewhere.

Pages link to files by their relative path, as on a code host. A link to the report of a study (results/NAME/report.md)
makes that report a page; one to README.md or CONTRIBUTING.md leads to the page with its content, and any other one to
the file itself, as a download.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.typing import ExtensionMetadata

ROOT = Path(__file__).parents[2]
_REPORT = re.compile(r"results/(\w+)/report\.md")
_PAGES = {"README.md": "index", "CONTRIBUTING.md": "design/contributing"}


def _write_report_pages(app: Sphinx) -> None:
    """A page for each report that a page links to, and one that lists them."""
    folder = app.srcdir / "results" / "reports"
    folder.mkdir(parents=True, exist_ok=True)
    sources = [path for path in app.srcdir.rglob("*.md") if folder not in path.parents]
    named = {name for path in sources for name in _REPORT.findall(path.read_text(encoding="utf-8"))}
    names = sorted(name for name in named if (ROOT / "results" / name / "report.md").is_file())
    wanted = {f"{name}.md": _report_page(name) for name in names} | {"index.md": _list_of_reports(names)}
    for path in folder.glob("*.md"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text:
            (folder / name).write_text(text, encoding="utf-8")


def _report_page(name: str) -> str:
    return f"```{{include}} ../../../results/{name}/report.md\n:relative-images:\n```\n"


def _list_of_reports(names: list[str]) -> str:
    titles = [(ROOT / "results" / name / "report.md").read_text(encoding="utf-8").splitlines()[0] for name in names]
    entries = [f"{name}: {title.lstrip('# ')} <{name}>" for name, title in zip(names, titles, strict=True)]
    return "\n".join(["# Whole reports", "", "```{toctree}", ":maxdepth: 1", "", *entries, "```", ""])


class _LinksToPages(SphinxTransform):
    """Leads links to files outside of docs/ to the page with their content; links to folders become plain text."""

    default_priority = 10

    def apply(self, **options: Any) -> None:
        folder = Path(self.env.doc2path(self.env.docname)).parent
        for link in list(self.document.findall(addnodes.pending_xref)):
            if link["reftype"] != "myst":
                continue  # not of Markdown
            path = (folder / link["reftarget"]).resolve()
            if link["refdomain"] == "doc":
                link["reftarget"] = _page_of(path) or link["reftarget"]
            elif path.is_dir():
                link.replace_self(nodes.literal("", link.astext()))


def _page_of(path: Path) -> str | None:
    """The page of a source file, which has its path without the ending."""
    if not path.is_relative_to(ROOT):
        return None
    name = path.relative_to(ROOT).as_posix()
    report = _REPORT.fullmatch(f"{name}.md")
    return f"results/reports/{report[1]}" if report else _PAGES.get(f"{name}.md")


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register what reads and resolves."""
    app.connect("builder-inited", _write_report_pages)
    app.add_transform(_LinksToPages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
