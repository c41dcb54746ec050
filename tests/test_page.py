"""The page of a report: what is packed into it, what it lets in, and what it says first."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from page_data import ARMS, TITLE, write_page_study
from test_analysis_frame import tuned_spec, write_run, write_study

from lit_mult.analysis import sensitivity
from lit_mult.analysis.findings import Findings
from lit_mult.analysis.headlines import MOST, Headline, headlines
from lit_mult.analysis.page import packing
from lit_mult.analysis.page.document import SCRIPTS, document
from lit_mult.analysis.page.payload import Payload, payload
from lit_mult.analysis.report import read_content, write_report
from lit_mult.analysis.verdict import judge, verdicts_table
from lit_mult.config import RunConfig

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="no node is installed")
ASSETS = Path(packing.__file__).parent / "assets"
ELEMENTS = """
const element = (tag) => ({
  tag, attributes: {}, children: [],
  setAttribute(name, value) { this.attributes[name] = String(value); },
  append(...children) { this.children.push(...children); },
  replaceChildren(...children) { this.children = children; },
  addEventListener() {},
  querySelectorAll: () => [],
});
const document = { createElement: element, createElementNS: (_, tag) => element(tag) };
const view = (data, more = {}) =>
  ({ data, armsOff: new Set(), seedsOff: new Set(), matches: null, on: { x: true, y: true, smooth: true }, ...more });
