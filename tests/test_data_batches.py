"""Windows: each token a target once an epoch, and nothing but (seed, step) decides a batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_mult.data.batches import TrainWindows, validation_windows
from lit_mult.errors import UserError


def numbered(n: int) -> np.ndarray:
    """Tokens that are their own positions, so that a window shows where it was cut."""
    return np.arange(n, dtype=np.uint16)


@given(n=st.integers(4, 60), seq_len=st.integers(2, 9), seed=st.integers(0, 3))
def test_epoch_covers_each_target_once(n: int, seq_len: int, seed: int) -> None:
    if n <= seq_len:
        return
    windows = TrainWindows(numbered(n), seq_len, batch_size=n // seq_len, seed=seed)  # one step is one epoch
    for epoch in range(3):
        x_BxW = windows.batch(epoch)
        assert x_BxW.shape == (n // seq_len, seq_len + 1)
        assert x_BxW.dtype == np.int64
        np.testing.assert_array_equal(np.diff(x_BxW, axis=1) % n, 1)  # consecutive tokens of the ring
        targets = x_BxW[:, 1:].ravel()
        assert len(set(targets.tolist())) == targets.size == n - n % seq_len


def test_offset_and_order_change_with_epoch_and_seed() -> None:
    windows = TrainWindows(numbered(1000), 10, batch_size=100, seed=0)
    first, second = windows.batch(0), windows.batch(1)
    assert not np.array_equal(first, second)
    assert {int(x) % 10 for step in range(99) for x in windows.batch(step)[:1, 0]} == set(range(10))
    assert not np.array_equal(first, TrainWindows(numbered(1000), 10, 100, seed=1).batch(0))
    assert not np.array_equal(first[:, 0], np.sort(first[:, 0]))


def test_batches_run_on_across_epochs_and_do_not_depend_on_the_order_of_calls() -> None:
    def windows(batch_size: int) -> TrainWindows:
        return TrainWindows(numbered(75), 10, batch_size, seed=3)  # 7 windows an epoch

    one_by_one = np.concatenate([windows(1).batch(step) for step in range(36)])
    by_three, by_nine = windows(3), windows(9)  # nine reach over two epochs, or three
    for step in (11, 0, 7, 2, 1, 0, 11):
        np.testing.assert_array_equal(by_three.batch(step), one_by_one[3 * step : 3 * step + 3])
    for step in (3, 0, 1, 2):
        np.testing.assert_array_equal(by_nine.batch(step), one_by_one[9 * step : 9 * step + 9])


def test_rows_of_ranks_make_up_the_batch() -> None:
    windows = TrainWindows(numbered(75), 10, batch_size=8, seed=0)
    ranks = [windows.batch(4, slice(rank, None, 2)) for rank in range(2)]
    np.testing.assert_array_equal(np.stack(ranks, axis=1).reshape(8, 11), windows.batch(4))


def test_golden_order() -> None:
    """The order of the data is part of every published number. It changes only with a major version."""
    x_BxW = TrainWindows(numbered(100), 10, batch_size=5, seed=7).batch(3)
    said = "if the change is meant, put the new starts here, raise the major version and redo the published results"
    assert x_BxW[:, 0].tolist() == [48, 88, 78, 8, 98], said


@given(n=st.integers(2, 200), seq_len=st.integers(2, 20), count=st.integers(1, 30))
def test_validation_windows_are_disjoint_and_spread(n: int, seq_len: int, count: int) -> None:
    if n <= seq_len:
        return
    x_nxW = validation_windows(numbered(n), seq_len, count)
    assert x_nxW.shape == (min(count, (n - 1) // seq_len), seq_len + 1)
    np.testing.assert_array_equal(np.diff(x_nxW, axis=1), 1)
    targets = x_nxW[:, 1:].ravel()
    assert len(set(targets.tolist())) == targets.size
    assert x_nxW[0, 0] == 0
    if len(x_nxW) > 1:
        assert x_nxW[-1, -1] == n - 1
        assert np.ptp(np.diff(x_nxW[:, 0])) <= 1


def test_validation_windows_by_hand() -> None:
    # 11 tokens, T = 2: the last window starts at 8, three windows at 0, 4, 8.
    assert validation_windows(numbered(11), 2, 3).tolist() == [[0, 1, 2], [4, 5, 6], [8, 9, 10]]
    # 5 tokens hold (5 - 1) // 2 = 2 windows of disjoint targets.
    assert validation_windows(numbered(5), 2, 64).tolist() == [[0, 1, 2], [2, 3, 4]]


@given(room=st.integers(0, 40), seq_len=st.integers(2, 9), count=st.integers(2, 20), offset=st.floats(0.2, 0.8))
def test_windows_of_an_offset_have_no_token_of_the_others(room: int, seq_len: int, count: int, offset: float) -> None:
    n = count * (5 * (seq_len + 2) + room)
    x_nxW = validation_windows(numbered(n), seq_len, count)
    others_nxW = validation_windows(numbered(n), seq_len, count, offset)
    assert len(others_nxW) == len(x_nxW) - 1
    np.testing.assert_array_equal(np.diff(others_nxW, axis=1), 1)
    tokens = np.concatenate([x_nxW.ravel(), others_nxW.ravel()])
    assert len(set(tokens.tolist())) == tokens.size


def test_windows_of_an_offset_by_hand() -> None:
    # 19 tokens, T = 2: windows at 0, 8, 16, and halfway between them at 4 and 12.
    assert validation_windows(numbered(19), 2, 3, 0.5).tolist() == [[4, 5, 6], [12, 13, 14]]
    with pytest.raises(UserError, match=r"^data.val_offset = 0.5: 3 windows of 2 tokens leave no room"):
        validation_windows(numbered(11), 2, 3, 0.5)


def test_text_of_one_window_is_enough_and_less_is_refused() -> None:
    assert TrainWindows(numbered(11), 10, 2, seed=0).batch(0).shape == (2, 11)
    assert validation_windows(numbered(11), 10, 64).tolist() == [list(range(11))]
    said = (
        r"data\.seq_len = 10: a window needs 11 tokens and the {} text has 10; take a longer corpus.*smaller data\.seq_"
    )
    with pytest.raises(UserError, match=said.format("training")):
        TrainWindows(numbered(10), 10, 2, seed=0)
    with pytest.raises(UserError, match=said.format("validation")):
        validation_windows(numbered(10), 10, 64)
