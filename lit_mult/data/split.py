"""Which documents are for training and which for validation: a matter of their content alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lit_mult.data.documents import Document

Side = Literal["train", "val"]

_DIGESTS = 1 << 64


@dataclass(frozen=True)
class Split:
    """A document goes to validation when its digest is below the threshold; a lone text is cut instead.

    The digest is that of the text, so that copies of a document never stand on both sides, the split does not
    depend on the order of the documents, and a document that joins the corpus moves no other.
    """

    threshold: int
    """Digests below it are for validation; 0 to 2**64."""
    cut: float | None = None
    """Share of the text that is cut off its end for validation, where the corpus has one distinct text only."""

    def parts(self, text: str) -> list[tuple[Side, str]]:
        """The side a document is on, or both sides with the part of a lone text that each gets."""
        if self.cut is None:
            return [("val" if digest(text) < self.threshold else "train", text)]
        at = len(text) - max(1, round(len(text) * self.cut))
        return [("train", text[:at]), ("val", text[at:])]


def digest(text: str) -> int:
    """Uniform in [0, 2**64): the start of the SHA-256 of the UTF-8 bytes."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_documents(documents: Iterable[Document], val_fraction: float) -> Split:
    """The split that sends about val_fraction of the distinct documents to validation; one pass, constant memory.

    Where chance leaves a side of a small corpus empty, the distinct text with the lowest digest goes to validation,
    or the one with the highest to training.
    """
    lowest, highest = _DIGESTS, -1
    for document in documents:
        value = digest(document.text)
        lowest, highest = min(lowest, value), max(highest, value)
    if lowest == highest:
        return Split(0, cut=val_fraction)
    # Above the lowest digest and not above the highest: neither side is empty.
    return Split(min(max(int(val_fraction * _DIGESTS), lowest + 1), highest))
