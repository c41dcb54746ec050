"""An anchor for each paragraph of decisions.md, and their index by topic and date."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Final, NamedTuple

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

_DECISION = re.compile(r"^\*\*(?P<date>\d{4}-\d\d-\d\d) · (?P<title>[^*]+?)\.?\*\*", re.M)

# The first topic with a word of the title, or else of the text, has the decision.
_TOPICS: Final = {
    "Statistics and verdicts": r"interval|verdict|seed|Student|question|paired|speed-up|power|judge|precision",
    "Multipliers on other models": r"inject|foreign|fused|class of its own|width rules of|backward pass forms",
    "Optimizers and decay": r"muon|hyperball|scion|sphere|decay|clip|adam|optimizer|muown|normuon|softplus|timescale",
    "Width, depth and placement": r"width|depth|muP|redundan|coordinate|embedding|factor|placement|preset",
    "Studies and sweeps": r"optuna|sweep|cell|lease|trial|worker|grid|rate|tuning|study|profile",
    "Speed and stacks": r"stack|compile|speed|benchmark|process|kernel|faster|softmax",
    "Training and records": r"checkpoint|record|dropout|bf16|shard|device|NaN|metric|validation|hash",
    "Diagnostics and noise": r"noise|brownian|diagnostic|reading|outputs|norm",
    "Scores and export": r"export|lm-eval|evaluat|benchmark|mini|tokenizer|pretrained|scores|import",
}


class Decision(NamedTuple):
    """A paragraph of decisions.md."""

    date: str
    title: str
    anchor: str
    text: str

    @property
    def topic(self) -> str:
        """Its topic; "Other" where no word of one is found."""
        for place in (self.title, self.text):
            for topic, words in _TOPICS.items():
                if re.search(words, place, re.I):
                    return topic
        return "Other"


def decisions(text: str) -> list[Decision]:
    """The paragraphs of decisions.md, in its order."""
    starts = [*_DECISION.finditer(text)]
    ends = [match.start() for match in starts[1:]] + [len(text)]
    return [
        Decision(match["date"], " ".join(match["title"].split()), f"decision-{number}", text[match.end() : end])
        for number, (match, end) in enumerate(zip(starts, ends, strict=True), start=1)
    ]


def _add_anchors(app: Sphinx, docname: str, content: list[str]) -> None:
    if docname == "decisions":
        anchors = iter(decisions(content[0]))
        content[0] = _DECISION.sub(lambda match: f"({next(anchors).anchor})=\n{match[0]}", content[0])


class _Index(SphinxDirective):
    """`{decisions-index}`: links to all decisions, by topic, newest first."""

    def run(self) -> list[nodes.Node]:
        source = Path(self.env.srcdir) / "decisions.md"
        self.env.note_dependency(str(source))
        by_topic: dict[str, list[Decision]] = defaultdict(list)
        for decision in decisions(source.read_text(encoding="utf-8")):
            by_topic[decision.topic].append(decision)
        lines = []
        for topic in (*_TOPICS, "Other"):
            if by_topic[topic]:
                lines += [f"## {topic}", ""]
                lines += [f"- {one.date} · [{one.title}](#{one.anchor})" for one in reversed(by_topic[topic])]
                lines.append("")
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the anchors and the directive."""
    app.connect("source-read", _add_anchors)
    app.add_directive("decisions-index", _Index)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
