"""Shared by commands: parsers, the run config from flags, exit codes, printing of tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lit_mult.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from lit_mult.config import RunConfig

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


def make_parser(name: str, command: Callable[..., Any]) -> ArgumentParser:
    """A parser for a command, which raises a one-line `UserError` instead of exiting."""
    import jsonargparse

    class Parser(jsonargparse.ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise UserError(_one_line(message))

    return Parser(prog=f"lit-mult {name}", description=command.__doc__)


def _one_line(message: str) -> str:
    """The parser's message without pydantic's boilerplate."""
    for noise in (r"\[type=.*?\]\s", r"For further information visit \S+", r"\d+ validation errors? for \S+"):
        message = re.sub(noise, "", message)
    message = re.sub(r'Parser key "(.*?)":', r"\1:", " ".join(message.split()))
    return message.replace("typing.Literal", "one of ").replace(". Got value:", ", got")


def add_run_config(parser: ArgumentParser) -> None:
    """Options for every field of a run config, and --config."""
    from lit_mult.config import RunConfig

    parser.add_argument("--config", action="config", help="YAML file with part of a run config")
    parser.add_class_arguments(RunConfig)


def add_retries(parser: ArgumentParser) -> None:
    """The option --retries."""
    from lit_mult.study.attempts import RETRIES

    parser.add_argument("--retries", type=int, default=RETRIES, help="deaths without progress that a cell is forgiven")


def print_columns(table: Sequence[Sequence[str]]) -> None:
    """Print rows of cells, aligned."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


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


def print_report(folder: Path) -> None:
    """Write the report of a folder; print its text, its path and, last, the answers to the study's questions."""
    from lit_mult.analysis.report import write_report

    made = write_report(folder)
    print(made.text)
    for warning in made.warnings:
        print(f"warning: {warning}")
    print(f"figures: {folder / 'figures'}/*.png, *.svg")
    print(f"report:  {folder / 'report.html'}, report.md")
    if made.answers:
        print("", *made.answers, sep="\n")
