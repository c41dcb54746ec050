"""The page as one HTML text: data, scripts and styles inside, and a policy that lets nothing else in."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from html import escape
from pathlib import Path

from lit_mult.analysis.page.payload import Payload

_ASSETS = Path(__file__).parent / "assets"
SCRIPTS = (
    "dom.js",
    "packed.js",
    "statistics.js",
    "chart.js",
    "figures.js",
    "figure_card.js",
    "query.js",
    "run_table.js",
    "run_panel.js",
    "sections.js",
    "live.js",
    "page.js",
)
"""In the order in which they are joined: each uses what stands before it."""


def document(payload: Payload | None, *, live: bool = False) -> str:
    """The page of a report.

    Whatever a study may be called: text of the data is in base64, or escaped. The policy allows the page's own script
    and style, by their hashes, and images that it makes; a live page may ask its own server as well.

    Args:
        payload: what it shows; None for a live page that has nothing to show yet.
        live: it asks `/state.json` how the study goes on, and fetches `/page.json` when there is something new.
    """
    style, script = _style(), _script()
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src '{_hash(script)}'",
            f"style-src '{_hash(style)}'",
            "img-src data: blob:",
            f"connect-src {chr(39)}{'self' if live else 'none'}{chr(39)}",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    watching = f' data-live="{payload.version if payload else ""}"' if live else ""
    title = payload.title if payload else "Waiting for the first record"
    sentences = "".join(f"<li>{escape(line)}</li>" for line in (payload.sentences if payload else ()))
    return (
        "<!doctype html>\n"
        f'<html lang="en"{watching}>\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"<noscript><h1>{escape(title)}</h1><ul>{sentences}</ul><p>The figures need JavaScript; report.md has the rest."
        "</p></noscript>\n"
        f'<script type="text/plain" id="data">{payload.data if payload else ""}</script>\n'
        f'<script type="text/plain" id="curves">{payload.curves if payload else ""}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


@cache
def _style() -> str:
    return (_ASSETS / "style.css").read_text(encoding="utf-8")


@cache
def _script() -> str:
    parts = (f"// {name}\n{(_ASSETS / name).read_text(encoding='utf-8')}" for name in SCRIPTS)
    return '"use strict";\n(() => {\n' + "\n".join(parts) + "})();\n"


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
