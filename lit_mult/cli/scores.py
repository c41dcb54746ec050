"""Commands for downstream scores."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lit_mult.cli.parsing import make_parser, print_report


def evaluate(arguments: Sequence[str]) -> int:
    """Score a run, or the runs of a study, on benchmarks through lm-eval."""
    from jsonargparse.typing import NonNegativeInt, PositiveInt

    parser = make_parser("evaluate", evaluate)
    parser.add_argument("path", type=str, help="folder of a run, or results folder of a study")
    tasks = "mini (the embedded benchmark, offline), paper (the seven of arXiv:2601.04890), or names of lm-eval tasks"
    parser.add_argument("--tasks", type=str, default="mini", help=tasks)
    parser.add_argument("--include_path", type=str, default=None, help="folder with lm-eval task files of your own")
    parser.add_argument("--best", action="store_true", help="of a study, every arm's best learning rate only")
    parser.add_argument("--along", action="store_true", help="checkpoints kept on the way too (train.keep_every)")
    shots = "examples in the prompt (default: as each task sets them)"
    parser.add_argument("--num_fewshot", type=NonNegativeInt, default=None, help=shots)
    parser.add_argument("--limit", type=PositiveInt, default=None, help="first items of each task only")
    length = "context length in tokens (default: data.seq_len of the run)"
    parser.add_argument("--max_length", type=PositiveInt, default=None, help=length)
    parser.add_argument(
        "--batch_size", type=PositiveInt, default=None, help="requests that go through the model together (64)"
    )
    parser.add_argument("--device", type=str, default=None, help="torch device (default: a GPU where there is one)")
    parser.add_argument("--log_samples", action="store_true", help="keep every prompt and answer")
    namespace = parser.parse_args(list(arguments)).as_dict()
    path, best, along = Path(namespace.pop("path")), namespace.pop("best"), namespace.pop("along")

    from lit_mult.evaluation.evaluate import Options, evaluate_all, find_runs
    from lit_mult.evaluation.suites import load_suite
    from lit_mult.layout import RunPaths

    runs = find_runs(path, best=best)
    suite = load_suite(namespace.pop("tasks"), namespace.pop("include_path"))
    given = {name: value for name, value in namespace.items() if value is not None}
    evaluate_all(runs, suite, Options(**given), along=along, report=lambda line: print(line, file=sys.stderr))
    study = RunPaths(path).study  # of a cell, the report of its study
    print_report(path if study is None else study.path)
    return 0


def tasks(arguments: Sequence[str]) -> int:
    """Write the embedded benchmark as task files that lm-eval reads."""
    parser = make_parser("tasks", tasks)
    parser.add_argument("folder", type=str, help="folder to write; new or empty")
    namespace = parser.parse_args(list(arguments))

    from lit_mult.evaluation.suites import write_mini

    print(f"mini ({write_mini(Path(namespace.folder))}): lm_eval --include_path {namespace.folder} --tasks mini ...")
    return 0
