"""Presets: the numbers of a file and of a config in the plan of a run, what is refused, and writing.

For the model, see test_parametrization.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from refusals import refusal
from test_parametrization import ADAMW_FACTOR, MODEL, VOCAB, by_role, plan

from lit_mult.config import RunConfig, Tier
from lit_mult.errors import ConfigError
from lit_mult.method import presets
from lit_mult.method.plan import plan_run
from lit_mult.method.presets import Preset, RoleMultipliers, apply_preset, inlined, load_preset, run_multipliers
from lit_mult.method.search_space import neutral, search_space
from lit_mult.registry.contracts import Axis
from lit_mult.registry.roles import MATRIX_ROLES, Role
from lit_mult.schema import Tuning

HEAD = "name: mine\nsource: a test\n"
ROLES = "the role must be one of embedding, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head"
Written = Callable[..., str]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Write a preset named mine, and return the path of its file."""

    def write(content: str, stem: str = "mine") -> str:
        path = tmp_path / f"{stem}.yaml"
        path.write_text(HEAD + content)
        return str(path)

    return write


def test_plan_multiplies_base_rate_rule_and_preset(written: Written) -> None:
    preset = written("lr: {q_proj: 3}\nweight_decay: {q_proj: 5, v_proj: 0}\n")
    settings = {"optim": {"lr": 2**-6, "weight_decay": 0.1}}
    roles = by_role(plan(parametrization={"width_rule": "lr_wd", "preset": preset}, **settings))
    assert roles[Role.Q_PROJ].lr == pytest.approx(2**-6 / 4 * 3)
    assert roles[Role.Q_PROJ].weight_decay == pytest.approx(0.1 * 4 * 5)
    assert roles[Role.K_PROJ].lr == pytest.approx(2**-6 / 4)
    assert roles[Role.K_PROJ].weight_decay == pytest.approx(0.4)
    assert roles[Role.V_PROJ].weight_decay == 0.0
    assert roles[Role.EMBEDDING].lr == 2**-6
    assert roles[Role.EMBEDDING].weight_decay == pytest.approx(0.1)


# Forward multipliers in the configuration of the released Falcon-H1-0.5B.
FALCON = {
    Role.EMBEDDING: 5.656854,
    Role.LM_HEAD: 0.0390625,
    Role.K_PROJ: 0.390625,
    Role.O_PROJ: 0.9375,
    Role.GATE_PROJ: 0.883883,
    Role.DOWN_PROJ: 0.5859375,
}


def test_falcon_preset_holds_the_released_values() -> None:
    preset = load_preset("falcon-h1-0.5b")
    assert preset.forward == FALCON
    assert preset.lr == preset.weight_decay == {}
    assert load_preset("neutral").forward == {}


def test_fixed_multipliers_are_the_presets_times_the_width_rules() -> None:
    falcon = {"preset": "falcon-h1-0.5b", "width_rule": "multiplier"}
    roles = by_role(plan(128, falcon, multipliers="fixed"))
    for role, matrix in roles.items():
        assert matrix.constant == pytest.approx(FALCON.get(role, 1.0) * ADAMW_FACTOR[role])
        assert matrix.start == {}
    assert all(by_role(plan(128, falcon))[role].constant == ADAMW_FACTOR[role] for role in roles)  # none: rule alone


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_learnable_multipliers_start_at_one_or_at_the_preset(kind: str) -> None:
    falcon = {"preset": "falcon-h1-0.5b"}
    for matrix in plan(128, falcon, multipliers=kind).matrices.values():
        assert matrix.constant == 1.0
        assert set(matrix.start.values()) <= {1.0}
    started = by_role(plan(128, falcon, multipliers=kind, placement={"init": "preset"}))
    first = Axis.SCALAR if kind == "scalar" else Axis.ROW
    for role, matrix in started.items():
        assert set(matrix.start) == matrix.axes
        if role is Role.LM_HEAD:  # no multiplier stands there: the preset stays a constant
            assert (matrix.start, matrix.constant) == ({}, 0.0390625)
        else:  # one axis carries the value, the others start at 1
            assert matrix.start.pop(first) == FALCON.get(role, 1.0)
            assert set(matrix.start.values()) <= {1.0}
            assert matrix.constant == 1.0


