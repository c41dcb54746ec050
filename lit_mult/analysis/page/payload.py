"""What the page of a report shows, as plain data: sentences, figures, tables, runs and where they come from.

The figures come as the numbers that they are drawn from, a row a run or a seed, so that the page can leave out arms and
seeds and compute means and intervals of the rest; `assets/figures.js` draws them.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from numpy.typing import ArrayLike

from lit_mult.analysis import cost, plots, sensitivity
from lit_mult.analysis.diagnostics import load_diagnostics
from lit_mult.analysis.drawing import arm_styles
from lit_mult.analysis.findings import Findings
from lit_mult.analysis.frame import best_rates, optimizer_name, rows
from lit_mult.analysis.headlines import headlines
from lit_mult.analysis.page.packing import columns, deflated, packed, packed_curves, plain
from lit_mult.analysis.seeds import t_quantile
from lit_mult.errors import UserError
from lit_mult.layout import RunPaths

INTERACTIVE = ("loss_vs_lr", "sensitivity", "adam_vs_muon", "optimum_drift", "loss_vs_compute")
"""Figures that the page draws by itself, from the numbers."""
_MOST_WITH_DIAGNOSTICS = 200
"""Of more runs, diagnostics are shown of those at the best rates alone."""
_RUN = ["cell", "arm", "setting", "d_model", "lr", "seed", "status", "final_loss", "best_loss", "initial_loss"]
_RUN += ["final_bits_per_byte", "steps", "tokens", "wall_seconds", "tokens_per_second", "members", "parameters_total"]
_RUN += ["nuisance", "label", "optimizer", "variant", "reference", "study", "config_hash", "git_commit", "corpus_hash"]
_RUN += ["device", "versions"]
_RATE = ["arm", "setting", "d_model", "seed", "lr", "loss", "diverged", "pruned", "sampled"]
_POINT = ["arm", "setting", "variant", "d_model", "seed", "reference", "best_loss", "best_lr", "at_edge"]
_POINT += ["sensitivity", "optimum_lr", "optimum_loss", "optimum_at_edge", "lrs", "complete"]
_BILL = ["arm", "setting", "d_model", "reference", "search_flops", "tuning_flops", "total_flops"]
_SCORE = ["arm", "setting", "label", "d_model", "task", "side", "value", "low", "high", "seeds", "chance"]
_Curve = tuple[ArrayLike, ArrayLike]
"""Steps and values."""
_DASHES = {"--": [5, 2], "-.": [6, 2, 1, 2], ":": [1, 2]}


@dataclass(frozen=True)
class Content:
    """What a report says, before it is written in any form."""

    title: str
    folder: Path | None
    """Of the study or run; None for a comparison of several."""
    runs: pd.DataFrame
    """`frame.load_records`, or `sides.load_sides`."""
    parts: Sequence[Findings]
    warnings: Sequence[str]
    provenance: Sequence[str] = ()
    study: str = ""
    """Name of the study, for the command that repeats its cells."""
    figures: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)
    """Name of a figure -> ending ("png", "svg") -> content."""


@dataclass(frozen=True)
class Payload:
    """The data of a page, as text that `assets/packed.js` reads."""

    title: str
    sentences: tuple[str, ...]
    """The headlines, for a reader without JavaScript."""
    data: str
    curves: str
    """Of all runs: training and validation loss, then diagnostics."""

    @property
    def version(self) -> str:
        """Differs where what is shown differs."""
        return hashlib.sha256(f"{self.data} {self.curves}".encode()).hexdigest()[:16]

    def as_dict(self) -> dict[str, str]:
        """What a page that is open takes over."""
        return {"data": self.data, "curves": self.curves, "version": self.version}


def payload(content: Content) -> Payload:
    """The data of the page of a report. The same content gives the same bytes.

    Raises:
        UserError: a record has gone or is damaged.
    """
    runs, tables = content.runs, {name: table for part in content.parts for name, table in part.tables.items()}
    points = tables.get("points", pd.DataFrame())
    if not {*_POINT, "optimizer"} <= set(points):  # an experiment may have points of its own
        points = sensitivity.points(runs)
    found = headlines(content.parts, content.warnings)
    read = _Read(runs["path"])
    diagnostics, readings = _diagnostics(content.folder, runs)
    data = {
        "title": content.title,
        "study": content.study,
        "experiment": "verdicts" in tables,
        "headlines": [{**asdict(one), **_numbers(one)} for one in found],
        "arms": _arms(points),
        "runs": columns(_runs(runs, content.folder).assign(started_at=read.started_at)),
        "config": columns(pd.DataFrame(read.configs, dtype=object)),
        "rates": columns(rates := _rates(runs)),
        "points": columns(_points(points, rates)),
        "bill": columns(_bill(runs, points, tables)),
        "balanced": _balanced(runs),
        "scores": columns(_scores(tables)),
        "diagnostics": diagnostics,
        "figures": list(_static(content)),
        "lists": _lists(content),
        "tables": [
            {"name": name, "columns": list(table.columns), "rows": [list(map(str, row)) for row in table.to_numpy()]}
            for part in content.parts
            for name, table in part.display_tables.items()
            if len(table)
        ],
        "unit": "; ".join(part.unit for part in content.parts if part.unit),
        "captions": {name: text for part in content.parts for name, text in part.captions.items()},
        "how_to_read": "".join(part.how_to_read for part in content.parts),
        "provenance": list(content.provenance),
        "t": [t_quantile(0.975, freedom) for freedom in range(1, max(2, int(runs["seed"].nunique()) + 1))],
    }
    sentences = tuple(one.text for one in found)
    return Payload(content.title, sentences, packed(data), packed_curves([*read.training, *read.validation, *readings]))


def _numbers(headline: Any) -> dict[str, Any]:
    names = ("value", "low", "high", "range_low", "range_high")
    return dict(zip(names, plain(getattr(headline, name) for name in names), strict=True))


class _Read:
    """What `load_records` leaves in the records, an entry a run. One is read at a time: ten thousand fill a memory."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.configs, self.started_at = list[dict[str, str]](), list[str]()
        self.training, self.validation = list[_Curve](), list[_Curve]()
        self._written = dict[tuple[type, str], str]()
        for path in paths:
            try:
                record = json.loads(Path(path).read_bytes())
                self.training.append(_split(record["train_curve"]))
                self.validation.append(_split(record["val_curve"]))
                self.started_at.append(record["started_at"])
                self.configs.append({name: self._scalar(value) for name, value in _leaves(record["config"], "")})
            except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
                raise UserError(f"{path}: damaged run record ({error}); delete it and run its cell again") from None

    def _scalar(self, value: Any) -> str:
        """A value as YAML writes it: 1e-08 as 1.0e-08, or else it would be read as text."""
        key = (type(value), repr(value))
        if key not in self._written:
            text = json.dumps(value) if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True)
            self._written[key] = text.removesuffix("\n").removesuffix("\n...").strip()
        return self._written[key]


