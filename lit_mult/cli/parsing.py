"""Shared by commands: parsers, the run config from flags, exit codes, the report of a folder."""

from __future__ import annotations

import re
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lit_mult.cli.printing import say, warn
from lit_mult.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from lit_mult.analysis.styles import StyleName, Width
    from lit_mult.config import RunConfig

BAD_INPUT, FAILED, INTERRUPTED, NO_READER = 2, 1, 130, 141  # the last as of programs that SIGPIPE ends


def make_parser(name: str, command: Callable[..., Any]) -> ArgumentParser:
    """A parser for a command, which raises a one-line `UserError` instead of exiting."""
    import jsonargparse

    class Parser(jsonargparse.ArgumentParser):
        def parse_args(self, args: Any = None, *others: Any, **options: Any) -> Any:
            if args and args[0] is _DESCRIBE:
                raise _Described(self)
            return super().parse_args(args, *others, **options)

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise UserError(_one_line(message, self))

    return Parser(prog=f"lit-mult {name}", description=command.__doc__)


_DESCRIBE = "--describe"
"""In place of a command's arguments, this very object asks for its parser; nobody can type it."""


class _Described(Exception):  # noqa: N818 - not an error
    """Carries the parser of a command out of it."""

    def __init__(self, parser: ArgumentParser) -> None:
        self.parser = parser


def parser_of(command: Callable[[Sequence[str]], int]) -> ArgumentParser:
    """The parser that a command makes, without what the command does next."""
    try:
        command([_DESCRIBE])
    except _Described as described:
        return described.parser
    raise AssertionError(f"{command.__name__} parsed nothing")


def _one_line(message: str, parser: ArgumentParser) -> str:
    """The parser's message without pydantic's boilerplate, and the name that an unknown one was meant to be."""
    for noise in (
        r"\[type=.*?\]\s",
        r"For further information visit \S+",
        r"\d+ validation errors? for [\w-]+(\[.*?\])?",
    ):
        message = re.sub(noise, "", message)
    message = re.sub(r'Parser key "(.*?)":', r"\1:", " ".join(message.split()))
    message = re.sub(_OPTIONAL, r": \1, or null, got \2", message)
    message = re.sub(r"<class '(\w+)'>", r"value of type \1", message)
    if missing := re.search(r"(.*arguments are required: )(.*)", message):
        written = {action.dest: action.option_strings[-1] for action in parser._actions if action.option_strings}
        return missing[1] + ", ".join(written.get(name, name) for name in missing[2].split(", "))
    for pattern in _CHOICES:
        message = re.sub(pattern, _choices, message)
    for pattern in _UNKNOWN:
        if unknown := re.search(pattern, message):
            shown = (action for action in parser._actions if action.help != SUPPRESS)
            options = [option for action in shown for option in action.option_strings]
            # What a config file names has no dashes before it.
            known = options if unknown["name"].startswith("-") else [option.lstrip("-") for option in options]
            return message + _meant(".".join(unknown.groupdict(default="").values()).strip("."), known)
    return re.sub(r"\.? Got value:", ", got", message)


def _meant(name: str, known: list[str]) -> str:
    """The end of the message on an unknown option."""
    dashes, _, argument = name.rpartition("trainer.")
    if argument and not dashes.strip("-"):
        from lit_mult.training.fitting import trainer_arguments

        arguments = trainer_arguments()
        if argument in arguments:
            field = arguments[argument]
            return f"; did you mean {dashes}{field.lstrip('-')}?" if field else ""
    return did_you_mean(name, known)


_OPTIONAL = r": Does not validate against .* Errors: - ((?:Expected|Input) .*?) - Expected .* Given value: (\S+)"
_CHOICES = (
    r"(?P<name>\S+): Expected a typing\.Literal\[(?P<choices>.*?)\]\. Got value: (?P<value>\S+)",
    r"argument (?P<name>\S+): invalid choice: '(?P<value>.*?)' \(choose from (?P<choices>.*)\)",
)
_UNKNOWN = (
    r"unrecognized arguments: (?P<name>[^\s=]+)",
    r"Group '(?P<group>.+?)' does not accept option '(?P<name>.+?)'",
    r"Option '(?P<name>.+?)' is not accepted",
)
"""How jsonargparse words what it does not know."""


def _choices(found: re.Match[str]) -> str:
    from lit_mult.registry import fault_of

    value, choices = found["value"], re.findall(r"'(.*?)'", found["choices"])
    hint = fault_of(value) or did_you_mean(value, choices)
    return f"{found['name']} = {value!r}: must be one of {', '.join(choices)}{hint}"


def add_run_config(parser: ArgumentParser) -> None:
    """Options for every field of a run config, and --config."""
    from lit_mult.config import RunConfig

    parser.add_argument("--config", action="config", help="YAML file with part of a run config")
    parser.add_class_arguments(RunConfig)


def add_json(parser: ArgumentParser, keys: str) -> None:
    """The option --json; `keys`: those of the object that it prints."""
    parser.add_argument("--json", action="store_true", help=f"print JSON, and nothing else: {keys}")


def add_retries(parser: ArgumentParser) -> None:
    """The option --retries."""
    from lit_mult.study.attempts import RETRIES

    parser.add_argument("--retries", type=int, default=RETRIES, help="deaths without progress that a cell is forgiven")


def vocab_size(config: RunConfig) -> int:
    """Size of the vocabulary, without preparing the data."""
    from lit_mult.data.tokenizers import bpe_size, load_tokenizer

    return bpe_size(config.data.tokenizer) or load_tokenizer(config.data.tokenizer).vocab_size


def read_run_config(namespace: dict[str, Any]) -> RunConfig:
    """The config from parsed options, with a preset's numbers and a pretrained folder's hash inlined."""
    from lit_mult.config import RunConfig
    from lit_mult.method.presets import inlined

    namespace.pop("config", None)
    config = inlined(RunConfig.from_dict(namespace))
    if config.model.pretrained is None:
        return config

    from lit_mult.hf.pretrained import pinned

    return pinned(config)


def print_report(folder: Path, style: StyleName = "paper", width: Width = "page") -> None:
    """Write the report of a folder; print its text, its path and, last, the answers to the study's questions."""
    from lit_mult.analysis.report import write_report

    made = write_report(folder, style, width)
    print(made.text)
    for warning in made.warnings:
        warn(warning)
    print(f"figures: {folder / 'figures'}/*.png, *.svg")
    print(f"report:  {folder / 'report.html'}, report.md")
    for number, answer in enumerate(made.answers):
        say(answer if number else f"\n{answer}", "bold")
