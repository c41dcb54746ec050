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

_DECISION = re.compile(r"^\*\*(?P<date>\d{4}-\d\d-\d\d)(?: ·|\.) (?P<title>[^*]+?)\.?\*\*", re.M)

# The first topic with a word of the title has the decision, or else the first with a word of the text.
_TOPICS: Final = {
    "Documentation": r"readme|^pages",
    "What studies have shown": r"the gain|the stronger|tuned plane|vocabulary|2 x 2|batches|carry|lr_width|ablation"
    r"|a lag|rows of the head|quick|rates around|at this size|standard deviation 1|downstream study",
    "Statistics and verdicts": r"interval|verdict|seed|student|question|speed-up|choose|sides of|trapped|counting",
    "Multipliers on other models": r"somebody else|fused|foreign|backward pass forms|clip scales",
    "Optimizers and decay": r"muon|ball|scion|sphere|decay|adam|optimizer|muown|softplus|timescale|magnitude|heavyball",
    "Width, depth and placement": r"width|depth|plan |three rules|redundan|coordinate|factor|placement|preset's"
    r"|norms of",
    "Studies and sweeps": r"optuna|sweep|cell|lease|deaths|parent|workers|trial|pruner|round|experiment|profiles|study",
    "Speed and stacks": r"stack|compile|contestants|z-loss|hand-written|sixteen|member",
    "Training and records": r"checkpoint|nan |dropout|bf16|shard|mean with|regime|pretrained|trained model",
    "Diagnostics and noise": r"noise|brownian|reading|outputs|frozen|columns|norm weight|scales vary",
    "Scores, export and tokenizers": r"export|`mini`|benchmark|bfloat16|import|evaluations|lines to continue",
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
