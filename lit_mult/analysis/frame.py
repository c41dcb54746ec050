"""From run records to one table, a row per run. Loss curves are read separately, on demand."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from lit_mult.analysis.balance import balance_columns
from lit_mult.errors import UserError
from lit_mult.layout import StudyPaths, find_records
from lit_mult.registry.kinds import KINDS
from lit_mult.registry.optimizers import OPTIMIZERS
from lit_mult.schema import SCHEMA_VERSION, RunRecord

_WIDTH, _LR, _SEED, _OPTIMIZER = "model.d_model", "optim.lr", "seed", "optimizer"
_COPIED: tuple[str, ...] = ("config_hash", "git_commit", "device", "corpus_hash", "steps", "tokens", "wall_seconds")
_COPIED += ("tokens_per_second", "initial_loss", "best_loss")


def load_records(folder: Path | str, damaged: Callable[[str], None] | None = None) -> pd.DataFrame:
    """One row per run, with every scalar of its record and one column per factor (dotted, as in `model.d_model`).

    Columns of the analysis: `arm`; `setting`, the scientific factors other than the width, such as "AdamW";
    `variant`, the same without the optimizer; `label`, arm and setting, which names a *line* of the analysis;
    `nuisance`, the nuisance factors other than the learning rate; `reference`, True for an arm run at one learning
    rate while others were swept; `added`, True for a run at a learning rate outside the planned grid; `refines`, for
    one of a seed that was added for precision; `judged`, for one of a seed that judges and chose nothing;
    `factors`, the scientific factors as JSON. Losses are in nats per token; `final_loss` is NaN for a diverged or
    pruned run; `planned_tokens` is the budget of a run, which these do not use up. A run outside a study has its kind
    of multipliers as arm and its optimizer as setting. Rows are ordered by arm (references, then from no multipliers to
    vectors), setting, width, seed and learning rate.

    Args:
        folder: of a study or a run.
        damaged: called with what is wrong with a damaged record, which is left out then.

    Raises:
        UserError: there are no records, two are of the same cell, or one is damaged and `damaged` is None.
    """
    folder = Path(folder)
    paths = find_records(folder)
    if not paths:
        raise UserError(f"{folder}: no run records here; give the folder of a finished run, or of a study with records")
    table, seen = [], dict[tuple[str, str], Path]()
    for path in paths:
        try:
            record = _read_record(path)
            with _damage_named(path):
                row = _flat(record, path.relative_to(folder).parent.as_posix()) | {"path": str(path)}
        except UserError as error:
            if damaged is None:
                raise
            damaged(str(error))
            continue
        cell = (row["study"], row["cell"])
        if cell in seen:
            raise UserError(f"{seen[cell]} and {path}: two records of cell {cell[1]}; move one of them away")
        seen[cell] = path
        table.append(row)
    if not table:
        raise UserError(f"{folder}: no run record that is whole")
    return _ordered(pd.DataFrame(table))


def frame_of(records: Iterable[RunRecord]) -> pd.DataFrame:
    """The rows of `load_records`, of records in memory. All are cells of one study."""
    flat = [_flat(record.model_dump(mode="json"), "") for record in records]
    return _ordered(pd.DataFrame(flat))


def load_curves(runs: pd.DataFrame) -> pd.DataFrame:
    """Loss curves of the given rows of `load_records`, long: path, label, d_model, lr, seed, split, step, loss.

    `split` is "train" (mean of the steps since the point before) or "val"; losses in nats per token.

    Raises:
        UserError: a record has gone or is damaged.
    """
    parts = []
    for path in runs["path"]:
        record = _read_record(Path(path))
        for split in ("train", "val"):
            with _damage_named(path):
                part = pd.DataFrame(record[f"{split}_curve"], columns=["step", "loss"])
            parts.append(part.assign(path=path, split=split))
    named = runs[["path", "label", "d_model", "lr", "seed"]]
    return named.merge(pd.concat(parts), on="path") if parts else named.assign(split="", step=0, loss=math.nan)


def best_rates(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of each arm, setting and width at the rate (lr and other nuisance values) of lowest mean final loss.

    The mean is over seeds. A rate counts only with the full number of seeds of its point, none of which diverged or was
    pruned: no rate is chosen for a lucky seed. Points without such a rate have no rows. Where seeds judge, the rate is
    theirs, and other seeds have no rows.
    """
    point, rate = ["arm", "setting", "d_model"], ["lr", "nuisance"]
    groups = runs.assign(loss=runs["final_loss"].fillna(math.inf)).groupby([*point, *rate], as_index=False)
    rates = pd.DataFrame(groups.agg(loss=("loss", "mean"), seeds=("seed", "nunique")))
    most = rates.groupby(point)["seeds"].transform("max")
    rates = rates[(rates["seeds"] == most) & (rates["loss"] < math.inf)]
    best = rates.loc[rates.groupby(point)["loss"].idxmin(), [*point, *rate]]
    found = runs.reset_index().merge(best, on=[*point, *rate]).set_index("index").rename_axis(None).sort_index()
    return found[found["judged"] | ~found.groupby(point)["judged"].transform("any")]


