"""How work ends early: by an error that the user can fix, or on request."""

from __future__ import annotations

from typing import Any


class UserError(Exception):
    """Bad input or an unusable environment: one line that says what is wrong and how to fix it.

    The command line prints it on stderr and exits with code 2; from Python it is an ordinary exception.
    """


class ConfigError(UserError):
    """A field that holds a value which is not allowed."""

    def __init__(self, field: str, value: Any, allowed: str) -> None:
        super().__init__(f"{field} = {value!r}: {allowed}")
        self.field = field
        self.value = value
        self.allowed = allowed


class Interrupted(Exception):  # noqa: N818 - not an error
    """Work was stopped on request (SIGINT, SIGTERM); what is done is kept, and the same call resumes from there."""


def one_line(error: Exception) -> str:
    """What an exception says, on one line of at most 300 characters."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= 300 else message[:297] + "..."
