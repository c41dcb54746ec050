"""A cache of attention keys and values for generation.

Shapes in names: B batch, T new tokens, S slots, G key/value heads, K head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class LayerCache:
    """The keys and values of one attention layer."""

    def __init__(self, keys_BSGK: Tensor, values_BSGK: Tensor) -> None:
        self.keys_BSGK, self.values_BSGK = keys_BSGK, values_BSGK
        self.span: Span | None = None
        """Of the new tokens; set by `KVCache.extend`."""

    def extend(self, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add the keys and values of T new tokens.

        Returns keys and values (B, S', G, K) that the new tokens attend to, and the attention mask (1 or B, 1, T, S');
        None for plain causal attention (T > 1), or if every token attends to all (T = 1).
        """
        span = self.span
        assert span is not None, "KVCache.extend comes first"
        for kept_BSGK, new_BTGK in ((self.keys_BSGK, k_BTGK), (self.values_BSGK, v_BTGK)):
            if span.slots_N is None:
                kept_BSGK[:, span.first : span.seen] = new_BTGK
            else:
                kept_BSGK.flatten(0, 1).index_copy_(0, span.slots_N, new_BTGK.flatten(0, 1).to(kept_BSGK.dtype))
        if span.first == 0:
            return k_BTGK, v_BTGK, None
        return self.keys_BSGK[:, : span.seen], self.values_BSGK[:, : span.seen], span.mask_B1TS


class Span:
    """Slots, rotations and mask of T new tokens of each row; the same in every layer."""

    def __init__(self, cache: KVCache, length: int) -> None:
        self.first, self.seen = cache.longest, cache.longest + length
        device = cache.lengths_B.device
        self.slots_N: Tensor | None = None
        """Slots of all new tokens in a flattened batch (B*T,); None if every row uses first..seen-1."""
        self.mask_B1TS: Tensor | None = None
        if not cache.ragged:
            self.rotation = cache.rotation_SK2[self.first : self.seen]
            """Rotations of the new tokens (T, K/2, 2), or (B, T, K/2, 2) if rows differ in length."""
            position_BT = torch.arange(self.first, self.seen, device=device)[None]
        else:
            position_BT = cache.lengths_B[:, None] + torch.arange(length, device=device)
            self.rotation = cache.rotation_SK2[position_BT]
            row_B1 = torch.arange(len(position_BT), device=device)[:, None]
            self.slots_N = (row_B1 * cache.slots + position_BT).flatten()
        if self.first and (cache.ragged or length > 1):
            self.mask_B1TS = (torch.arange(self.seen, device=device) <= position_BT[..., None])[:, None]


class KVCache:
    """Up to `slots` tokens per row; row b has lengths_B[b] tokens, in its first slots.

    Rows of different lengths are padded on the right, so that causal attention ignores the padding, and prompts need no
    T x T mask. `truncate` drops the padding, and later tokens overwrite it.

        cache = model.empty_cache(batch=2, slots=100)
        hidden_BTD = model.hidden(prompts_BT, cache)  # padded on the right
        cache.truncate(lengths)
        logits_BTV = model(next_B1, cache)  # one more token for each row, and so on
    """

    def __init__(self, layers: Sequence[LayerCache], rotation_SK2: Tensor, lengths: Sequence[int]) -> None:
        """`rotation_SK2` is the rotary table of all slots; `Llama.empty_cache` makes an empty cache."""
        self.layers, self.rotation_SK2 = layers, rotation_SK2
        self.slots = len(rotation_SK2)
        self._set_lengths(lengths)

    def _set_lengths(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        # On the host, so that no step synchronizes with the device.
        self.longest, self.ragged = max(lengths), len(set(lengths)) > 1
        self.lengths_B = torch.tensor(self.lengths, device=self.rotation_SK2.device)

    def extend(self, length: int) -> Tensor:
        """Reserve slots for `length` new tokens a row, and return their rotations (T, K/2, 2) or (B, T, K/2, 2).

        Raises:
            ValueError: there are not enough slots.
        """
        if self.longest + length > self.slots:
            raise ValueError(f"{self.longest} + {length} tokens do not fit into {self.slots} slots")
        span = Span(self, length)
        for layer in self.layers:
            layer.span = span
        self.longest += length
        self.lengths_B = self.lengths_B + length
        self.lengths = [kept + length for kept in self.lengths]
        return span.rotation

    def truncate(self, lengths: Sequence[int]) -> None:
        """Drop all but the first lengths[b] tokens of each row. Raises: ValueError when a row has read fewer."""
        if any(wanted > kept for wanted, kept in zip(lengths, self.lengths, strict=True)):
            raise ValueError(f"rows of {self.lengths} tokens cannot be truncated to {list(lengths)}")
        self._set_lengths(lengths)

    def select(self, rows: Sequence[int]) -> KVCache:
        """A cache with copies of these rows, which may repeat, in this order."""
        rows_N = torch.tensor(rows, device=self.lengths_B.device)
        layers = [
            LayerCache(layer.keys_BSGK.index_select(0, rows_N), layer.values_BSGK.index_select(0, rows_N))
            for layer in self.layers
        ]
        return KVCache(layers, self.rotation_SK2, [self.lengths[row] for row in rows])