def judging(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of seeds that judge; all rows where no seed does."""
    return table[table["judged"]] if table["judged"].any() else table


def rows(frame: pd.DataFrame) -> Iterator[Any]:
    """`itertuples`, typed as Any, as the types of columns are not known."""
    return iter(frame.itertuples())


def natural(text: str) -> str:
    """A key that sorts the numbers in texts by their size: steps=400 before steps=1600."""
    return re.sub(r"\d+(\.\d+)?", lambda number: f"{float(number[0]):020.9f}", text)


def optimizer_name(optimizer: str) -> str:
    """Display name of an optimizer: AdamW for adamw."""
    return OPTIMIZERS[optimizer].label if optimizer in OPTIMIZERS else optimizer


def kind_rank(kind: str) -> float:
    """Place of a kind in the order of arms: from no multipliers to vectors; last, one that is not known here."""
    return list(KINDS).index(kind) if kind in KINDS else math.inf


def _ordered(frame: pd.DataFrame) -> pd.DataFrame:
    lrs = frame[~frame["added"]].groupby(["arm", "setting"])["lr"].nunique().groupby("arm").max()
    frame["reference"] = frame["arm"].map(lrs == 1) & bool((lrs > 1).any())
    # An arm has one rank, even if the kind of its multipliers varies within it.
    rank = frame["multipliers"].map(kind_rank).groupby(frame["arm"]).transform("min")
    order = frame.assign(rank=rank - 9 * frame["reference"], setting=frame["setting"].map(natural))
    order = order.sort_values(["rank", "arm", "setting", "d_model", "seed", "lr", "cell"])
    return frame.loc[order.index].reset_index(drop=True)


def _flat(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The row of a record; `name` is the cell of a run outside a study."""
    config, status = record["config"], record["status"]
    if status not in ("completed", "diverged", "pruned"):
        raise ValueError(f"status {status!r}")
    ended = status == "completed"
    known = {
        _OPTIMIZER: config["optimizer"],
        _WIDTH: int(config["model"]["d_model"]),
        _LR: float(config["optim"]["lr"]),
        _SEED: int(record["seed"]),
    }
    cell = record["cell"] or {
        "study": "",
        "cell": name,
        "arm": config["multipliers"],
        "sampler": "grid",
        "factors": {name: known[name] for name in (_OPTIMIZER, _WIDTH)},
        "nuisance": {name: known[name] for name in (_LR, _SEED)},
    }
    variant = _named(cell["factors"], but=(_WIDTH, _SEED, _OPTIMIZER))
    optimizer = optimizer_name(known[_OPTIMIZER]) if _OPTIMIZER in cell["factors"] else ""
    setting = ", ".join(filter(None, (optimizer, variant)))
    train, parametrization = config["train"], config["parametrization"]
    return {
        **{name: _scalar(value) for name, value in (cell["factors"] | cell["nuisance"]).items()},
        **{name: cell[name] for name in ("study", "cell", "arm", "sampler")},
        "factors": json.dumps(cell["factors"], sort_keys=True),
        "label": f"{cell['arm']} · {setting}" if setting else cell["arm"],
        "setting": setting,
        "variant": variant,
        "nuisance": _named(cell["nuisance"], but=(_LR, _SEED)),
        "optimizer": known[_OPTIMIZER],
        "multipliers": config["multipliers"],
        "preset": parametrization["preset"],
        "tier": parametrization["tier"],
        "d_model": known[_WIDTH],
        "lr": known[_LR],
        "seed": known[_SEED],
        "status": status,
        "added": bool(cell.get("added", False)),
        "refines": bool(cell.get("refines", False)),
        "judged": bool(cell.get("judged", False)),
        "final_loss": float(record["final_loss"]) if ended else math.nan,
        "members": int(record.get("members", 1)),
        "final_bits_per_byte": float(record["final_bits_per_byte"]) if ended else math.nan,
        "diagnostics": ", ".join(train.get("diagnostics", ())),
        "planned_tokens": int(train["steps"]) * int(train["batch_size"]) * int(config["data"]["seq_len"]),
        **{name: record[name] for name in _COPIED},
        **{f"parameters_{name}": count for name, count in record["parameters"].items()},
        **balance_columns(record),
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(record["versions"].items())),
    }


def _named(factors: Mapping[str, Any], but: tuple[str, ...]) -> str:
    names = {name: name.split(".") for name in sorted(factors) if name not in but}
    last = [parts[-1] for parts in names.values()]
    # Where two fields share a last part (lr.q_proj and forward.q_proj), the part before it tells them apart.
    short = {name: ".".join(parts[-2:]) if last.count(parts[-1]) > 1 else parts[-1] for name, parts in names.items()}
    return ", ".join(f"{short[name]}={_scalar(factors[name])}" for name in names)


def _scalar(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value  # a column must be hashable


def _read_record(path: Path) -> dict[str, Any]:
    # Not through pydantic: thousands of records are read at a time, and each was validated when it was written.
    try:
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged, not JSON ({error}); {_remedy(path)}") from None
    if not isinstance(record, dict):
        raise UserError(f"{path}: damaged, not a JSON object; {_remedy(path)}")
    if (version := record.get("schema_version")) != SCHEMA_VERSION:
        raise UserError(f"{path}: not a version-{SCHEMA_VERSION} run record (schema_version: {version})")
    return record


def _remedy(path: Path) -> str:
    if path == StudyPaths(path.parent.parent).record(path.stem):
        return "run the sweep again, which sets the file aside and trains the cell anew"
    return "delete it and train the run again"


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problem = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path}: damaged run record ({problem}); delete it and run its cell again") from None