def _split(curve: Sequence[tuple[int, float]]) -> _Curve:
    """Steps and losses."""
    points = np.array(curve, dtype=float).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def _leaves(config: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    """Values by the path of their field, joined by tabs: names of roles may have dots."""
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}\t")
        else:
            yield f"{prefix}{name}", value


def _runs(runs: pd.DataFrame, folder: Path | None) -> pd.DataFrame:
    """The columns that a reader may ask for. The page does not depend on where the folder of a study lies."""
    table = runs[_RUN].copy()
    seeds = ("added", "refines", "judged")
    table["role"] = ["+".join(name for name in seeds if flags[name]) for flags in runs[list(seeds)].to_dict("records")]
    paths = [Path(path) for path in runs["path"]]
    if folder is None:  # sides of a comparison, whose cells have numbers
        table["cell"] = [
            path.parent.name if path.name == RunPaths(path.parent).record.name else path.stem for path in paths
        ]
    table["path"] = [(path if folder is None else path.relative_to(folder)).as_posix() for path in paths]
    for name in runs:  # factors, which have dotted names
        if "." in str(name) and name not in ("model.d_model", "optim.lr"):
            table[name] = runs[name]
    return table


def _arms(points: pd.DataFrame) -> list[dict[str, Any]]:
    """Arms in the colours and dashes of the static figures."""
    references = set(points.loc[points["reference"], "arm"])
    arms = []
    for name, style in arm_styles(points).items():
        dashes = style["ls"][1] if isinstance(style["ls"], tuple) else _DASHES.get(style["ls"], [])
        colour = style["color"]
        if not colour.startswith("#"):  # matplotlib's grey, as in 0.4
            colour = "#" + 3 * f"{round(255 * float(colour)):02x}"
        arms.append({"name": name, "colour": colour, "dashes": list(dashes), "reference": name in references})
    return arms