"""
"""As much of a browser as drawing needs."""
READ = """
const data = await unpacked(given.data);
data.runs = unpackedColumns(data.runs);
data.runCount = data.runs.cell.length;
for (const name of ["rates", "points", "bill", "scores"]) data[name] = unpackedRows(data[name]);
quantiles = data.t;
const curve = await unpackedCurves(given.curves);
"""
"""A payload that is `given`, as page.js reads it."""


def in_node(script: str, given: Any) -> Any:
    """What a script returns that has the page's own scripts before it, but those that need a whole browser."""
    parts = [(ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS if name != "page.js"]
    source = "\n".join([f'"use strict";{ELEMENTS}const given = {json.dumps(given)};', *parts])
    wrapped = f"(async () => {{{source}\nreturn await (async () => {{{script}}})();}})()"
    program = f"{wrapped}.then((found) => process.stdout.write(JSON.stringify(found)));"
    assert NODE is not None
    done = subprocess.run([NODE, "-"], input=program, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def unpacked(text: str) -> Any:
    return json.loads(zlib.decompress(base64.b64decode(text)))


def unpacked_curve(text: str, place: int) -> tuple[list[int], list[float]]:
    """As the page reads it: see `packed.js`."""
    header, _, planes = zlib.decompress(base64.b64decode(text)).partition(b"\n")
    low_bytes, high_bytes = np.frombuffer(planes, dtype=np.uint8).reshape(2, -1).astype(int)
    codes = np.cumsum(low_bytes + 256 * high_bytes) % 2**16
    curves = json.loads(header)
    start = sum(length for length, *_ in curves[:place])
    length, low, high, first, stride, others = curves[place]
    steps = [first + stride * point for point in range(length - len(others))] + others
    values = [
        math.nan if code == 2**16 - 1 else low + code * (high - low) / (2**16 - 2)
        for code in codes[start : start + length]
    ]
    return steps, values


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Payload]:
    folder = tmp_path_factory.mktemp("page") / "demo"
    write_page_study(folder)
    return folder, payload(read_content(folder))


def test_columns_come_back(tmp_path: Path) -> None:
    table = pd.DataFrame({"same": [1.5] * 4, "few": ["a", "b", "a", "a"], "many": [0.1, math.nan, 3.0, -math.inf]})
    columns = packing.columns(table)["columns"]
    assert columns["same"] == {"all": 1.5}
    assert columns["few"] == {"of": ["a", "b"], "at": [0, 1, 0, 0]}
    assert columns["many"] == {"each": [0.1, None, 3.0, None]}
    mixed = packing.columns(pd.DataFrame({"x": pd.Series([True, 1, 1.0, True, 1, 1.0], dtype=object)}))
    assert list(map(type, mixed["columns"]["x"]["of"])) == [bool, int, float]


def test_curves_come_back_to_16_bits() -> None:
    steps, values = [10, 20, 30, 45], [5.0, math.nan, 2.0, 3.0]
    text = packing.packed_curves([([], []), (steps, values), ([0], [7.25])])
    assert unpacked_curve(text, 0) == ([], [])
    found, losses = unpacked_curve(text, 1)
    assert found == steps
    assert math.isnan(losses[1])
    assert [losses[0], losses[2], losses[3]] == pytest.approx([5.0, 2.0, 3.0], abs=3 / 131068 + 1e-12)
    assert unpacked_curve(text, 2) == ([0], [7.25])


def test_a_long_curve_is_means_of_neighbours_at_their_last_step() -> None:
    steps = list(range(1, 1001))
    found, values = unpacked_curve(packing.packed_curves([(steps, list(map(float, steps)))]), 0)
    assert found[:2] == [3, 6]  # three at a time are 334 points
    assert found[-1] == 1000  # the last is alone
    assert values[:2] == pytest.approx([2.0, 5.0], abs=0.01)
    assert len(found) == 334 <= packing.MOST_POINTS


def test_the_page_is_the_same_bytes_each_time_wherever_the_folder_lies(tmp_path: Path) -> None:
    for place in ("here", "there"):
        write_page_study(tmp_path / place / "demo")
    here, there = (document(payload(read_content(tmp_path / place / "demo"))) for place in ("here", "there"))
    assert here == there
    assert str(tmp_path) not in here


def test_a_report_writes_the_page(tmp_path: Path) -> None:
    write_run(tmp_path, 2.0)
    report = write_report(tmp_path)
    page = tmp_path / "report.html"
    assert page in report.paths
    assert report.paths[-1].name == "report.md"
    first = page.read_bytes()
    write_report(tmp_path)
    assert page.read_bytes() == first


def test_no_name_gets_out_of_the_data(made: tuple[Path, Payload]) -> None:
    text = document(made[1])
    assert "alert(" not in text.replace("alert(1)&lt;/script&gt;", "")
    assert (
        f"<title>{TITLE.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;').replace(chr(34), '&quot;')}<"
        in text
    )
    assert set(unpacked(made[1].data)["runs"]["columns"]["arm"]["of"]) == set(ARMS)  # and it is in the data as it is
    assert re.findall(r"<script[^>]*>", text) == [
        '<script type="text/plain" id="data">',
        '<script type="text/plain" id="curves">',
        "<script>",
    ]


def test_the_policy_allows_this_script_and_style_and_nothing_else(made: tuple[Path, Payload]) -> None:
    text = document(made[1])
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy is not None
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert script is not None
    assert style is not None
    hashes = [base64.b64encode(hashlib.sha256(part[1].encode()).digest()).decode() for part in (script, style)]
    assert policy[1].split("; ") == [
        "default-src 'none'",
        f"script-src 'sha256-{hashes[0]}'",
        f"style-src 'sha256-{hashes[1]}'",
        "img-src data: blob:",
        "connect-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    assert "connect-src 'self'" in document(made[1], live=True)
    assert not re.search(r"(?:src|href)=", text[: text.index("<body>")])
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")


def test_the_config_of_a_run_is_there_to_the_last_digit(made: tuple[Path, Payload]) -> None:
    data = unpacked(made[1].data)
    config = data["config"]["columns"]
    assert config["optim\teps"] == {"all": "1.0e-08"}  # YAML would read 1e-08 as text
    assert config["optimizer"]["of"] == ['"adamw"', '"muon"']
    assert set(config) >= {"model\td_model", "seed", "train\tsteps"}


def test_every_row_of_a_figure_names_a_run_of_its_own(made: tuple[Path, Payload]) -> None:
    data = unpacked(made[1].data)
    runs, rates = data["runs"]["columns"], data["rates"]

    def column(packed: dict[str, Any], length: int) -> list[Any]:
        if "all" in packed:
            return [packed["all"]] * length
        return packed.get("each") or [packed["of"][place] for place in packed["at"]]

    at = column(rates["columns"]["run"], rates["length"])
    assert sorted(at) == list(range(120))
    losses = column(runs["final_loss"], 120)
    assert [losses[run] for run in at] == column(rates["columns"]["loss"], 120)


def test_the_t_quantiles_are_those_of_the_report(made: tuple[Path, Payload]) -> None:
    assert unpacked(made[1].data)["t"][:2] == pytest.approx([12.7062047, 4.30265273])  # of any table


def test_answers_come_first_and_doubts_last(made: tuple[Path, Payload]) -> None:
    sentences = made[1].sentences
    assert 3 <= len(sentences) <= MOST
    assert sentences[0].startswith("With </style><b>v in place of muP (AdamW; widths 32, 64)")
    assert "95 % interval" in sentences[0]
    assert "3 seeds" in sentences[0]
    assert sentences[-1].startswith("At the best rate hidden matrices do not reach the balance")


def test_of_many_answers_the_first_are_shown_behind_a_count() -> None:
    row = {"of": "a", "against": "b", "measure": "best_loss", "within": "", "over": "", "seeds": 3, "difference": -0.1}
    row |= {"low": -0.2, "high": -0.01, "p": 0.01, "p_holm": 0.02, "margin": 0.01, "doubtful": 0}
    answers = pd.DataFrame([row | {"within": str(n), "outcome": "lower" if n else "undecided"} for n in range(9)])
    found = headlines([Findings(tables={"answers": answers})], [])
    assert len(found) == MOST
    assert found[0].text == "Of 9 declared questions: 8 lower, 1 undecided. The first of them:"
    assert [one.outcome for one in found[1:3]] == ["undecided", "lower"]
    assert (found[1].low, found[1].high, found[1].range_high) == (-0.2, -0.01, 0.01)


def test_an_experiment_says_first_what_failed_and_what_held() -> None:
    above = (0.0, math.inf)
    verdicts = [judge(f"Claim {n}", "slope", [1.0, 1.1], above) for n in range(8)]
    verdicts += [judge("Claim 8", "slope", [-1.0, -1.1], above), judge("Claim 9", "slope", [1.0], above)]
    found = headlines([Findings(tables={"verdicts": verdicts_table(verdicts)})], [])
    assert found[0].text == "Of 10 claims judged over seeds: 1 contradicted, 8 reproduced, 1 undecided."
    assert [one.outcome for one in found[1:5]] == ["contradicted", "reproduced", "undecided", "reproduced"]
    assert found[1].text.startswith("Claim 8: contradicted. slope: -1.05, 95 % interval [-1.69, -0.415], 2 seeds.")
    assert len(found) == MOST


def test_without_questions_the_best_arm_of_each_setting_is_told(tmp_path: Path) -> None:
    for arm, gain in (("muP", 0.0), ("vectors", 0.1)):
        for seed in range(3):
            for lr, loss in zip((2**-8, 2**-6, 2**-4), (3.0, 2.0, 2.6), strict=True):
                write_run(tmp_path, loss - gain + seed / 100 + gain * seed / 10, arm=arm, lr=lr, seed=seed)
    write_study(tmp_path, cells=18, spec=tuned_spec())
    content = read_content(tmp_path)
    best, *others = headlines(content.parts, content.warnings)
    # Differences of the seeds are -0.1, -0.09 and -0.08: mean -0.09, and 4.3027 * 0.01 / sqrt(3) = 0.0248 around it.
    assert best.text == (
        "AdamW, d = 64: vectors has the lowest best loss of 2 arms, 1.9200, [1.8703, 1.9697], 3 seeds; 0.0900 below "
        "the next (vectors - muP: -0.0900, [-0.1148, -0.0652])."
    )
    assert all(isinstance(one, Headline) and one.outcome == "doubt" for one in others)


def test_an_edge_is_a_doubt() -> None:
    edges = [f"best rate at the edge of the learning rates: {arm}" for arm in ("a", "b", "c")]
    (found,) = headlines([], edges)
    assert found == Headline("Best rate at the edge of the learning rates: a (and 2 more, under Warnings).", "doubt")


def test_an_experiment_may_have_tables_of_these_names(tmp_path: Path) -> None:
    for lr in (2**-8, 2**-6):
        write_run(tmp_path, 2.0, lr=lr)
    content = read_content(tmp_path)
    own = Findings(tables={"points": pd.DataFrame({"x": [1.0]}), "bill": pd.DataFrame({"x": [1.0]})})
    data = unpacked(payload(replace(content, parts=[own])).data)
    assert data["points"]["length"] == data["bill"]["length"] == 1
    assert data["points"]["columns"]["best_loss"] == {"all": 2.0}


def test_the_page_brings_no_torch_along() -> None:
    program = "import sys, lit_mult.analysis.page.payload; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_config_with_a_table_of_roles_keeps_its_names(tmp_path: Path) -> None:
    path = write_run(tmp_path, 2.0)
    record = json.loads(path.read_text())
    record["config"]["parametrization"]["lr"] = {"q_proj": 2.0}
    path.write_text(json.dumps(record))
    config = unpacked(payload(read_content(tmp_path)).data)["config"]["columns"]
    assert config["parametrization\tlr\tq_proj"] == {"all": "2.0"}
    assert config["parametrization\tforward"] == {"all": "{}"}
    assert RunConfig.from_dict(record["config"])


ALL_FIGURES = """
const found = {};
for (const [name, figure] of Object.entries(FIGURES)) {
  if (!figure.has(data)) continue;
  for (const y of [true, false]) {
    for (const armsOff of [new Set(), new Set(data.arms.map((arm) => arm.name))]) {
      const more = { armsOff, curve, choice: figure.choices?.(data)[0], on: { x: true, y, smooth: true } };
      const { svg, panels } = draw(figure.build(view(data, more)), 900, "light", name);
      const has = (word) => JSON.stringify(svg).includes(word);
      found[[name, y, armsOff.size]] = { panels, nothing: has("Nothing to draw"), nan: has("NaN") };
    }
  }
}
return found;
"""


@needs_node
def test_every_figure_draws_all_arms_and_none(made: tuple[Path, Payload]) -> None:
    _, page = made
    found = in_node(READ + ALL_FIGURES, page.as_dict())
    assert len(found) >= 4 * 6
    for name, drawing in found.items():
        all_off = not name.endswith(",0")
        assert drawing == {"panels": 0 if all_off else pytest.approx(4, abs=3), "nothing": all_off, "nan": False}, name


@needs_node
def test_a_study_of_diverged_runs_alone_is_drawn(tmp_path: Path) -> None:
    for width in (32, 64):
        for lr in (2**-8, 2**-7):
            write_run(tmp_path, None, width=width, lr=lr)
    write_study(tmp_path, cells=4, spec=tuned_spec())
    content = read_content(tmp_path)
    data = payload(content)
    found = in_node(READ + ALL_FIGURES, data.as_dict())
    assert found["loss_vs_lr,true,0"] == {"panels": 2, "nothing": False, "nan": False}
    assert not [name for name in found if name.startswith(("optimum_drift", "loss_vs_compute"))]
    assert not any(drawing["nan"] for drawing in found.values())
    # Figures that are asked for none the less: no optimum, no panel; no loss, an empty panel; no error.
    script = """
    const both = [FIGURES.optimum_drift, FIGURES.loss_vs_compute];
    return both.map((figure) => draw(figure.build(view(data)), 900, "light", "").panels);
    """
    assert in_node(READ + script, data.as_dict()) == [0, 1]


@needs_node
def test_the_drift_of_an_optimum_is_that_of_the_tables(tmp_path: Path) -> None:
    """A missing run, one rate alone at a third width, optima at the edge, an arm in order, and one with one width."""
    best_of = {"muP": -7, "vectors": -8, "fixed": -7, "scalars": -7}
    for arm, lowest in best_of.items():
        widths = (64,) if arm == "scalars" else (32, 64)
        for width in widths:
            for power in (-8, -7, -6):
                for seed in (0, 1):
                    best = lowest + 0.1 * seed - 0.2 * (width == 64)
                    loss = 2.0 + (power - best) ** 2
                    if (arm, width, power, seed) != ("muP", 32, -6, 1):
                        write_run(tmp_path, loss, arm=arm, width=width, lr=2.0**power, seed=seed)
    for seed in (0, 1):
        write_run(tmp_path, 2.0, width=128, lr=2.0**-7, seed=seed)
    write_study(tmp_path, cells=43, spec=tuned_spec())
    content = read_content(tmp_path)
    expected = sensitivity.optimum_drift(sensitivity.points(content.runs))
    rows = in_node(READ + "return FIGURES.optimum_drift.build(view(data)).data;", payload(content).as_dict())
    assert [row["arm"] for row in rows] == list(expected["arm"])
    assert dict(zip(expected["arm"], expected["trusted"], strict=True)) == {
        "muP": False,
        "vectors": False,
        "fixed": True,
    }
    for row, line in zip(rows, expected.to_dict("records"), strict=True):
        assert row["slope"] == pytest.approx(line["slope"])
        assert (row["seeds"], row["trusted"]) == (line["seeds"], line["trusted"])


@needs_node
@pytest.mark.parametrize(
    ("edge", "complete", "said"),
    [(False, True, "slope -1.00, 1 seed"), (True, True, "(doubtful)"), (False, False, "(doubtful)")],
)
def test_a_slope_says_that_it_is_doubtful(edge: bool, complete: bool, said: str) -> None:
    script = """
    const [optimum_at_edge, complete] = given;
    const point = (d_model) => ({ d_model, seed: 0, optimum_lr: 1 / d_model, optimum_at_edge, complete });
    return slopeText(driftOf([point(32), point(64)]));
    """
    assert in_node(script, [edge, complete]).endswith(said)


@needs_node
def test_a_difference_of_optimizers_is_named_as_such_and_its_rows_are_unique(made: tuple[Path, Payload]) -> None:
    script = """
    const { rows, data: table } = FIGURES.adam_vs_muon.build(view(data));
    const dots = rows[0].panels[1].marks.flatMap((mark) => mark.dots ?? []).filter((dot) => dot.run !== undefined);
    return { table, told: dots[0].text() };
    """
    found = in_node(READ + script, made[1].as_dict())
    assert any(line.startswith("Muon − AdamW -0.0") for line in found["told"])  # noqa: RUF001
    assert not any("sensitivity" in line for line in found["told"])
    keys = [tuple(row[name] for name in ("arm", "setting", "variant", "width", "measure")) for row in found["table"]]
    assert len(set(keys)) == len(keys) == 12


@needs_node
@pytest.mark.parametrize("kind", ["bars", "band"])
def test_an_interval_below_0_ends_at_the_end_of_a_logarithmic_axis(kind: str) -> None:
    script = """
    const marks = [{ type: given, points: [[1, -1, 2], [2, 0, 3], [3, 1, 4]] }];
    const panel = { title: "", x: { label: "" }, y: { label: "", log: 10, domain: [0, 5] }, marks };
    return JSON.stringify(draw({ rows: [{ panels: [panel] }], legend: [], data: [] }, 400, "light", "").svg);
    """
    drawn = in_node(script, kind)
    assert "NaN" not in drawn
    assert "Infinity" not in drawn


@needs_node
def test_a_score_without_an_interval_says_so() -> None:
    script = """
    const line = { suite: "s", arm: "muP", setting: "", label: "muP", d_model: 64, chance: 0.25 };
    const scores = [
      { ...line, task: "t", value: 0.5, low: null, high: null, seeds: 1 },
      { ...line, task: "u", value: 0.5, low: 0.4, high: 0.6, seeds: 2 },
      { ...line, task: "v", value: null, low: null, high: null, seeds: 0 },
    ];
    const { rows } = FIGURES.scores.build(view({ scores, arms: [{ name: "muP", colour: "#000000" }] }));
    const [, bars, dots] = rows[0].panels[0].marks;
    return { bars: bars.points.map(([, low, high]) => [low, high]), told: dots.dots.map((dot) => dot.text()[1]) };
    """
    found = in_node(script, None)
    assert found == {
        "bars": [[None, None], [40, 60]],
        "told": ["50.0 %, no interval, 1 seed", "50.0 % [40.0, 60.0], 2 seeds"],
    }


@needs_node
def test_a_live_page_asks_once_for_a_report_that_it_cannot_draw() -> None:
    script = """
    const asked = [];
    const answers = { "/state.json": given, "/page.json": { version: "new" } };
    globalThis.fetch = async (address) => (asked.push(address), { json: async () => answers[address] });
    globalThis.setTimeout = () => {};
    console.error = () => {};
    const watched = live({ receive: async () => { throw new Error("no such axis"); } }, "");
    await watched.ask();
    await watched.ask();
    return { asked, said: JSON.stringify(watched.node) };
    """
    state = {"name": "s", "cells": 1, "waiting": 1, "sweeps": 0, "seconds_left": None, "version": "new"}
    state |= {"ended": {}, "interrupted": {}, "failed": {}, "running": [], "problems": []}
    found = in_node(script, state)
    assert found["asked"] == ["/state.json", "/page.json", "/state.json"]
    assert "cannot draw this report (no such axis)" in found["said"]
    assert "no answer" not in found["said"]
