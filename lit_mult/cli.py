"""The command line: each command is one function; heavy imports wait until a command needs them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from lit_mult.errors import Interrupted, UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from lit_mult.config import RunConfig

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130

_PRESET_HELP = "preset file for the preset that the study names (NAME=FILE where it names several)"
_STORAGE_HELP = "Optuna storage shared by sweeps: sqlite:///FILE, postgresql://..., grpc://HOST:PORT or a journal file"


def fit(arguments: Sequence[str]) -> int:
    """Train one model and write its record."""
    parser = _parser("fit", fit)
    _add_run_config(parser)
    parser.add_argument("--out", type=str, required=True, help="folder of the run; an unfinished run in it goes on")
    what = "comma-separated names, for train.diagnostics: norms,outputs"
    parser.add_argument("--diagnostics", type=str, default=None, help=what)
    parser.add_argument("--every", type=int, default=None, help="for train.diagnostics_every")
    namespace = parser.parse_args(list(arguments)).as_dict()
    diagnostics, every = namespace.pop("diagnostics"), namespace.pop("every")
    if diagnostics is not None:
        namespace["train"]["diagnostics"] = diagnostics.split(",")
    if every is not None:
        namespace["train"]["diagnostics_every"] = every
    out, config = Path(namespace.pop("out")), _run_config(namespace)

    from lit_mult.training.folder import RunFolder
    from lit_mult.training.run import run

    finished_before = RunFolder(out).record.is_file()
    record = run(config, out)
    speed = f"{record.tokens:,} tokens at {record.tokens_per_second:,.0f} tokens/s"
    size = f"{record.parameters['total']:,} parameters, {speed}"
    if record.final_loss is None or record.final_bits_per_byte is None:
        print(f"diverged at step {record.steps} (validation loss at the start: {record.initial_loss}); {size}")
    else:
        quality = f"{record.final_loss:.4f} nats per token, {record.final_bits_per_byte:.4f} bits per byte"
        print(f"validation loss {record.initial_loss:.4f} -> {quality}; {size}")
    print(f"{'finished earlier: ' if finished_before else ''}{RunFolder(out).record}")
    if config.train.diagnostics:
        print(RunFolder(out).diagnostics)
    return 0


def parameters(arguments: Sequence[str]) -> int:
    """Print role, shape, multipliers, optimizer, lr, weight decay and init of every parameter of a run."""
    parser = _parser("parameters", parameters)
    _add_run_config(parser)
    config = _run_config(parser.parse_args(list(arguments)).as_dict())

    import torch

    from lit_mult.nn.llama import Llama
    from lit_mult.optim.groups import plan_parameters
    from lit_mult.parametrization.plan import plan_run

    plan = plan_run(config, _vocab_size(config))
    with torch.device("meta"):
        rows = plan_parameters(Llama(config.model, plan), plan)
    table = [("parameter", "role", "shape", "multipliers", "optimizer", "lr", "weight decay", "init")]
    for row in rows:
        shape = "x".join(map(str, row.parameter.shape)) or "1"
        numbers = (f"{row.lr:.4g}", f"{row.weight_decay:.4g}", row.init)
        table.append((row.name, row.role.value, shape, row.multipliers, row.optimizer, *numbers))
    _print_columns(table)
    return 0


def lint_placement(arguments: Sequence[str]) -> int:
    """List multipliers that can trade scale without changing the model; exit code 1 if decay does not hold it."""
    parser = _parser("lint-placement", lint_placement)
    _add_run_config(parser)
    named = bool(arguments) and not arguments[0].startswith("-")
    config = _run_config(parser.parse_args(["--config", *arguments] if named else list(arguments)).as_dict())

    from lit_mult.parametrization.redundancy import drifts, redundancies, table

    found = redundancies(config, _vocab_size(config))
    if not found:
        print("no redundant multipliers")
        return 0
    _print_columns(table(found))
    return FAILED if drifts(found) else 0


def brownian(arguments: Sequence[str]) -> int:
    """Compare the parameters of a run with pure noise under its optimizer, schedule and decay: trapped or free."""
    from jsonargparse.typing import PositiveFloat, PositiveInt

    parser = _parser("brownian", brownian)
    parser.add_argument("run", type=str, help="folder of a run, or of a cell of a study (results/STUDY/cells/CELL)")
    size = "longest side of a matrix that stands for one of Muon's; larger is slower (default: 256)"
    parser.add_argument("--max_dim", type=PositiveInt, default=None, help=size)
    within = "share by which a trapped parameter may differ from noise (default: 0.1)"
    parser.add_argument("--tolerance", type=PositiveFloat, default=None, help=within)
    namespace = parser.parse_args(list(arguments))
    folder = Path(namespace.run)

    from dataclasses import asdict

    import pandas as pd

    from lit_mult.analysis.tables import to_csv
    from lit_mult.optim.brownian import MAX_DIM
    from lit_mult.training.trapped import TOLERANCE, compare

    reference = compare(folder, namespace.max_dim or MAX_DIM, namespace.tolerance or TOLERANCE)
    table: list[tuple[str, ...]] = [("parameter", "role", "norm", "noise", "balance", "moved / noise", "verdict")]
    for row in reference.comparisons:
        numbers = (f"{row.norm:.4g}", f"{row.noise_norm:.4g}", f"{row.balance:.4g}", f"{row.ratio:.3f}")
        table.append((row.name, row.role, *numbers, row.verdict))
    _print_columns(table)
    motions = [
        {"parameters": names, "step": step, "norm": norm}
        for names, motion in reference.trajectories
        for step, norm in zip(motion.steps, motion.norm, strict=True)
    ]
    for name, rows in (("brownian", [asdict(row) for row in reference.comparisons]), ("brownian_motion", motions)):
        path = folder / f"{name}.csv"
        path.write_text(to_csv(pd.DataFrame(rows)))
        print(path)
    return 0


def coord_check(arguments: Sequence[str]) -> int:
    """Train a few steps at several widths and fit how sizes and updates depend on width; exit code 1 on a FAIL."""
    from jsonargparse.typing import PositiveInt

    parser = _parser("coord-check", coord_check)
    _add_run_config(parser)
    parser.add_argument(
        "--widths", type=str, default="32,64,128,256,512", help="values of model.d_model, three or more"
    )
    parser.add_argument("--steps", type=PositiveInt, default=10, help="optimizer steps at each width")
    parser.add_argument("--seeds", type=PositiveInt, default=3, help="number of seeds")
    parser.add_argument("--out", type=str, default=None, help="folder for tables (CSV) and figure (PNG)")
    namespace = parser.parse_args(list(arguments)).as_dict()
    widths = _widths(namespace.pop("widths"))
    steps, seeds, out = (namespace.pop(name) for name in ("steps", "seeds", "out"))
    config = _run_config(namespace)

    from dataclasses import asdict

    import pandas as pd

    from lit_mult.analysis.exponents import coordinate_check, exponents
    from lit_mult.analysis.style import save
    from lit_mult.analysis.tables import to_csv
    from lit_mult.parametrization.expectations import expected_exponent
    from lit_mult.training.coordinates import measure

    measured = []
    for row in measure(config, widths, range(config.seed, config.seed + seeds), steps):
        low, high = expected_exponent(config, row.kind, row.coordinate, row.role)
        measured.append(asdict(row) | {"low": low, "high": high})
    values = pd.DataFrame(measured)
    fits = exponents(values)
    table: list[tuple[str, ...]] = [("kind", "coordinate", "exponent", "95 % interval", "expected", "verdict")]
    for kind, coordinate, low, high, slope, slope_low, slope_high, verdict in fits.itertuples(index=False):
        expected = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        interval = f"[{slope_low:.2f}, {slope_high:.2f}]" if seeds > 1 else "1 seed: no interval"
        table.append((kind, coordinate, f"{slope:.2f}", interval, expected, verdict))
    _print_columns(table)
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "coordinates.csv").write_text(to_csv(values))
        (folder / "exponents.csv").write_text(to_csv(fits))
        (folder / "coordinates.png").write_bytes(save(coordinate_check(values, fits))["png"])
        print(folder)
    return FAILED if (fits["verdict"] == "FAIL").any() else 0


def _widths(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts) or len({int(part) for part in parts}) < 3:
        raise UserError(f"--widths {text}: must be three or more different whole numbers, joined by commas")
    return sorted({int(part) for part in parts})


def sweep(arguments: Sequence[str]) -> int:
    """Run the cells of a study that have no record yet, then write its report."""
    parser = _parser("sweep", sweep)
    parser.add_argument("study", type=str, help="study file, or the name of a shipped study")
    parser.add_argument("--out", type=str, default=None, help="results folder (default: results/NAME)")
    parser.add_argument("--preset", type=str, action="append", default=[], help=_PRESET_HELP)
    profile = "variant that the study file has, such as gpu (default: the file as it stands)"
    parser.add_argument("--profile", type=str, default=None, help=profile)
    workers = "cells at once (default: one for each GPU, or else CPU core; 0: in this process, one after the other)"
    parser.add_argument("--workers", type=int, default=None, help=workers)
    parser.add_argument("--storage", type=str, default=None, help=_STORAGE_HELP)
    parser.add_argument("--executor", type=Literal["local", "ray"], default="local", help="where the cells run")
    parser.add_argument("--address", type=str, default=None, help="Ray cluster; auto: the one that is running here")
    _add_retries(parser)
    parser.add_argument("--retry-failed", action="store_true", help="try cells that were given up once more")
    namespace = parser.parse_args(list(arguments))

    from lit_mult.study.files import load_study
    from lit_mult.study.sweep import sweep as run_study

    spec = load_study(namespace.study, namespace.preset, namespace.profile)
    out = Path(namespace.out or Path("results") / spec.name)
    options = ("storage", "executor", "address", "retries", "retry_failed")
    result = run_study(spec, out, namespace.workers, **{name: namespace[name] for name in options})
    if len(result.failures) < result.cells:
        _print_report(out)
    if result.failures:
        print(f"{len(result.failures)} cells failed; --retry-failed tries them again:", file=sys.stderr)
        for cell, reason in result.failures.items():
            print(f"  {cell}: {reason}", file=sys.stderr)
        return FAILED
    return 0


def status(arguments: Sequence[str]) -> int:
    """Say which cells of a study are waiting, running (where, since when), done, pruned, diverged or failed (why)."""
    parser = _parser("status", status)
    parser.add_argument("folder", type=str, help="results folder of a study")
    _add_retries(parser)
    namespace = parser.parse_args(list(arguments))

    from lit_mult.study.status import study_status

    for line in study_status(namespace.folder, namespace.retries).lines():
        print(line)
    return 0


def preset(arguments: Sequence[str]) -> int:
    """Take the best trials of a tuning study as a preset, with what they cost."""
    parser = _parser("preset", preset)
    parser.add_argument("folder", type=str, help="results folder of a tuning study")
    parser.add_argument("-o", "--out", type=str, required=True, help="preset file to write")
    parser.add_argument("--arm", type=str, default=None, help="arm to take them from, where several were tuned")
    namespace = parser.parse_args(list(arguments))

    from lit_mult.study.tuning import tuned_preset

    found = tuned_preset(Path(namespace.folder), namespace.arm)
    Path(namespace.out).write_text(found.to_yaml())
    for optimizer, part in found.optimizers.items():
        if part.tuning is not None:
            tuning = part.tuning
            default = "" if tuning.default_loss is None else f" (default preset {tuning.default_loss:.4f})"
            cost = f"{tuning.tokens:,} tokens, {tuning.seconds:,.0f} s"
            print(f"{optimizer}: {tuning.best_loss:.4f} nats per token{default} after {tuning.trials} trials, {cost}")
    print(namespace.out)
    return 0


def report(arguments: Sequence[str]) -> int:
    """Write tables, figures and report.md from the records in a folder."""
    parser = _parser("report", report)
    parser.add_argument("folder", type=str, help="results folder of a study, or folder of a run")
    parser.add_argument("--tensorboard", action="store_true", help="write the curves for TensorBoard too")
    namespace = parser.parse_args(list(arguments))
    folder = Path(namespace.folder)
    _print_report(folder)
    if namespace.tensorboard:
        from lit_mult.analysis.tensorboard import write_events

        print(f"curves:  tensorboard --logdir {write_events(folder)}")
    return 0


def evaluate(arguments: Sequence[str]) -> int:
    """Score a run, or the runs of a study, on benchmarks through lm-eval."""
    from jsonargparse.typing import NonNegativeInt, PositiveInt

    parser = _parser("evaluate", evaluate)
    parser.add_argument("path", type=str, help="folder of a run, or results folder of a study")
    tasks = "mini (the embedded benchmark, offline), paper (the seven of arXiv:2601.04890), or names of lm-eval tasks"
    parser.add_argument("--tasks", type=str, default="mini", help=tasks)
    parser.add_argument("--include_path", type=str, default=None, help="folder with lm-eval task files of your own")
    parser.add_argument("--best", action="store_true", help="of a study, every arm's best learning rate only")
    parser.add_argument("--along", action="store_true", help="checkpoints kept on the way too (train.keep_every)")
    shots = "examples in the prompt (default: what each task says)"
    parser.add_argument("--num_fewshot", type=NonNegativeInt, default=None, help=shots)
    parser.add_argument("--limit", type=PositiveInt, default=None, help="first items of each task only")
    length = "tokens that the model sees at once (default: data.seq_len of the run)"
    parser.add_argument("--max_length", type=PositiveInt, default=None, help=length)
    parser.add_argument(
        "--batch_size", type=PositiveInt, default=None, help="requests that go through the model together (64)"
    )
    parser.add_argument("--device", type=str, default=None, help="torch device (default: a GPU where there is one)")
    parser.add_argument("--log_samples", action="store_true", help="keep every prompt and answer")
    namespace = parser.parse_args(list(arguments)).as_dict()
    path, best, along = Path(namespace.pop("path")), namespace.pop("best"), namespace.pop("along")

    from lit_mult.downstream.evaluate import Options, evaluate_all
    from lit_mult.downstream.runs import find_runs, home
    from lit_mult.downstream.suites import load_suite

    runs = find_runs(path, best=best)
    suite = load_suite(namespace.pop("tasks"), namespace.pop("include_path"))
    given = {name: value for name, value in namespace.items() if value is not None}
    evaluate_all(runs, suite, Options(**given), along=along, say=lambda line: print(line, file=sys.stderr))
    _print_report(home(path))
    return 0


def tasks(arguments: Sequence[str]) -> int:
    """Write the embedded benchmark as task files that lm-eval reads."""
    parser = _parser("tasks", tasks)
    parser.add_argument("folder", type=str, help="folder to write; new or empty")
    namespace = parser.parse_args(list(arguments))

    from lit_mult.downstream.suites import write_mini

    print(f"mini ({write_mini(Path(namespace.folder))}): lm_eval --include_path {namespace.folder} --tasks mini ...")
    return 0


def export(arguments: Sequence[str]) -> int:
    """Write a trained model as a Hugging Face folder that transformers loads, multipliers folded in."""
    parser = _parser("export", export)
    parser.add_argument("run", type=str, help="folder of a run, or of a cell of a study (results/STUDY/cells/CELL)")
    parser.add_argument("out", type=str, help="folder to make")
    parser.add_argument("--dtype", type=Literal["float32", "bfloat16"], default="float32", help="type of the weights")
    kept = "optimizer step of a checkpoint that was kept on the way (default: the end of the run)"
    parser.add_argument("--checkpoint", type=int, default=None, help=kept)
    namespace = parser.parse_args(list(arguments))

    from lit_mult.hf.export import export as export_model
    from lit_mult.training.folder import RunFolder
    from lit_mult.training.trained import checkpoint_at, load_trained

    run = Path(namespace.run)
    trained = load_trained(run, None if namespace.checkpoint is None else checkpoint_at(run, namespace.checkpoint))
    out, record = Path(namespace.out), RunFolder(run).find_record()
    check = export_model(
        trained.model, trained.config, trained.corpus, trained.step, out, dtype=namespace.dtype, record=record
    )
    same = f"the same likeliest token at {check.same_argmax:.2%} of {check.tokens:,}"
    print(f"logits differ from the trained model's by at most {check.largest_difference:.1e}; {same}")
    print(out)
    return 0


def import_(arguments: Sequence[str]) -> int:
    """Write the part of a run config with which `fit` starts from a Hugging Face Llama."""
    parser = _parser("import", import_)
    parser.add_argument("folder", type=str, help="Hugging Face folder of a Llama: config.json and safetensors")
    parser.add_argument("out", type=str, help="YAML file to write, for fit --config")
    namespace = parser.parse_args(list(arguments))

    from lit_mult.hf.pretrained import write_config_part

    write_config_part(Path(namespace.folder), Path(namespace.out))
    print(namespace.out)
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "fit": fit,
    "sweep": sweep,
    "status": status,
    "report": report,
    "evaluate": evaluate,
    "tasks": tasks,
    "preset": preset,
    "parameters": parameters,
    "lint-placement": lint_placement,
    "brownian": brownian,
    "coord-check": coord_check,
    "export": export,
    "import": import_,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; bad input gives one line on stderr and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print("usage: lit-mult COMMAND [options]\n\nStudy learnable multipliers in language-model pretraining.\n")
        for command, function in COMMANDS.items():
            print(f"  {command:16}{function.__doc__}")
        print("\n`lit-mult COMMAND --help` lists the options of a command.")
        return 0
    if name == "--version":
        from importlib.metadata import version

        print(version("lit-mult"))
        return 0
    if name not in COMMANDS:
        print(f"lit-mult: {name}: no such command; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return BAD_INPUT
    try:
        return COMMANDS[name](arguments[1:])
    except UserError as error:
        print(f"lit-mult {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        print(f"lit-mult {name}: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return BAD_INPUT
    except Interrupted as stopped:
        print(f"lit-mult {name}: {stopped}", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print(f"lit-mult {name}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _print_report(folder: Path) -> None:
    from lit_mult.analysis.report import write_report

    made = write_report(folder)
    print(made.text)
    for warning in made.warnings:
        print(f"warning: {warning}")
    print(f"figures: {folder / 'figures'}/*.png, *.svg")
    print(f"report:  {folder / 'report.md'}")


def _parser(name: str, command: Callable[..., Any]) -> ArgumentParser:
    import jsonargparse

    class Parser(jsonargparse.ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise UserError(_one_line(message))

    return Parser(prog=f"lit-mult {name}", description=command.__doc__)


def _one_line(message: str) -> str:
    """The parser's complaint without pydantic's boilerplate."""
    for noise in (r"\[type=.*?\]\s", r"For further information visit \S+", r"\d+ validation errors? for \S+"):
        message = re.sub(noise, "", message)
    message = re.sub(r'Parser key "(.*?)":', r"\1:", " ".join(message.split()))
    return message.replace("typing.Literal", "one of ").replace(". Got value:", ", got")


def _add_run_config(parser: ArgumentParser) -> None:
    from lit_mult.config import RunConfig

    parser.add_argument("--config", action="config", help="YAML file with part of a run config")
    parser.add_class_arguments(RunConfig)


def _add_retries(parser: ArgumentParser) -> None:
    from lit_mult.study.attempts import RETRIES

    parser.add_argument("--retries", type=int, default=RETRIES, help="deaths without progress that a cell is forgiven")


def _print_columns(table: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _vocab_size(config: RunConfig) -> int:
    from lit_mult.data.tokenizers import bpe_size, load_tokenizer

    return bpe_size(config.data.tokenizer) or load_tokenizer(config.data.tokenizer).vocab_size


def _run_config(namespace: dict[str, Any]) -> RunConfig:
    from lit_mult.config import RunConfig
    from lit_mult.parametrization.presets import inlined

    namespace.pop("config", None)
    config = inlined(RunConfig.from_dict(namespace))
    if config.model.pretrained is None:
        return config

    from lit_mult.hf.pretrained import pinned

    return pinned(config)
