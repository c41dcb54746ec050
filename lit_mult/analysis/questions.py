"""Answers to the questions that a study declares: paired differences by seed, corrected together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import pandas as pd

from lit_mult.analysis import sensitivity
from lit_mult.analysis.frame import best_rates, optimizer_name, rows
from lit_mult.analysis.seeds import holm, mean_interval, p_value
from lit_mult.analysis.tables import interval, number, signed
from lit_mult.schema import WIDTH, Question

ALPHA = 0.05
"""Level of the corrected tests: the chance of naming any difference where there is none."""
Outcome = Literal["lower", "higher", "equivalent", "undecided"]
_ANSWERS = ["of", "against", "measure", "within", "over", "seeds", "difference", "low", "high", "p", "p_holm", "margin"]
_ANSWERS += ["doubtful", "outcome"]
_ALONG = ["question", "measure", "factor", "value", "within", "seeds", "difference", "low", "high", "times_low"]
_ALONG += ["times_high"]
_LEAST_VALUES = 3
_BY_SEED = ["question", "within", "over", "seed", "difference", "doubtful"]


def differences_by_seed(runs: pd.DataFrame, question: Question) -> pd.DataFrame:
    """The differences that a question asks about, a row a seed: mean over the values of its `over` factors.

    Args:
        runs: from `load_records` or `frame_of`.
        question: what to compare.

    Returns:
        Columns question, within (values of the factors that neither side fixes, as text), over, seed, difference (nats
        per token) and doubtful (whether any of the differences that were averaged is, see
        `sensitivity.paired_differences`). A seed counts where it has all values of the `over` factors.
    """
    return _by_seed(_points(runs), question)


def answers(runs: pd.DataFrame, questions: Sequence[Question]) -> pd.DataFrame:
    """The answers, a row a question and value of the factors that it leaves open.

    Columns: of, against, measure, within, over; seeds; difference `of` - `against`, mean over seeds, and its 95 %
    interval (low, high), by Student's t; p of that test, and p_holm, corrected for all rows; margin; doubtful, the
    number of seeds whose difference is; outcome. *lower* and *higher*: p_holm is at most 0.05. *equivalent*: the
    interval lies within ± margin, and no difference is shown. *undecided*: neither, or a pair is doubtful, or there is
    one seed.
    """
    points, found = _points(runs), list[dict[str, Any]]()
    for question in questions:
        for (within, over), part in _by_seed(points, question).groupby(["within", "over"], sort=False):
            mean, low, high = mean_interval(part["difference"])
            found.append(
                {"of": side_name(question.of), "against": side_name(question.against), "measure": question.measure}
                | {"within": within, "over": over, "seeds": len(part), "difference": mean, "low": low, "high": high}
                | {"p": p_value(part["difference"]), "margin": question.margin, "doubtful": int(part["doubtful"].sum())}
            )
    table = pd.DataFrame(found, columns=[name for name in _ANSWERS if name not in ("p_holm", "outcome")])
    table["p_holm"] = holm(table["p"].astype(float))
    table["outcome"] = [_outcome(row) for row in rows(table)]
    return table[_ANSWERS]


def along_factors(runs: pd.DataFrame, questions: Sequence[Question]) -> pd.DataFrame:
    """The answers along every factor that has three numbers or more and that a question leaves open.

    Columns: question (such as "vectors - muP"), measure, factor (its dotted name, `model.d_model` included), value,
    within (the other open factors, as text), seeds, difference with its interval (low, high; see `answers`), and
    times_low and times_high, the decay times (lr * weight_decay * steps) of hidden matrices at the best rates of both
    sides.
    """
    line = ["arm", "setting", "d_model"]
    times = best_rates(runs).groupby(line)["decay_times_hidden_low"].first().rename("decay_times")
    points, found = _points(runs).join(times, on=line), list[dict[str, Any]]()
    for question in questions:
        pairs, over, open_factors = _pairs(points, question)
        for factor in open_factors:
            if pairs[factor].nunique() < _LEAST_VALUES or not pd.api.types.is_numeric_dtype(pairs[factor]):
                continue
            others = [name for name in open_factors if name != factor]
            labelled = pairs.assign(others=texts(pairs, others))
            for (within, value), part in labelled.groupby(["others", factor]):
                mean, low, high = mean_interval((seeds := _seeds(part, over))["difference"])
                both = part[["decay_times", "decay_times_against"]].to_numpy(float)
                found.append(
                    {"question": _asked(question), "measure": question.measure, "factor": factor, "value": value}
                    | {"within": within, "seeds": len(seeds), "difference": mean, "low": low, "high": high}
                    | {"times_low": float(both.min()), "times_high": float(both.max())}
                )
    return pd.DataFrame(found, columns=_ALONG)


def statement(row: Any) -> str:
    """A row of `answers` as a sentence."""
    where = "; ".join(filter(None, (row.within, row.over)))
    asked = f"With {row.of} in place of {row.against}{f' ({where})' if where else ''} the"
    asked += f" {sensitivity.MEASURES[row.measure]}"
    if row.outcome in ("lower", "higher"):
        told = f"is {abs(row.difference):.4f} nats {row.outcome}"
    else:
        told = f"is the same to ±{row.margin:g} nats" if row.outcome == "equivalent" else "is not shown to differ"
        told += f", {signed(row.difference)}"
    seeds = f"{row.seeds} seed{'s' if row.seeds != 1 else ''}"
    return f"{asked} {told}: 95 % interval {interval(row.low, row.high, row.seeds)}, {seeds}{_reason(row)}."


def unanswered(answered: pd.DataFrame, questions: Sequence[Question]) -> Iterator[str]:
    """A warning for each question that `answers` has no row for."""
    found = set(answered[["of", "against", "measure"]].itertuples(index=False, name=None))
    for question in questions:
        if (side_name(question.of), side_name(question.against), question.measure) not in found:
            measure = sensitivity.MEASURES[question.measure]
            yield f"no answer on the {measure}, {_asked(question)}: no seed has all runs of both sides yet"


def answers_table(table: pd.DataFrame) -> pd.DataFrame:
    """`answers` for readers: nats per token."""
    return pd.DataFrame(
        [
            {
                "difference": f"{row.of} - {row.against}",
                "measure": sensitivity.MEASURES[row.measure],
                "within": "; ".join(filter(None, (row.within, row.over))),
                "seeds": str(row.seeds),
                "mean": signed(row.difference),
                "95 % interval": interval(row.low, row.high, row.seeds),
                "p (Holm)": _p(row.p_holm).removeprefix("= "),
                "answer": row.outcome,
            }
            for row in rows(table)
        ]
    )


def _reason(row: Any) -> str:
    if row.doubtful:
        return f", of which {row.doubtful} are doubtful (see Warnings)"
    if row.seeds < 2:
        return ""
    corrected = f", p {_p(row.p_holm)} after Holm's correction"
    if row.outcome == "undecided":
        apart = corrected if row.low > 0 or row.high < 0 else ""  # or else it would not be clear why nothing is shown
        return f"{apart}; differences up to {number(max(abs(row.low), abs(row.high)))} remain possible"
    return "" if row.outcome == "equivalent" else corrected


def _outcome(row: Any) -> Outcome:
    if row.doubtful or row.seeds < 2:
        return "undecided"
    if row.p_holm <= ALPHA:
        return "lower" if row.difference < 0 else "higher"
    return "equivalent" if -row.margin < row.low and row.high < row.margin else "undecided"


def _points(runs: pd.DataFrame) -> pd.DataFrame:
    """`sensitivity.points` with a column for each scientific factor."""
    points = sensitivity.points(runs)
    group = ["arm", "setting", "d_model"]
    named = runs.drop_duplicates(group)[[*group, "factors"]].reset_index(drop=True)
    factors = pd.DataFrame([json.loads(text) for text in named["factors"]]).map(_hashable)
    factors = factors.drop(columns=[WIDTH], errors="ignore")
    points = points.drop(columns=["optimizer"]).merge(named[group].join(factors), on=group)
    points[WIDTH] = points["d_model"]
    return points.assign(**{_FACTORS: json.dumps(sorted({*factors.columns, WIDTH, "arm"}))})


_FACTORS = "names of factors"


def _pairs(points: pd.DataFrame, question: Question) -> tuple[pd.DataFrame, list[str], list[str]]:
    """The pairs of a question, a row a seed and setting; the factors to average over; the others that vary."""
    factors = json.loads(points[_FACTORS].iloc[0])
    free = [name for name in factors if name not in question.of]
    of, against = (matching(points, side) for side in (question.of, question.against))
    pairs = sensitivity.paired(of, against, [*free, "seed"], question.measure)
    over = [name for name in question.over if name in free]
    return pairs, over, [name for name in free if name not in over and points[name].nunique() > 1]


def _by_seed(points: pd.DataFrame, question: Question) -> pd.DataFrame:
    pairs, over, within = _pairs(points, question)
    found = []
    for name, part in pairs.assign(within=texts(pairs, within)).groupby("within", sort=False):
        text = "; ".join(_values(key, sorted(part[key].unique())) for key in over)
        found.append(_seeds(part, over).reset_index().assign(question=_asked(question), within=name, over=text))
    return pd.concat(found)[_BY_SEED] if found else pd.DataFrame(columns=_BY_SEED)


def _seeds(pairs: pd.DataFrame, over: Sequence[str]) -> pd.DataFrame:
    """Seed -> its mean difference over the factors `over`, and whether it is doubtful. Only seeds with all values."""
    levels = pairs[list(over)].astype(str).agg(" ".join, axis=1) if over else pd.Series("", pairs.index)
    whole = pairs[levels.groupby(pairs["seed"]).transform("nunique") == levels.nunique()]
    return whole.groupby("seed").agg(difference=("difference", "mean"), doubtful=("doubtful", "any"))


def _asked(question: Question) -> str:
    return f"{side_name(question.of)} - {side_name(question.against)}"


def matching(points: pd.DataFrame, side: dict[str, Any]) -> pd.DataFrame:
    """The rows of a table with a column for each factor that have a side's values."""
    for name, value in side.items():
        points = points[points[name] == _hashable(value)]
    return points


def texts(pairs: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """For each row, its values of some factors in words."""
    return ["; ".join(_values(name, [row[name]]) for name in names) for row in pairs.to_dict("records")]


def _values(factor: str, values: Sequence[Any]) -> str:
    """Values of a factor in words: Muon, muP, "widths 32, 64" or "seq_len 128"."""
    if factor in ("arm", "optimizer"):
        return ", ".join(optimizer_name(value) if factor == "optimizer" else value for value in values)
    name = ("widths" if len(values) > 1 else "width") if factor == WIDTH else factor.rpartition(".")[2]
    return f"{name} {', '.join(map(str, values))}"


def side_name(side: dict[str, Any]) -> str:
    """A side in words: "vectors", "vectors under Muon"."""
    arm, others = side.get("arm"), [_values(name, [value]) for name, value in side.items() if name != "arm"]
    return " under ".join(filter(None, (arm, ", ".join(others))))


def _hashable(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _p(value: float) -> str:
    if value != value:
        return "n/a"
    return "< 0.0001" if value < 1e-4 else f"= {value:.2g}"
