"""Commands for one run: training, its plan, export to and import from Hugging Face."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_mult.cli.next_steps import after_fit
from lit_mult.cli.parsing import add_json, add_run_config, make_parser, read_run_config, vocab_size
from lit_mult.cli.printing import print_columns, print_json, print_next, say
from lit_mult.layout import RunPaths

if TYPE_CHECKING:
    from lit_mult.optim.groups import ParameterPlan
    from lit_mult.schema import MatrixRegime


def fit(arguments: Sequence[str]) -> int:
    """Train one model and write its record."""
    parser = make_parser("fit", fit)
    add_run_config(parser)
    parser.add_argument("--out", type=str, required=True, help="folder of the run; an unfinished run in it is resumed")
    names = "comma-separated names, for train.diagnostics: norms,outputs"
    parser.add_argument("--diagnostics", type=str, default=None, help=names)
    parser.add_argument("--every", type=int, default=None, help="for train.diagnostics_every")
    namespace = parser.parse_args(list(arguments)).as_dict()
    diagnostics, every = namespace.pop("diagnostics"), namespace.pop("every")
    if diagnostics is not None:
        namespace["train"]["diagnostics"] = diagnostics.split(",")
    if every is not None:
        namespace["train"]["diagnostics_every"] = every
    folder, config = RunPaths(Path(namespace.pop("out"))), read_run_config(namespace)

    from lit_mult.training.run import run

    finished_before = folder.record.is_file()
    record = run(config, folder.path)
    speed = f"{record.tokens:,} tokens at {record.tokens_per_second:,.0f} tokens/s"
    size = f"{record.parameters['total']:,} parameters, {speed}"
    if record.final_loss is None or record.final_bits_per_byte is None:
        print(f"diverged at step {record.steps} (validation loss at the start: {record.initial_loss}); {size}")
    else:
        quality = f"{record.final_loss:.4f} nats per token, {record.final_bits_per_byte:.4f} bits per byte"
        say(f"validation loss {record.initial_loss:.4f} -> {quality}; {size}", "bold")
    print(f"{'finished earlier: ' if finished_before else ''}{folder.record}")
    if config.train.diagnostics:
        print(folder.diagnostics)
    print_next(list(after_fit(record, str(folder.path))))
    return 0


def parameters(arguments: Sequence[str]) -> int:
    """Print role, shape, multipliers, optimizer, lr, weight decay, init and time to balance of a run's parameters."""
    parser = make_parser("parameters", parameters)
    add_run_config(parser)
    add_json(parser, "parameters (a list, with every digit) and shortfall (the line on the balance, or null)")
    namespace = parser.parse_args(list(arguments)).as_dict()
    as_json = namespace.pop("json")
    config = read_run_config(namespace)

    import torch

    from lit_mult.method.plan import plan_run
    from lit_mult.method.regime import matrix_regimes, shortfall
    from lit_mult.nn.llama import Llama
    from lit_mult.optim.groups import plan_parameters

    plan = plan_run(config, vocab_size(config))
    with torch.device("meta"):
        rows = plan_parameters(Llama(config.model, plan), plan)
    regimes = matrix_regimes(config, plan)
    short = shortfall(config, regimes)
    if as_json:
        print_json({"parameters": [_as_dict(row, regimes.get(row.role)) for row in rows], "shortfall": short or None})
        return 0
    own_eps = any(row.eps is not None for row in rows)
    names = ("parameter", "role", "shape", "multipliers", "optimizer", "lr", "weight decay", "init")
    table = [(*names, "equilibrium (steps)", "decay times", *["eps"] * own_eps)]
    for row in rows:
        shape = "x".join(map(str, row.parameter.shape)) or "1"
        rule = "" if row.decay_rule == "plain" else f" {row.decay_rule}"
        numbers = (f"{row.lr:.4g}", f"{row.weight_decay:.4g}{rule}", row.init)
        regime = regimes.get(row.role)
        time, times = (regime.equilibrium_time, regime.decay_times) if regime else (None, None)
        balance = ("-" if time is None else f"{time:,.0f}", "-" if times is None else f"{times:.3g}")
        eps = ("-" if row.eps is None else f"{row.eps:.4g}",) if own_eps else ()
        table.append((row.name, row.role.value, shape, row.multipliers, row.optimizer, *numbers, *balance, *eps))
    print_columns(table)
    if short:
        say(short, "yellow")
    return 0


def _as_dict(row: ParameterPlan, regime: MatrixRegime | None) -> dict[str, Any]:
    """A parameter as plain values; null where the table has a dash."""
    return {
        "name": row.name,
        "role": row.role.value,
        "shape": list(row.parameter.shape),
        "multipliers": row.multipliers,
        "optimizer": row.optimizer,
        "lr": row.lr,
        "weight_decay": row.weight_decay,
        "decay_rule": row.decay_rule,
        "init": row.init,
        "equilibrium_steps": regime.equilibrium_time if regime else None,
        "decay_times": regime.decay_times if regime else None,
        "eps": row.eps,
    }


def export(arguments: Sequence[str]) -> int:
    """Write a trained model as a Hugging Face folder that transformers loads, multipliers folded in."""
    parser = make_parser("export", export)
    parser.add_argument("run", type=str, help="folder of a run, or of a cell of a study (results/STUDY/cells/CELL)")
    parser.add_argument("out", type=str, help="folder to make")
    parser.add_argument("--dtype", type=Literal["float32", "bfloat16"], default="float32", help="type of the weights")
    step = "optimizer step of a kept checkpoint (train.keep_every; default: the end of the run)"
    parser.add_argument("--checkpoint", type=int, default=None, help=step)
    namespace = parser.parse_args(list(arguments))

    from lit_mult.hf.export import export as export_model
    from lit_mult.training.folder import RunFolder
    from lit_mult.training.trained import checkpoint_at, load_trained

    run, out = Path(namespace.run), Path(namespace.out)
    trained = load_trained(run, None if namespace.checkpoint is None else checkpoint_at(run, namespace.checkpoint))
    record = RunFolder(run).find_record()
    check = export_model(
        trained.model, trained.config, trained.corpus, trained.step, out, dtype=namespace.dtype, record=record
    )
    same = f"the same likeliest token at {check.same_argmax:.2%} of {check.tokens:,}"
    print(f"logits differ from the trained model's by at most {check.largest_difference:.1e}; {same}")
    print(out)
    return 0


def import_(arguments: Sequence[str]) -> int:
    """Write the part of a run config with which `fit` starts from a Hugging Face Llama or Qwen3."""
    parser = make_parser("import", import_)
    parser.add_argument("folder", type=str, help="Hugging Face folder of a Llama or Qwen3: config.json and safetensors")
    parser.add_argument("out", type=str, help="YAML file to write, for fit --config")
    namespace = parser.parse_args(list(arguments))

    from lit_mult.hf.pretrained import write_config_part

    write_config_part(Path(namespace.folder), Path(namespace.out))
    print(namespace.out)
    return 0
