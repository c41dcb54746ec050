"""Exceptions: errors that the user can fix, and a stop on request."""

from __future__ import annotations

from typing import Any


class UserError(Exception):
    """Bad input or an unusable environment: a one-line message with the fault and its fix.

    The command line prints it on stderr and exits with code 2.
    """


class ConfigError(UserError):
    """A field has a value that is not allowed."""

    def __init__(self, field: str, value: Any, allowed: str) -> None:
        super().__init__(f"{field} = {value!r}: {allowed}")
        self.field = field
        self.value = value
        self.allowed = allowed


class Interrupted(Exception):  # noqa: N818 - not an error
    """Work was stopped on request (SIGINT, SIGTERM); the same call resumes it."""


def one_line(error: Exception) -> str:
    """The message of an exception, on one line of at most 300 characters."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= 300 else message[:297] + "..."
