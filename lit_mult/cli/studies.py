"""Commands for studies."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import get_args

from lit_mult import atomic
from lit_mult.cli.next_steps import after_sweep
from lit_mult.cli.parsing import FAILED, add_json, add_retries, make_parser, print_report
from lit_mult.cli.printing import print_json, print_next, say, warn

_PRESET_HELP = "preset file for the preset that the study names (NAME=FILE where it names several)"
_STORAGE_HELP = "Optuna storage shared by sweeps: sqlite:///FILE, postgresql://..., grpc://HOST:PORT or a journal file"


def sweep(arguments: Sequence[str]) -> int:
    """Run the cells of a study that have no record yet, then write its report."""
    from lit_mult.study.executors import names as executor_names

    parser = make_parser("sweep", sweep)
    parser.add_argument("study", type=str, help="study file, or the name of a shipped study")
    parser.add_argument("--out", type=str, default=None, help="results folder (default: results/NAME)")
    parser.add_argument("--preset", type=str, action="append", default=[], help=_PRESET_HELP)
    profile = "variant that the study file has, such as gpu (default: the file as it stands)"
    parser.add_argument("--profile", type=str, default=None, help=profile)
    workers = "cells at once (default: one for each GPU, or else CPU core; 0: in this process, one after the other)"
    parser.add_argument("--workers", type=int, default=None, help=workers)
    parser.add_argument("--storage", type=str, default=None, help=_STORAGE_HELP)
    executors = executor_names()
    parser.add_argument("--executor", choices=executors, default="local", help="where the cells run")
    parser.add_argument("--address", type=str, default=None, help="Ray cluster; auto: the one that is running here")
    vectorize = "most cells that a worker trains together as one model: auto (what fits on a GPU), off or a number"
    parser.add_argument("--vectorize", type=str, default="auto", help=vectorize)
    add_retries(parser)
    parser.add_argument("--retry-failed", action="store_true", help="try cells that were given up once more")
    namespace = parser.parse_args(list(arguments))

    from lit_mult.study.files import load_study
    from lit_mult.study.sweep import sweep as run_study

    spec = load_study(namespace.study, namespace.preset, namespace.profile)
    out = Path(namespace.out or Path("results") / spec.name)
    for one, other in spec.same_arms():
        remedy = "for the standard parametrization set parametrization.rule: standard"
        warn(f"arms {one} and {other} train the same models: `fixed` without a preset is `none`; {remedy}")
    options = ("storage", "executor", "address", "retries", "retry_failed", "vectorize")
    result = run_study(spec, out, namespace.workers, **{name: namespace[name] for name in options})
    if len(result.failures) < result.cells:
        print_report(out)
    if result.failures:
        say(f"{len(result.failures)} cells failed; --retry-failed tries them again:", "red", stderr=True)
        for cell, reason in result.failures.items():
            say(f"  {cell}: {reason}", stderr=True)
        return FAILED
    print_next(list(after_sweep(spec, str(out))))
    return 0


def status(arguments: Sequence[str]) -> int:
    """Show which cells of a study are waiting, running (where, since when), done, pruned, diverged or failed (why)."""
    parser = make_parser("status", status)
    parser.add_argument("folder", type=str, help="results folder of a study")
    add_retries(parser)
    keys = "study, cells, waiting, ended (by status), running, interrupted (with step), failed (why), damaged (records)"
    add_json(parser, f"{keys}, sweeps")
    namespace = parser.parse_args(list(arguments))

    from lit_mult.study.status import study_status

    found = study_status(namespace.folder, namespace.retries)
    if namespace.json:
        print_json(found.to_dict())
        return 0
    for line in found.lines():
        print(line)
    return 0


def watch(arguments: Sequence[str]) -> int:
    """Serve the report of a study that runs as a page that keeps itself up to date; Ctrl-C ends it."""
    parser = make_parser("watch", watch)
    parser.add_argument("folder", type=str, help="results folder of a study")
    parser.add_argument("--port", type=int, default=0, help="port on this machine (default: a free one)")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    add_retries(parser)
    namespace = parser.parse_args(list(arguments))

    from lit_mult.study.watch import Server

    with Server(namespace.folder, namespace.port, namespace.retries) as server, suppress(KeyboardInterrupt):
        print(server.address, flush=True)
        if namespace.open:
            import webbrowser

            webbrowser.open(server.address)
        server.wait()
    return 0


def preset(arguments: Sequence[str]) -> int:
    """Take the best trials of a tuning study as a preset, with what they cost."""
    parser = make_parser("preset", preset)
    parser.add_argument("folder", type=str, help="results folder of a tuning study")
    parser.add_argument("-o", "--out", type=str, required=True, help="preset file to write")
    parser.add_argument("--arm", type=str, default=None, help="arm to take them from, where several were tuned")
    namespace = parser.parse_args(list(arguments))

    from lit_mult.study.tuning import tuned_preset

    found = tuned_preset(Path(namespace.folder), namespace.arm)
    atomic.write_text(Path(namespace.out), found.to_yaml())
    for optimizer, part in found.optimizers.items():
        if part.tuning is not None:
            tuning = part.tuning
            default = "" if tuning.default_loss is None else f" (default preset {tuning.default_loss:.4f})"
            cost = f"{tuning.tokens:,} tokens, {tuning.seconds:,.0f} s"
            print(f"{optimizer}: {tuning.best_loss:.4f} nats per token{default} after {tuning.trials} trials, {cost}")
    print(namespace.out)
    return 0


def compare(arguments: Sequence[str]) -> int:
    """Put arms, runs or studies side by side: differences, speed-up, cost."""
    parser = make_parser("compare", compare)
    sides = (
        "FOLDER[:ARM][@FIELD=VALUE,...], two or more, as in results/pays:vectors@optimizer=muon; the first is the base"
    )
    parser.add_argument("sides", type=str, nargs="+", help=sides)
    parser.add_argument("--markdown", action="store_true", help="print a page in Markdown")
    parser.add_argument("--json", action="store_true", help="print all tables with every digit")
    parser.add_argument("--html", type=str, default=None, help="write an interactive page to this file")
    namespace = parser.parse_args(list(arguments))

    from lit_mult.analysis.compare import compare as findings_of
    from lit_mult.analysis.compare import to_html, to_json, to_markdown

    found = findings_of(namespace.sides)
    if namespace.html is not None:
        atomic.write_text(Path(namespace.html), to_html(found, namespace.sides))
    if namespace.json or namespace.markdown:
        print(to_json(found) if namespace.json else to_markdown(found, namespace.sides))
        return 0
    print(found.text)
    for warning in found.warnings:
        warn(warning)
    for lines in found.statements.values():
        print("", *lines, sep="\n")
    if namespace.html is not None:
        print(f"\npage: {namespace.html}")
    return 0


def report(arguments: Sequence[str]) -> int:
    """Write tables, figures, report.md and report.html from the records in a folder."""
    from lit_mult.analysis.styles import StyleName, Width

    parser = make_parser("report", report)
    parser.add_argument("folder", type=str, help="results folder of a study, or folder of a run")
    parser.add_argument("--style", choices=get_args(StyleName), default="paper", help="what figures are for")
    width = "width of figures: that of a page, or of one of its two columns"
    parser.add_argument("--width", choices=get_args(Width), default="page", help=width)
    parser.add_argument("--tensorboard", action="store_true", help="write the curves for TensorBoard too")
    namespace = parser.parse_args(list(arguments))
    folder = Path(namespace.folder)
    print_report(folder, namespace.style, namespace.width)
    if namespace.tensorboard:
        from lit_mult.analysis.tensorboard import write_events

        print(f"curves:  tensorboard --logdir {write_events(folder)}")
    return 0
