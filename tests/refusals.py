"""Errors that a user can act on, which are one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lit_mult.errors import UserError


@contextmanager
def refusal(*said: str, kind: type[UserError] = UserError) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Bad input is refused with an error of one line that has all of this in it."""
    with pytest.raises(kind) as error:
        yield error
    assert "\n" not in str(error.value)
    for part in said:
        assert part in str(error.value)
