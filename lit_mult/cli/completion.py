"""The command completion: a static script, so that a Tab starts no Python."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args, get_origin

from lit_mult.cli.parsing import make_parser, parser_of

_SHELLS = {
    "bash": "~/.local/share/bash-completion/completions/lit-mult",
    "zsh": "_lit-mult in a folder of $fpath",
    "fish": "~/.config/fish/completions/lit-mult.fish",
    "tcsh": "a file that ~/.tcshrc sources",
}
"""Where each looks for it."""
_FOLDERS = {"folder", "run", "path", "sides"}
"""Positional arguments that are folders."""


def completion(arguments: Sequence[str]) -> int:
    """Print a script by which a shell completes commands, options and their values."""
    parser = make_parser("completion", completion)
    places = ", ".join(f"{shell}: {place}" for shell, place in _SHELLS.items())
    parser.add_argument("shell", choices=list(_SHELLS), help=f"save the script as {places}")
    shell = parser.parse_args(list(arguments)).shell

    import shtab

    from lit_mult.cli import COMMANDS

    script = shtab.complete(_tree(COMMANDS), shell)
    if shell == "bash":  # files, where nothing else fits: a study is a file or a name
        script = script.replace(" -o bashdefault -F ", " -o bashdefault -o default -F ")
    print(script)
    return 0


def _tree(commands: dict[str, Callable[[Sequence[str]], int]]) -> argparse.ArgumentParser:
    """All commands as subcommands of one parser of the standard library, which shtab reads."""
    tree = argparse.ArgumentParser(prog="lit-mult")
    tree.add_argument("--version", action="store_true", help="versions of lit-mult, torch and Python")
    subcommands = tree.add_subparsers()
    for name, command in commands.items():
        subcommand = subcommands.add_parser(name, help=command.__doc__, add_help=False)
        for action in parser_of(command)._actions:
            if action.help != argparse.SUPPRESS:
                _add(subcommand, action)
    return tree


def _add(parser: argparse.ArgumentParser, like: argparse.Action) -> None:
    import shtab

    names = like.option_strings or [like.dest]
    if like.nargs == 0:
        parser.add_argument(*names, help=like.help, action="store_true")
        return
    choices = like.choices or _VALUES.get(like.dest, _choices_of)(like)
    added = parser.add_argument(*names, help=like.help, choices=choices or None, nargs=like.nargs)
    if choices:
        return
    if like.dest in ("config", "preset") or names == ["-o", "--out"]:
        added.complete = shtab.FILE  # type: ignore[attr-defined]
    elif like.dest in ("out", "include_path") or (not like.option_strings and like.dest in _FOLDERS):
        added.complete = shtab.DIRECTORY  # type: ignore[attr-defined]


def _choices_of(action: argparse.Action) -> tuple[str, ...]:
    """Values that the type of an option allows, if they are few."""
    return _values(getattr(action, "_typehint", None))


def _values(hint: Any) -> tuple[str, ...]:
    if hint is bool:
        return ("true", "false")
    if get_origin(hint) is Literal:
        return tuple(map(str, get_args(hint)))
    return tuple(value for part in get_args(hint) if get_origin(hint) is not list for value in _values(part))


def _optimizers(action: argparse.Action) -> tuple[str, ...]:
    from lit_mult.registry.optimizers import OPTIMIZERS

    return tuple(OPTIMIZERS)


def _studies(action: argparse.Action) -> tuple[str, ...]:
    from lit_mult.study.files import shipped_studies

    return tuple(sorted(shipped_studies()))


def _presets(action: argparse.Action) -> tuple[str, ...]:
    from lit_mult.method.presets import shipped_presets

    return tuple(shipped_presets())


_VALUES: dict[str, Callable[[argparse.Action], tuple[str, ...]]] = {
    "optimizer": _optimizers,
    "study": _studies,
    "parametrization.preset": _presets,
}
"""Destination of an option -> names that its type does not have."""
