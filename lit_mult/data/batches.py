"""Windows of tokens as pure functions of (seed, step).

Shapes: B sequences of a batch, T tokens a model sees at once (data.seq_len), W = T + 1 tokens of a window,
N tokens of a text. A window's first T tokens are the inputs and its last T the targets.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lit_mult.errors import UserError

Tokens = npt.NDArray[np.unsignedinteger[Any]]
Windows = npt.NDArray[np.int64]


class TrainWindows:
    """Training batches over tokens_N, in an order that depends on the seed alone.

    The tokens are taken as a ring (they end in a separator, so the seam is one more border of documents). An epoch
    cuts the ring, from an offset of its own, into the N // T windows that start every T tokens: each token is a
    target once, but for the N % T at the end of the ring so cut. The windows come in an order of the epoch's own, and
    batches run on across the borders of epochs.
    """

    def __init__(self, tokens_N: Tokens, seq_len: int, batch_size: int, seed: int) -> None:
        _check_length("training", len(tokens_N), seq_len, "a longer corpus")
        self.tokens_N = tokens_N
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self.windows_per_epoch = len(tokens_N) // seq_len
        self._epoch: tuple[int, npt.NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def batch(self, step: int, rows: slice = slice(None)) -> Windows:
        """Windows x_BxW of a step (0, 1, ...), int64; rows takes a part of them, such as one rank's."""
        index_B = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[rows]
        epoch_B, place_B = np.divmod(index_B, self.windows_per_epoch)
        start_B = np.empty_like(index_B)
        for epoch in np.unique(epoch_B):
            start_B[epoch_B == epoch] = self._starts(int(epoch))[place_B[epoch_B == epoch]]
        index_BxW = (start_B[:, None] + np.arange(self.seq_len + 1)) % len(self.tokens_N)
        return np.asarray(self.tokens_N[index_BxW], dtype=np.int64)

    def _starts(self, epoch: int) -> npt.NDArray[np.int64]:
        """First token of each window of an epoch, in the epoch's order; the latest epoch's are kept."""
        if self._epoch[0] != epoch:
            # Raw bits and a stable sort: numpy promises the stream of a bit generator across its versions, but not
            # what Generator.permutation makes of it.
            bits = np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=(epoch,)))
            offset = bits.random_raw() % len(self.tokens_N)
            order = np.argsort(bits.random_raw(self.windows_per_epoch), kind="stable")
            self._epoch = (epoch, offset + order * self.seq_len)
        return self._epoch[1]


def validation_windows(tokens_N: Tokens, seq_len: int, n: int) -> Windows:
    """n windows x_nxW, int64, evenly spread from the first token to the last, no token a target twice.

    The same for every seed. A text too short for n of them gives as many as it holds, at least one.

    Raises:
        UserError: the text is shorter than one window.
    """
    _check_length("validation", len(tokens_N), seq_len, "a longer corpus, a larger data.val_fraction")
    last = len(tokens_N) - 1 - seq_len
    n = min(n, (len(tokens_N) - 1) // seq_len)
    # n * T <= N - 1, so neighbours start at least T apart.
    start_n = np.arange(n) * last // max(n - 1, 1)
    return np.asarray(tokens_N[start_n[:, None] + np.arange(seq_len + 1)], dtype=np.int64)


def _check_length(side: str, tokens: int, seq_len: int, remedy: str) -> None:
    if tokens <= seq_len:
        fault = f"data.seq_len = {seq_len}: a window needs {seq_len + 1} tokens and the {side} text has {tokens}"
        raise UserError(f"{fault}; take {remedy} or a smaller data.seq_len")