def _rates(runs: pd.DataFrame) -> pd.DataFrame:
    """`sensitivity.loss_curves`, each row with the run whose loss it is."""
    curves = sensitivity.loss_curves(runs)
    key = ["arm", "setting", "d_model", "seed", "lr"]
    places = runs.reset_index(names="run")[[*key, "final_loss", "run"]].sort_values("final_loss", kind="stable")
    # The loss at the chosen values of other nuisance factors; of a seed that diverged there, any run of the rate.
    chosen = places.rename(columns={"final_loss": "loss"}).drop_duplicates([*key, "loss"])
    found = curves.merge(chosen, on=[*key, "loss"], how="left")
    of_rate = curves[key].merge(places.drop_duplicates(key), on=key, how="left")["run"]
    found["run"] = found["run"].fillna(of_rate).astype(int)
    return found[[*_RATE, "run"]]


def _points(points: pd.DataFrame, rates: pd.DataFrame) -> pd.DataFrame:
    """A row for each arm, setting, width and seed, with its run at the best rate."""
    key = ["arm", "setting", "d_model", "seed"]
    of_rate = rates[[*key, "lr", "run"]].rename(columns={"lr": "best_lr"})
    found = points.merge(of_rate, on=[*key, "best_lr"], how="left")
    return found[[*_POINT, "run"]].assign(optimizer=[optimizer_name(name) for name in points["optimizer"]])


def _bill(runs: pd.DataFrame, points: pd.DataFrame, tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    for name in ("bill", "cost"):  # of a study, of a comparison of sides
        if name in tables and set(_BILL) <= set(tables[name]):
            return tables[name][_BILL]
    return cost.bill(runs, points, None)[_BILL]


def _balanced(runs: pd.DataFrame) -> list[list[Any]]:
    """Setting, width, and the learning rate below which no arm reaches the balance of noise and decay."""
    found = []
    for (setting, width), here in runs.groupby(["setting", "d_model"], sort=False):
        end = min(plots.balanced_from(of_arm) for _, of_arm in here.groupby("arm"))
        if end > here["lr"].min():  # infinite without weight decay
            found.append([setting, width, min(end, float(here["lr"].max()))])
    return found


def _scores(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Downstream scores at the last checkpoint, of all suites."""
    of_suites = [
        table[table["last"] & table["share"]][["suite", *_SCORE]]
        for name, table in tables.items()
        if name.startswith("scores_") and {"suite", "last", "share", *_SCORE} <= set(table)
    ]
    return pd.concat(of_suites, ignore_index=True) if of_suites else pd.DataFrame(columns=["suite", *_SCORE])


def _diagnostics(folder: Path | None, runs: pd.DataFrame) -> tuple[list[list[Any]], list[_Curve]]:
    """[run, group, quantity, role] of each curve of diagnostics, and these curves: means over the modules of a role."""
    recorded = runs[runs["diagnostics"] != ""]
    if len(recorded) > _MOST_WITH_DIAGNOSTICS:
        recorded = recorded[recorded.index.isin(best_rates(runs).index)]
    if folder is None or recorded.empty:
        return [], []
    try:
        readings = load_diagnostics(folder, cells=set(recorded["cell"]))
    except UserError:  # not there, damaged, or nothing to read them with: the report warns where it needs them
        return [], []
    named, curves = list[list[Any]](), list[_Curve]()
    place = {row.cell: row.Index for row in rows(recorded)}
    means = readings.groupby(["cell", "group", "quantity", "role", "step"])["value"].mean().reset_index()
    for (cell, group, quantity, role), part in means.groupby(["cell", "group", "quantity", "role"]):
        if cell in place and len(part) > 1:
            named.append([place[cell], group, quantity, role])
            curves.append((part["step"].to_list(), part["value"].to_list()))
    return named, curves


def _static(content: Content) -> Iterable[dict[str, str]]:
    """The figures that the page shows as they are, each in the smaller of its forms."""
    captions = {name: text for part in content.parts for name, text in part.captions.items()}
    for name, files in content.figures.items():
        if name not in INTERACTIVE:
            if len(deflated(files["svg"])) < len(deflated(files["png"])):
                drawn = {"svg": files["svg"].decode()}
            else:
                drawn = {"png": base64.b64encode(files["png"]).decode()}
            yield {"name": name, "caption": captions.get(name, ""), **drawn}


def _lists(content: Content) -> list[list[Any]]:
    """Headings and their sentences, in the order of report.md."""
    answers = [line for part in content.parts for line in part.answers]
    lists = {"Answers to the declared questions": answers} if answers else {}
    lists |= {heading: lines for part in content.parts for heading, lines in part.statements.items()}
    return [*([heading, list(lines)] for heading, lines in lists.items()), ["Warnings", list(content.warnings)]]
