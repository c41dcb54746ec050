"""Commands for checks: redundancy of a placement, noise, coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lit_mult.atomic import write_text
from lit_mult.cli.parsing import FAILED, add_json, add_run_config, make_parser, read_run_config, vocab_size
from lit_mult.cli.printing import print_columns, print_json
from lit_mult.errors import UserError


def lint_placement(arguments: Sequence[str]) -> int:
    """List multipliers that can trade scale without changing the model; exit code 1 if decay does not hold it."""
    parser = make_parser("lint-placement", lint_placement)
    add_run_config(parser)
    named = bool(arguments) and not arguments[0].startswith("-")
    config = read_run_config(parser.parse_args(["--config", *arguments] if named else list(arguments)).as_dict())

    from lit_mult.method.redundancy import drifts, redundancies, table

    found = redundancies(config, vocab_size(config))
    if not found:
        print("no redundant multipliers")
        return 0
    print_columns(table(found))
    return FAILED if drifts(found) else 0


def brownian(arguments: Sequence[str]) -> int:
    """Compare the parameters of a run with pure noise under its optimizer, schedule and decay: trapped or free."""
    from jsonargparse.typing import PositiveFloat, PositiveInt

    parser = make_parser("brownian", brownian)
    parser.add_argument("run", type=str, help="folder of a run, or of a cell of a study (results/STUDY/cells/CELL)")
    size = "longest side of a matrix that stands for one of Muon's; larger is slower (default: 256)"
    parser.add_argument("--max_dim", type=PositiveInt, default=None, help=size)
    within = "share by which a trapped parameter may differ from noise (default: 0.1)"
    parser.add_argument("--tolerance", type=PositiveFloat, default=None, help=within)
    namespace = parser.parse_args(list(arguments))
    folder = Path(namespace.run)

    from dataclasses import asdict

    from lit_mult.diagnostics.brownian import MAX_DIM
    from lit_mult.diagnostics.noise_band import TOLERANCE
    from lit_mult.diagnostics.trapped import compare, references, trajectories
    from lit_mult.training.module import make_module
    from lit_mult.training.trained import load_trained

    trained = load_trained(folder)
    start = make_module(trained.config, trained.corpus.vocab_size).model
    found = references(start, trained.model, trained.config, trained.step, namespace.max_dim or MAX_DIM)
    comparisons = [compare(reference, namespace.tolerance or TOLERANCE) for reference in found]
    table = [("parameter", "role", "norm", "noise", "balance", "moved / noise", "verdict")]
    for row in comparisons:
        numbers = (f"{row.norm:.4g}", f"{row.noise_norm:.4g}", f"{row.balance:.4g}", f"{row.ratio:.3f}")
        table.append((row.name, row.role, *numbers, row.verdict))
    print_columns(table)
    print(_write_csv(folder / "brownian.csv", [asdict(row) for row in comparisons]))
    print(_write_csv(folder / "brownian_motion.csv", trajectories(found)))
    return 0


def coord_check(arguments: Sequence[str]) -> int:
    """Train a few steps at several widths or depths, fit how sizes and updates depend on it; exit code 1 on a FAIL."""
    from jsonargparse.typing import PositiveInt

    parser = make_parser("coord-check", coord_check)
    add_run_config(parser)
    several = f"values of model.d_model, three or more (default: {_WIDTHS})"
    parser.add_argument("--widths", type=str, default=None, help=several)
    depths = "values of model.n_layers, three or more, such as 2,4,8,16: the check over depth"
    parser.add_argument("--depths", type=str, default=None, help=depths)
    parser.add_argument("--steps", type=PositiveInt, default=10, help="optimizer steps at each width or depth")
    parser.add_argument("--seeds", type=PositiveInt, default=3, help="number of seeds")
    parser.add_argument("--out", type=str, default=None, help="folder for tables (CSV) and figure (PNG)")
    add_json(parser, "size (width or depth), sizes, steps, seeds, exponents (with expected low and high, and verdict)")
    namespace = parser.parse_args(list(arguments)).as_dict()
    as_json = namespace.pop("json")
    widths, depths = namespace.pop("widths"), namespace.pop("depths")
    if widths is not None and depths is not None:
        raise UserError(f"--depths {depths}: must be left out with --widths; check one after the other")
    sizes = _sizes("--widths", widths or _WIDTHS) if depths is None else _sizes("--depths", depths)
    steps, seeds, out = (namespace.pop(name) for name in ("steps", "seeds", "out"))
    config = read_run_config(namespace)

    from dataclasses import asdict

    import pandas as pd

    from lit_mult.analysis.drawing import save
    from lit_mult.analysis.exponents import coordinate_check, exponents
    from lit_mult.diagnostics.coordinates import measure
    from lit_mult.method.expectations import depth_exponent, expected_exponent
    from lit_mult.training.module import make_module

    size: Literal["width", "depth"] = "width" if depths is None else "depth"
    field: Literal["model.d_model", "model.n_layers"] = "model.d_model" if depths is None else "model.n_layers"
    expected_of = expected_exponent if depths is None else depth_exponent
    measured = []
    for row in measure(config, field, sizes, range(config.seed, config.seed + seeds), steps, make_module):
        low, high = expected_of(config, row.kind, row.coordinate, row.role)
        measured.append(asdict(row) | {"low": low, "high": high})
    values = pd.DataFrame(measured).rename(columns={"size": size})
    fits = exponents(values, size)
    if out is not None:
        folder = Path(out)
        _write_csv(folder / "coordinates.csv", values)
        _write_csv(folder / "exponents.csv", fits)
        (folder / "coordinates.png").write_bytes(save(coordinate_check(values, fits, size))["png"])
    if as_json:
        of_check = {"size": size, "sizes": sizes, "steps": steps, "seeds": seeds}
        print_json(of_check | {"exponents": fits.to_dict(orient="records")})
    else:
        print_columns(_table(fits, seeds))
        if out is not None:
            print(Path(out))
    return FAILED if (fits["verdict"] == "FAIL").any() else 0


def _table(fits: Any, seeds: int) -> list[tuple[str, ...]]:
    """The DataFrame of `exponents`, for people."""
    table: list[tuple[str, ...]] = [("kind", "coordinate", "exponent", "95 % interval", "expected", "verdict")]
    for kind, coordinate, low, high, slope, slope_low, slope_high, verdict in fits.itertuples(index=False):
        expected = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        interval = f"[{slope_low:.2f}, {slope_high:.2f}]" if seeds > 1 else "1 seed: no interval"
        table.append((kind, coordinate, f"{slope:.2f}", interval, expected, verdict))
    return table


def _write_csv(path: Path, rows: Any) -> Path:
    """Write a DataFrame, or rows for one."""
    import pandas as pd

    from lit_mult.analysis.tables import to_csv

    write_text(path, to_csv(pd.DataFrame(rows)))
    return path


_WIDTHS = "32,64,128,256,512"


def _sizes(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts) or len({int(part) for part in parts}) < 3:
        raise UserError(f"{option} {text}: must be three or more different whole numbers, joined by commas")
    return sorted({int(part) for part in parts})
