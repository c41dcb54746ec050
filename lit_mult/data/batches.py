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
    """Training batches over tokens_N, in an order that depends only on the seed.

    The tokens form a ring (they end in a separator, like every document). Each epoch has a random offset, from which it
    cuts the ring into N // T windows, T tokens apart: each token is a target once, except for N % T at the end. The
    windows are shuffled in every epoch, and batches may span two epochs.
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
        """Windows x_BxW of a step (0, 1, ...), int64; `rows` selects some of them, such as one rank's."""
        index_B = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[rows]
        epoch_B, place_B = np.divmod(index_B, self.windows_per_epoch)
        start_B = np.empty_like(index_B)
        for epoch in np.unique(epoch_B):
            start_B[epoch_B == epoch] = self._starts(int(epoch))[place_B[epoch_B == epoch]]
        index_BxW = (start_B[:, None] + np.arange(self.seq_len + 1)) % len(self.tokens_N)
        return np.asarray(self.tokens_N[index_BxW], dtype=np.int64)

    def _starts(self, epoch: int) -> npt.NDArray[np.int64]:
        """First token of each window of an epoch, in the epoch's order; cached for the latest epoch."""
        if self._epoch[0] != epoch:
            # Raw bits and a stable sort: numpy guarantees the stream of a bit generator across versions, but not
            # Generator.permutation.
            bits = np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=(epoch,)))
            offset = bits.random_raw() % len(self.tokens_N)
            order = np.argsort(bits.random_raw(self.windows_per_epoch), kind="stable")
            self._epoch = (epoch, offset + order * self.seq_len)
        return self._epoch[1]


def validation_windows(tokens_N: Tokens, seq_len: int, n: int, offset: float = 0.0) -> Windows:
    """n windows x_nxW, int64, evenly spaced from the first token to the last; no token is a target twice.

    Independent of the seed. Fewer than n, but at least one, if the text is too short for n. With an `offset`, in units
    of the spacing, there is one window less, and none has a token of a window without offset.

    Raises:
        UserError: the text is shorter than one window, or has no room for other windows between these.
    """
    _check_length("validation", len(tokens_N), seq_len, "a longer corpus, a larger data.val_fraction")
    last = len(tokens_N) - 1 - seq_len
    n = min(n, (len(tokens_N) - 1) // seq_len)
    # n * T <= N - 1, so neighbours start at least T apart.
    start_n = np.arange(n) * last // max(n - 1, 1)
    if offset:
        shift_n = (np.diff(start_n) * offset).astype(np.int64)
        if n < 2 or min(shift_n.min(), (np.diff(start_n) - shift_n).min()) <= seq_len:
            fault = f"data.val_offset = {offset:g}: {n} windows of {seq_len} tokens leave no room between them"
            raise UserError(f"{fault}; take 0.5, a smaller data.val_windows or a larger data.val_fraction")
        start_n = start_n[:-1] + shift_n
    return np.asarray(tokens_N[start_n[:, None] + np.arange(seq_len + 1)], dtype=np.int64)


def _check_length(side: str, tokens: int, seq_len: int, remedy: str) -> None:
    if tokens <= seq_len:
        fault = f"data.seq_len = {seq_len}: a window needs {seq_len + 1} tokens and the {side} text has {tokens}"
        raise UserError(f"{fault}; take {remedy} or a smaller data.seq_len")
