"""The command line. Each command is a function; heavy imports are lazy."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence

from lit_mult.cli.checks import brownian, coord_check, lint_placement
from lit_mult.cli.completion import completion
from lit_mult.cli.doctor import doctor
from lit_mult.cli.parsing import BAD_INPUT, INTERRUPTED, NO_READER
from lit_mult.cli.runs import export, fit, import_, parameters
from lit_mult.cli.scores import evaluate, tasks
from lit_mult.cli.studies import compare, preset, report, status, sweep, watch
from lit_mult.errors import Interrupted, UserError, one_of

COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "fit": fit,
    "sweep": sweep,
    "status": status,
    "report": report,
    "compare": compare,
    "evaluate": evaluate,
    "tasks": tasks,
    "preset": preset,
    "watch": watch,
    "parameters": parameters,
    "lint-placement": lint_placement,
    "brownian": brownian,
    "coord-check": coord_check,
    "export": export,
    "import": import_,
    "doctor": doctor,
    "completion": completion,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; bad input prints one line on stderr and returns exit code 2."""
    try:
        try:
            return _run(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # as `head` closes it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return NO_READER


def _run(arguments: Sequence[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print("usage: lit-mult COMMAND [options]\n\nStudy learnable multipliers in language-model pretraining.\n")
        width = shutil.get_terminal_size().columns
        for command, function in COMMANDS.items():
            print(textwrap.fill(f"  {command:16}{function.__doc__}", width, subsequent_indent=" " * 18))
        print("\n`lit-mult COMMAND --help` lists the options of a command.")
        return 0
    if name == "--version":
        from lit_mult.cli.machine import headline

        print(headline())
        return 0
    if name not in COMMANDS:
        print(f"lit-mult: {name}: no such command; there are {one_of(name, COMMANDS)}", file=sys.stderr)
        return BAD_INPUT
    try:
        return COMMANDS[name](arguments[1:])
    except UserError as error:
        code, message = BAD_INPUT, " ".join(str(error).split())
    except BrokenPipeError:
        raise
    except OSError as error:
        code, message = BAD_INPUT, f"{error.filename or ''}: {error.strerror or error}"
    except (Interrupted, KeyboardInterrupt) as stopped:
        code, message = INTERRUPTED, str(stopped) or "interrupted"
        if isinstance(stopped, Interrupted):
            message += f": lit-mult {shlex.join(arguments)}"
    print(f"lit-mult {name}: {message}", file=sys.stderr)
    return code