@pytest.mark.parametrize("own", [False, True], ids=["of a preset", "of the config"])
@pytest.mark.parametrize(
    ("tier", "lr", "weight_decay", "forward"),
    [("NONE", 1, 1, 1), ("LR", 3, 1, 1), ("LRWD", 3, 5, 1), ("FULL", 3, 5, 7)],
)
def test_tiers_take_lr_then_decay_then_forward(
    written: Written, own: bool, tier: str, lr: int, weight_decay: int, forward: int
) -> None:
    multipliers: dict[str, Any] = {
        "lr": {"up_proj": 3.0},
        "weight_decay": {"up_proj": 5.0},
        "forward": {"up_proj": 7.0},
    }
    given = multipliers if own else {"preset": written(yaml.safe_dump(multipliers))}
    settings = {"multipliers": "fixed", "optim": {"lr": 1.0, "weight_decay": 1.0}}
    role = by_role(plan(32, given | {"tier": tier}, **settings))[Role.UP_PROJ]
    assert (role.lr, role.weight_decay, role.constant) == (lr, weight_decay, forward)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("lr: {norm: 2}", f"lr.norm = 2: {ROLES}"),
        ("lr: {q_proj: 0}", "lr.q_proj = 0: input should be greater than 0"),
        ("forward: {q_proj: -1}", "forward.q_proj = -1: input should be greater than 0"),
        ("weight_decay: {q_proj: -1}", "weight_decay.q_proj = -1: input should be greater than or equal to 0"),
        ("lr: {q_proj: .nan}", "lr.q_proj"),
        ("lr: {q_proj: .inf}", "lr.q_proj"),
        ("lr: {query: 2}", f"lr.query = 2: {ROLES}"),
        ("lr: {1: 2}", "lr.1 = 2: the role"),
        ("lr: 2", "lr = 2: input should be a valid dictionary"),
        ("lr: {q_proj: fast}", "lr.q_proj = 'fast'"),
        ("rate: {q_proj: 2}", "rate = {'q_proj': 2}: unknown field"),
        ("version: 2", "version = 2: input should be 1"),
        ("optimizers: {sgd: {}}", "sgd"),
        ("optimizers: [muon]", "optimizers = ['muon']: input should be a valid dictionary"),
        ("optimizers: {muon: 1}", "optimizers.muon = 1: input should be a valid dictionary"),
        ("optimizers: {muon: {lr: {query: 2}}}", f"optimizers.muon.lr.query = 2: {ROLES}"),
        ("optimizers: {muon: {lr: {q_proj: 0}}}", "optimizers.muon.lr.q_proj = 0: input should be greater"),
        ("optimizers: {muon: {tuning: {study: a}}}", "optimizers.muon.tuning.trials"),
        (b"name: x", "source"),
        (b"- a\n- b", "valid dictionary"),
        (b"", "valid dictionary"),
        (b"lr: {", "not a YAML file"),
        (b"\xff\xfe\x00name", "not a YAML file"),
    ],
)
def test_a_bad_preset_file_is_refused_in_one_line(tmp_path: Path, text: str | bytes, complaint: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else (HEAD + text).encode())
    with refusal(complaint) as caught:
        load_preset(str(path))
    assert str(caught.value).startswith(f"preset {path}: ")


