"""A wrong name is answered with the right one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_mult.config import RunConfig, field_names
from lit_mult.errors import ConfigError, closest, did_you_mean, one_of

FIELDS = field_names(RunConfig)
RESULTS = Path(__file__).parent.parent / "results"


@given(st.text(max_size=20), st.lists(st.text(min_size=1, max_size=12), max_size=6))
def test_only_known_names_are_suggested(word: str, known: list[str]) -> None:
    assert closest(word, known) in {None, *known}


@given(st.sampled_from(FIELDS), st.sampled_from(["", "-", "_"]), st.booleans())
def test_case_and_punctuation_do_not_matter(field: str, sign: str, upper: bool) -> None:
    written = field.replace("_", sign)
    assert closest(written.upper() if upper else written, FIELDS) == field


@pytest.mark.parametrize(
    ("word", "known", "meant"),
    [
        ("lr", ["parametrization.lr", "optim.lr", "optim.vector_lr"], "optim.lr"),  # the shorter of two with this end
        ("train.dropout", FIELDS, "model.dropout"),  # of another section
        ("dmodel", FIELDS, "model.d_model"),
        ("mupp", ["vectors", "muP-tuned", "muP"], "muP"),
        ("falcon-h1", ["neutral", "falcon-h1-0.5b"], "falcon-h1-0.5b"),
        ("model.width", FIELDS, "model.d_model"),
        ("hidden_size", FIELDS, "model.d_model"),
        ("trainer.max_epochs", FIELDS, "train.steps"),
        ("width", ["widths"], "widths"),
        ("colour", FIELDS, None),
        ("x", [], None),
    ],
)
def test_the_nearest_name(word: str, known: list[str], meant: str | None) -> None:
    assert closest(word, known) == meant
    assert did_you_mean(word, known) == ("" if meant is None else f"; did you mean {meant}?")
    assert one_of(word, known) == ", ".join(known) + did_you_mean(word, known)


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ("reprot", "report"),
        ("coordcheck", "coord-check"),
        ("fit --out x --d_model 64", "--model.d_model"),
        ("fit --out x --model.dmodel=64", "--model.d_model"),
        ("parameters --lr 3", "--optim.lr"),
        ("fit --out x --model.width 64", "--model.d_model"),
        ("fit --out x --trainer.max_epochs 3", "--train.steps"),
        ("fit --out x --trainer.profiler simple", "--trainer.extra.profiler"),
        ("fit --out x --trainer.devics 2", "--trainer.devices"),
        ("fit --out x --config trainer.yaml", "trainer.extra.profiler"),
        ("sweep quick --retry_failed", "--retry-failed"),
        ("parameters --config group.yaml", "model.d_model"),
        ("parameters --config section.yaml", "model.d_model"),
        ("parameters --optimizer adamW", "adamw"),
        ("parameters --multipliers vectors", "vector"),
        ("parameters --train.diagnostics [norm]", "norms"),
        ("parameters --parametrization.preset mup-tuning", "mup_tuning"),
        ('parameters --parametrization.lr {"qproj":2}', "q_proj"),
        ("fit --out x --trainer.extra.profilr simple", "profiler"),
        ("sweep lr-width", "lr_width"),
        ("sweep plane --profile GPU", "gpu"),
        ("sweep quick --executor locl", "local"),
        ("sweep study.yaml", "width_scaling"),
        (f"preset {RESULTS / 'pays_tuning'} -o x --arm mup", "muP"),
        (f"compare {RESULTS / 'pays'}:mupp {RESULTS / 'pays'}:vectors", "muP"),
        (f"compare {RESULTS / 'pays'}:muP@optimiser=muon {RESULTS / 'pays'}:vectors", "optimizer"),
        (f"compare {RESULTS / 'pays'}:muP@optimizer=Muon {RESULTS / 'pays'}:vectors", "muon"),
    ],
)
def test_a_wrong_name_on_the_command_line(
    arguments: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "group.yaml").write_text("model: {dmodel: 64}")
    (tmp_path / "section.yaml").write_text("modle: {d_model: 64}")
    (tmp_path / "trainer.yaml").write_text("trainer: {profiler: simple}")
    (tmp_path / "study.yaml").write_text("{name: a, experiment: widthscaling, arms: {x: {}}, seeds: [0], budget: {}}")

    assert refused(*arguments.split()).endswith(f"; did you mean {meant}?\n")


def test_a_wrong_field_from_python() -> None:
    with pytest.raises(ConfigError, match=r"unknown field; did you mean optim\.weight_decay\?"):
        RunConfig.from_dict({"optim": {"weightdecay": 0.1}})
    with pytest.raises(ConfigError, match=r"without one go into trainer\.extra\); did you mean train\.steps\?"):
        RunConfig.from_dict({"trainer": {"max_epochs": 3}})
    with pytest.raises(ConfigError, match="did you mean minimal"):
        RunConfig.from_dict({"placement": {"table": "minimall"}})
