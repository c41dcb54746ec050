"""Where multipliers stand: the tables of arXiv:2601.04890 app. C, and patterns over them."""

from __future__ import annotations

import pytest

from lit_mult.config import PlacementConfig, RunConfig
from lit_mult.errors import ConfigError
from lit_mult.method.placement import PLACEMENTS, parse_axes, place
from lit_mult.registry.contracts import Axis
from lit_mult.registry.roles import MATRIX_ROLES, Role

# App. C, copied by hand: matrix, minimal, full. RMSNorm weights are the columns of a block's first matrices.
PAPER = """
embedding   row+column   row+column
q_proj      row          row
k_proj      none         row
v_proj      none         row
o_proj      row+column   row+column
gate_proj   row          row
up_proj     none         row
down_proj   row+column   row+column
lm_head     none         none
"""
ROWS = [line.split() for line in PAPER.split("\n") if line]
ROLES = RunConfig.from_dict({"model": {"n_layers": 2}}).model.matrix_roles()


def axes(text: str) -> frozenset[str]:
    return frozenset() if text == "none" else frozenset(text.split("+"))


def placed(kind: str, table: str = "full", **overrides: str) -> dict[str, frozenset[Axis]]:
    return place(kind, PlacementConfig(table=table, overrides=overrides), ROLES)  # type: ignore[arg-type]


@pytest.mark.parametrize(("role", "minimal", "full"), ROWS, ids=[row[0] for row in ROWS])
def test_tables_are_the_papers(role: str, minimal: str, full: str) -> None:
    assert PLACEMENTS["minimal"][Role(role)] == axes(minimal)
    assert PLACEMENTS["full"][Role(role)] == axes(full)


def test_tables_cover_every_matrix_role() -> None:
    assert set(PLACEMENTS) == {"minimal", "full"}
    assert {Role(row[0]) for row in ROWS} == MATRIX_ROLES
    beyond = {Role.ROUTER: axes("none"), Role.POSITION: axes("none")}
    # A Mamba2 block (arXiv:2601.04890 app. C).
    beyond |= {Role.SSM_GATE: axes("row"), Role.SSM_INPUT: axes("none")}
    beyond |= {Role.SSM_STEP: axes("row"), Role.SSM_OUT: axes("row+column")}
    for table in PLACEMENTS.values():
        assert set(table) == MATRIX_ROLES | beyond.keys()
        assert all(table[role] == expected for role, expected in beyond.items())


@pytest.mark.parametrize("column", [1, 2], ids=["minimal", "full"])
def test_vector_follows_the_table_in_every_layer(column: int) -> None:
    expected = {row[0]: axes(row[column]) for row in ROWS}
    by_name = placed("vector", ["", "minimal", "full"][column])
    assert list(by_name) == list(ROLES)
    assert len(by_name) == 2 + 2 * 7
    assert all(by_name[name] == expected[role] for name, role in ROLES.items())


@pytest.mark.parametrize("column", [1, 2], ids=["minimal", "full"])
def test_scalar_puts_one_scalar_wherever_the_table_has_a_multiplier(column: int) -> None:
    expected = {row[0]: axes("none" if row[column] == "none" else "scalar") for row in ROWS}
    by_name = placed("scalar", ["", "minimal", "full"][column])
    assert all(by_name[name] == expected[role] for name, role in ROLES.items())


@pytest.mark.parametrize("kind", ["none", "fixed"])
def test_none_and_fixed_have_no_learnable_multiplier_even_with_overrides(kind: str) -> None:
    by_name = placed(kind, lm_head="scalar")
    assert set(by_name) == set(ROLES)
    assert not any(by_name.values())


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_overrides_are_taken_as_written_and_the_last_match_wins(kind: str) -> None:
    plain = placed(kind)
    by_name = placed(kind, **{"layers.*": "column", "layers.1.*": "none", "*.q_proj": "scalar+row"})
    for name in ROLES:
        if name.endswith("q_proj"):
            assert by_name[name] == {Axis.SCALAR, Axis.ROW}
        elif name.startswith("layers."):
            assert by_name[name] == ({Axis.COLUMN} if name.startswith("layers.0.") else set())
        else:
            assert by_name[name] == plain[name]


def test_overrides_match_case_and_whole_names() -> None:
    assert placed("vector", lm_head="row")["lm_head"] == {Axis.ROW}
    for pattern in ("LM_HEAD", "head", "layers"):
        with pytest.raises(ConfigError, match="matches no matrix"):
            placed("vector", **{pattern: "row"})


@pytest.mark.parametrize("kind", ["none", "fixed", "scalar", "vector"])
def test_a_pattern_without_a_match_raises_in_one_line(kind: str) -> None:
    with pytest.raises(ConfigError) as caught:
        placed(kind, **{"layers.9.*": "row"})
    assert str(caught.value) == (
        "placement.overrides = 'layers.9.*': matches no matrix; "
        "names are embed_tokens, layers.0.self_attn.q_proj, layers.0.self_attn.k_proj, ..."
    )


@pytest.mark.parametrize("text", ["", "rows", "row+", "row,column", "none+row", "Row"])
@pytest.mark.parametrize("kind", ["none", "vector"])
def test_a_bad_axis_raises_in_one_line(kind: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        placed(kind, lm_head=text)
    assert str(caught.value) == (
        f"placement.overrides.lm_head = {text!r}: must be none, or scalar, row, column joined by +"
    )


def test_axes_parse_in_any_order() -> None:
    assert parse_axes("none") == set()
    assert parse_axes("column+row") == parse_axes("row+column") == {Axis.ROW, Axis.COLUMN}
    assert parse_axes("scalar+row+column") == set(Axis)