@pytest.mark.parametrize("name", ["falcon", "", "presets"])
def test_an_unknown_preset_names_the_shipped_ones(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_preset(name)
    shipped = "falcon-h1-0.5b, mup_tuning, neutral, pays_tuning"
    hint = "; did you mean falcon-h1-0.5b?" if name == "falcon" else ""
    assert str(caught.value) == f"parametrization.preset = {name!r}: must be a YAML file or one of {shipped}{hint}"


def test_a_config_has_multipliers_of_its_own(written: Written) -> None:
    preset = written("lr: {q_proj: 3, k_proj: 7}\nweight_decay: {q_proj: 5}\nforward: {q_proj: 11, k_proj: 13}\n")
    own = {"lr": {"q_proj": 4.0}, "weight_decay": {"v_proj": 2.0}, "forward": {"k_proj": 0.5}}
    settings = {"multipliers": "fixed", "optim": {"lr": 2**-6, "weight_decay": 0.1}}
    roles = by_role(plan(parametrization={"preset": preset, **own}, **settings))
    # the width rule's lr factor is 1/4
    assert roles[Role.Q_PROJ].lr == 2**-6 / 4 * 4  # in place of the preset's 3
    assert roles[Role.K_PROJ].lr == 2**-6 / 4 * 7  # the preset's
    assert roles[Role.V_PROJ].lr == 2**-6 / 4
    decays = {role: roles[role].weight_decay for role in (Role.Q_PROJ, Role.K_PROJ, Role.V_PROJ)}
    assert decays == pytest.approx({Role.Q_PROJ: 0.5, Role.K_PROJ: 0.1, Role.V_PROJ: 0.2})
    assert [roles[role].constant for role in (Role.Q_PROJ, Role.K_PROJ, Role.V_PROJ)] == [11, 0.5, 1]


def test_own_multipliers_of_zero_and_one_replace_the_presets_too(written: Written) -> None:
    preset = written("lr: {q_proj: 3}\nweight_decay: {q_proj: 5}\n")
    own = {"preset": preset, "lr": {"q_proj": 1.0}, "weight_decay": {"q_proj": 0.0}}
    role = by_role(plan(32, own, optim={"lr": 0.5}))[Role.Q_PROJ]
    assert (role.lr, role.weight_decay) == (0.5, 0.0)


def test_own_forward_multipliers_are_used_where_those_of_a_preset_are() -> None:
    own = {"forward": {"o_proj": 0.5, "lm_head": 0.25}}
    shown = {}
    for kind, init in (("none", "preset"), ("fixed", "ones"), ("scalar", "ones"), ("scalar", "preset")):
        roles = by_role(plan(128, own, multipliers=kind, placement={"init": init}))
        shown[kind, init] = [(roles[role].constant, roles[role].start) for role in (Role.O_PROJ, Role.LM_HEAD)]
    assert shown == {
        ("none", "preset"): [(1.0, {}), (1.0, {})],
        ("fixed", "ones"): [(0.5, {}), (0.25, {})],
        ("scalar", "ones"): [(1.0, {Axis.SCALAR: 1.0}), (1.0, {})],
        ("scalar", "preset"): [(1.0, {Axis.SCALAR: 0.5}), (0.25, {})],  # no multiplier stands at the head
    }


@pytest.mark.parametrize("tier", ["NONE", "FULL"])
@pytest.mark.parametrize(
    ("own", "complaint"),
    [
        ({"lr": {"q_prj": 2.0}}, f"parametrization.lr.q_prj = 2.0: {ROLES}; did you mean q_proj?"),
        ({"forward": {"norm": 2.0}}, f"parametrization.forward.norm = 2.0: {ROLES}"),
        ({"forward": {"q_proj": 0.0}}, "parametrization.forward.q_proj = 0.0: input should be greater than 0"),
        (
            {"weight_decay": {"q_proj": -1.0}},
            "parametrization.weight_decay.q_proj = -1.0: input should be greater than or equal to 0",
        ),
    ],
)
def test_a_bad_multiplier_of_a_config_is_refused(tier: str, own: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(parametrization=own | {"tier": tier})
    assert str(caught.value) == complaint


BY_OPTIMIZER = (
    "lr: {q_proj: 2}\nweight_decay: {q_proj: 3}\noptimizers: {muon: {lr: {k_proj: 5}, forward: {k_proj: 7}}}\n"
)


def test_an_optimizers_own_part_stands_in_place_of_the_shared_one(written: Written) -> None:
    path = written(BY_OPTIMIZER)
    preset = load_preset(path)
    adamw = RoleMultipliers(lr={Role.Q_PROJ: 2}, weight_decay={Role.Q_PROJ: 3})
    muon = RoleMultipliers(lr={Role.K_PROJ: 5}, forward={Role.K_PROJ: 7})
    assert (preset.multipliers("adamw", "FULL"), preset.multipliers("muon", "FULL")) == (adamw, muon)
    assert preset.multipliers("muon", "LR") == RoleMultipliers(lr={Role.K_PROJ: 5})
    assert preset.multipliers("adamw", "NONE") == RoleMultipliers()
    rates = {}
    for optimizer in ("adamw", "muon"):
        roles = by_role(plan(32, {"preset": path}, optimizer=optimizer, optim={"lr": 1.0}))
        rates[optimizer] = (roles[Role.Q_PROJ].lr, roles[Role.K_PROJ].lr)
    assert rates == {"adamw": (2.0, 1.0), "muon": (1.0, 5.0)}


def test_a_preset_of_another_optimizer_is_refused(written: Written) -> None:
    path = written("optimizers: {muon: {lr: {k_proj: 5}}}\n")
    assert by_role(plan(32, {"preset": path}, optimizer="muon", optim={"lr": 1.0}))[Role.K_PROJ].lr == 5.0
    complaint = "parametrization.preset = 'mine': has multipliers for muon only, not for adamw"
    config = RunConfig.from_dict({"parametrization": {"preset": path}})
    for use in (run_multipliers, inlined):
        with pytest.raises(ConfigError) as caught:
            use(config)
        assert str(caught.value) == complaint


def test_a_preset_is_inlined_under_the_configs_own_multipliers(written: Written) -> None:
    path, copy = written(BY_OPTIMIZER), written(BY_OPTIMIZER, "copy")
    settings = {"preset": path, "lr": {"k_proj": 0.5}, "tier": "LR"}
    config = RunConfig.from_dict({"parametrization": settings})
    got = inlined(config)
    assert got.parametrization.preset == "neutral"
    assert got.parametrization.tier == "LR"  # cuts when the run is planned, not here
    assert got.parametrization.lr == {"q_proj": 2.0, "k_proj": 0.5}
    assert (got.parametrization.weight_decay, got.parametrization.forward) == ({"q_proj": 3.0}, {})
    assert plan_run(got, VOCAB) == plan_run(config, VOCAB)
    assert got == apply_preset(config, load_preset(path))
    assert inlined(got) is got

    # wherever the file lies, the run is the same; with another number it is another
    elsewhere = inlined(config.with_overrides({"parametrization.preset": copy}))
    assert elsewhere.hash == got.hash
    written(BY_OPTIMIZER.replace("q_proj: 2", "q_proj: 2.5"), "copy")
    assert inlined(config.with_overrides({"parametrization.preset": copy})).hash != got.hash

    muon = inlined(config.with_overrides({"optimizer": "muon"})).parametrization
    assert (muon.lr, muon.weight_decay, muon.forward) == ({"k_proj": 0.5}, {}, {"k_proj": 7.0})


def test_a_shipped_preset_stays_a_name() -> None:
    config = RunConfig.from_dict({"parametrization": {"preset": "falcon-h1-0.5b"}})
    assert inlined(config) is config
    with pytest.raises(ConfigError, match="must be a YAML file or one of falcon"):
        inlined(config.with_overrides({"parametrization.preset": "nothing"}))


def test_search_spaces_grow_with_the_tier() -> None:
    assert search_space("NONE") == {}
    rates = {f"parametrization.lr.{role}": (0.25, 4.0) for role in MATRIX_ROLES}
    decays = {f"parametrization.weight_decay.{role}": (0.25, 4.0) for role in MATRIX_ROLES}
    forward = {f"parametrization.forward.{role}": (0.125, 8.0) for role in FALCON}
    assert search_space("LR") == rates
    assert search_space("LRWD") == rates | decays
    assert search_space("FULL") == rates | decays | forward
    assert [len(search_space(tier)) for tier in ("LR", "LRWD", "FULL")] == [9, 18, 24]


@pytest.mark.parametrize("tier", ["LR", "LRWD", "FULL"])
def test_every_field_of_a_search_space_changes_the_plan_and_its_neutral_point_does_not(tier: Tier) -> None:
    config = RunConfig.from_dict({"multipliers": "fixed", "parametrization": {"tier": tier}, "model": MODEL})
    untuned = plan_run(config, VOCAB)
    space = search_space(tier)
    assert plan_run(config.with_overrides(neutral(space)), VOCAB) == untuned
    for field, (low, high) in space.items():
        changed = plan_run(config.with_overrides({field: high}), VOCAB)
        role = field.rpartition(".")[2]
        assert {name for name, matrix in changed.matrices.items() if matrix != untuned.matrices[name]} == {
            name for name, matrix in untuned.matrices.items() if matrix.role == role
        }
        assert low * high == 1


WRITTEN = """\
version: 1
name: mine
source: a test
lr:
  q_proj: 3.0
optimizers:
  muon:
    forward:
      k_proj: 0.390625
    lr:
      embedding: 1.25
      q_proj: 2.0
      lm_head: 0.5
    tuning:
      study: tune
      trials: 3
      runs: 3
      completed: 1
      pruned: 1
      diverged: 1
      tokens: 15800
      flops: 94800000.0
      seconds: 2.75
      d_model: 64
      base_d_model: 32
      steps: 100
      batch_size: 4
      seq_len: 32
      lr: 0.015625
      best_loss: 2.1
      seeds:
      - 0
      - 1
      tier: FULL
      git_commit: abc
      corpus_hash: c0ffee
"""


TUNING = Tuning.model_validate(yaml.safe_load(WRITTEN)["optimizers"]["muon"]["tuning"])


def test_a_preset_is_written_in_the_order_of_reading() -> None:
    tuned = RoleMultipliers(
        lr={Role.LM_HEAD: 0.5, Role.Q_PROJ: 2.0, Role.EMBEDDING: 1.25}, forward={Role.K_PROJ: 0.390625}, tuning=TUNING
    )
    preset = Preset(name="mine", source="a test", lr={Role.Q_PROJ: 3.0}, optimizers={"muon": tuned})
    assert preset.to_yaml() == WRITTEN


@pytest.mark.parametrize("name", ["neutral", "falcon-h1-0.5b"])
def test_the_shipped_presets_have_a_version_and_survive_writing(name: str, tmp_path: Path) -> None:
    path = tmp_path / "copy.yaml"
    path.write_text(load_preset(name).to_yaml())
    assert load_preset(str(path)) == load_preset(name)
    assert yaml.safe_load(path.read_text())["version"] == 1
    assert (Path(presets.__file__).parent / "presets" / f"{name}.yaml").read_text().startswith("version: 1\n")


POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
MATRICES = st.sampled_from(sorted(MATRIX_ROLES))
FACTORS_BY_ROLE = {
    "forward": st.dictionaries(MATRICES, POSITIVE),
    "lr": st.dictionaries(MATRICES, POSITIVE),
    "weight_decay": st.dictionaries(MATRICES, st.floats(min_value=0, allow_infinity=False)),
}
TUNINGS = st.builds(
    TUNING.model_copy,
    update=st.fixed_dictionaries(
        {
            "default_loss": st.none() | POSITIVE,
            "flops": POSITIVE,
            "git_commit": st.none() | st.text() | st.lists(st.text()),
            "seeds": st.lists(st.integers()),
        }
    ),
)
PARTS_OF_PRESETS = st.builds(RoleMultipliers, tuning=st.none() | TUNINGS, **FACTORS_BY_ROLE)


@given(
    preset=st.builds(
        Preset,
        name=st.text(),
        source=st.text(),
        optimizers=st.dictionaries(st.sampled_from(["adamw", "muon"]), PARTS_OF_PRESETS),
        **FACTORS_BY_ROLE,
    )
)
def test_a_preset_survives_writing(preset: Preset, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "preset.yaml"
    path.write_text(preset.to_yaml())
    assert load_preset(str(path)) == preset
