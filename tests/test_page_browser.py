"""The page of a report in a browser, without a network: every figure, number, button and key."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from page_data import ARMS, SEEDS, TITLE, write_page_study
from test_watch import cells_of, end
from tiny_runs import MakeStudy

from lit_mult.analysis import sensitivity
from lit_mult.analysis.frame import load_records
from lit_mult.analysis.page.document import document
from lit_mult.analysis.page.payload import payload
from lit_mult.analysis.report import drawn, read_content
from lit_mult.analysis.seeds import mean_interval
from lit_mult.config import RunConfig
from lit_mult.study import watch as watching
from lit_mult.study.folder import StudyFolder
from lit_mult.study.spec import StudySpec

CHROMIUM = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
VECTORS = list(ARMS)[1]
FIGURES = ["loss_vs_lr", "sensitivity", "optimum_drift", "adam_vs_muon", "curves", "diagnostics"]
MUST_RUN = os.environ.get("CI_BROWSER") == "1"
pytestmark = pytest.mark.skipif(CHROMIUM is None and not MUST_RUN, reason="no chromium is installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not MUST_RUN:
        pytest.importorskip("playwright", reason="needs the dev extra")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "demo"
    write_page_study(folder)
    content = read_content(folder)
    # One figure as it is, beside those that the page draws: to draw them all would take the time of all else.
    main = content.parts[0]
    main.figures = {"answers_along_factors": main.figures["loss_vs_lr"]}
    main.captions["answers_along_factors"] = "A figure as it is."
    (folder / "report.html").write_text(document(payload(drawn(content))), encoding="utf-8")
    return folder


@pytest.fixture
def page(browser: Any, study: Path) -> Iterator[Any]:
    with opened(browser, study) as page:
        yield page


@contextmanager
def opened(browser: Any, study: Path, width: int = 1440, scheme: str = "light") -> Iterator[Any]:
    """The page, offline; at the end it has asked for nothing but its file, and complained of nothing."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page = context.new_page()
    asked, complaints = list[str](), list[str]()
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    page.goto((study / "report.html").as_uri())
    page.locator("html[data-ready=yes]").wait_for()
    yield page
    context.close()
    assert [url for url in asked if not url.startswith("blob:")] == [(study / "report.html").as_uri()]
    assert complaints == []


def saved(page: Any, click: Callable[[], None]) -> bytes:
    with page.expect_download() as download:
        click()
    return Path(download.value.path()).read_bytes()


def figure(page: Any, name: str) -> Any:
    return page.locator(f"#figure-{name}")


def rows_of(page: Any, name: str) -> list[dict[str, str]]:
    """The data of a figure, as the page saves it."""
    button = figure(page, name).get_by_role("button", name="as CSV")
    return list(csv.DictReader(io.StringIO(saved(page, button.click).decode())))


def test_everything_is_drawn_and_named(page: Any) -> None:
    assert page.title() == page.locator("h1").inner_text() == TITLE
    assert page.locator("figure").evaluate_all("all => all.map((one) => one.id)") == [
        *(f"figure-{name}" for name in FIGURES),
        "figure-answers_along_factors",
    ]
    for name in FIGURES:
        drawing = figure(page, name).locator("svg[role=img]")
        assert drawing.get_attribute("aria-label")
        assert drawing.locator("path").count() > 3
    image = figure(page, "answers_along_factors").locator("img")
    assert image.get_attribute("alt") == "A figure as it is."
    assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 300
    assert page.locator(".answer li").count() >= 3
    assert "NaN" not in page.locator("body").inner_text()
    assert "undefined" not in page.locator("body").inner_text()


@pytest.mark.parametrize("off", [(), (1,)], ids=["all seeds", "without seed 1"])
def test_means_and_intervals_are_those_of_pandas(page: Any, study: Path, off: tuple[int, ...]) -> None:
    for seed in off:
        page.get_by_role("group", name="Seeds").get_by_role("button", name=str(seed), exact=True).click()
    runs = load_records(study)
    kept = sensitivity.points(runs)
    kept = kept[~kept["seed"].isin(off)]
    found = rows_of(page, "sensitivity")
    expected = sensitivity.summary(kept).set_index(["arm", "setting", "d_model"])
    assert len(found) == 2 * len(expected) == 16
    for row in found:
        line = expected.loc[(row["arm"], row["setting"], int(row["width"]))]
        ends = [line[f"{row['measure']}{end}"] for end in ("", "_low", "_high")]
        assert [float(row[name]) for name in ("mean", "low", "high")] == pytest.approx(ends, rel=1e-12)
        assert int(row["seeds"]) == len(SEEDS) - len(off)
    curves = sensitivity.loss_curves(runs)
    by_rate = curves[~curves["seed"].isin(off)].groupby(["arm", "setting", "d_model", "lr"])["loss"]
    rates = rows_of(page, "loss_vs_lr")
    assert len(rates) == len(by_rate) == 40
    for row in rates:
        losses = by_rate.get_group((row["arm"], row["setting"], int(row["width"]), float(row["lr"])))
        mean, low, high = (*mean_interval(losses)[:1], *mean_interval(losses.dropna())[1:])
        numbers = [float(row[name]) for name in ("loss", "low", "high")]
        assert numbers == pytest.approx([mean, low, high], rel=1e-12, nan_ok=True)
    drift = sensitivity.optimum_drift(kept).set_index(["arm", "setting"])
    for row in rows_of(page, "optimum_drift"):
        line = drift.loc[(row["arm"], row["setting"])]
        assert row["trusted"] == str(line["trusted"]).lower()
        ends = [line[name] for name in ("slope", "slope_low", "slope_high")]
        assert [float(row[name]) for name in ("slope", "low", "high")] == pytest.approx(ends, rel=1e-9)
    differences = sensitivity.paired_differences(kept)
    differences = differences[(differences["between"] == "optimizer") & (differences["measure"] == "best_loss")]
    differences = differences.set_index(["within", "d_model"])
    shown = [row for row in rows_of(page, "adam_vs_muon") if row["measure"] == "difference"]
    assert len(shown) == 4
    for row in shown:
        line = differences.loc[(row["arm"], int(row["width"]))]
        ends = [line[name] for name in ("difference", "low", "high")]
        assert [float(row[name]) for name in ("mean", "low", "high")] == pytest.approx(ends, rel=1e-9)


def test_an_arm_that_is_off_is_nowhere(page: Any) -> None:
    button = page.get_by_role("group", name="Arms").get_by_role("button", name=VECTORS)
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert {row["arm"] for row in rows_of(page, "loss_vs_lr")} == {"muP"}
    page.get_by_role("group", name="Arms").get_by_role("button", name=VECTORS).click()
    assert {row["arm"] for row in rows_of(page, "loss_vs_lr")} == set(ARMS)
    for arm in ARMS:
        page.get_by_role("group", name="Arms").get_by_role("button", name=arm).click()
    for name in FIGURES:
        assert figure(page, name).locator("svg[role=img]").inner_html().count("Nothing to draw") == 1


def test_a_dot_tells_its_run_and_opens_it(page: Any, study: Path) -> None:
    canvas = figure(page, "loss_vs_lr").locator(".canvas")
    canvas.focus()
    for _ in range(3):  # past the mean
        page.keyboard.press("ArrowRight")
    tip = page.locator(".tip")
    for part in ("seed 0", "lr 2^-", "final loss", "config ", "2 s"):
        assert part in tip.inner_text()
    page.keyboard.press("Enter")
    panel = page.get_by_role("complementary", name="Run")
    name = panel.locator("h2").inner_text()
    assert name in tip.inner_text()
    assert panel.locator("svg[role=img]").count() >= 1
    assert f"lit-mult fit --config {name}.yaml" in panel.inner_text()
    page.keyboard.press("ArrowRight")
    assert panel.locator("h2").inner_text() != name
    page.keyboard.press("Escape")
    assert panel.is_hidden()
    assert canvas.evaluate("node => node === document.activeElement")


def test_the_mouse_finds_a_dot_and_a_click_opens_its_run(page: Any) -> None:
    canvas = figure(page, "loss_vs_lr").locator(".canvas")
    canvas.focus()
    page.keyboard.press("ArrowRight")
    dot = canvas.locator(".ring").bounding_box()
    page.keyboard.press("Escape")
    assert page.locator(".tip").is_hidden()
    x, y = dot["x"] + dot["width"] / 2, dot["y"] + dot["height"] / 2
    page.mouse.move(x, y)
    said = page.locator(".tip").inner_text()
    page.mouse.click(x, y)
    panel = page.get_by_role("complementary", name="Run")
    assert panel.locator("h2").inner_text() in said
    page.get_by_role("button", name="Close").click()
    assert panel.is_hidden()


def test_the_config_of_a_run_repeats_it(page: Any, study: Path) -> None:
    page.locator("#runs tbody button").first.click()
    panel = page.get_by_role("complementary", name="Run")
    text = panel.locator("pre").inner_text()
    written = RunConfig.from_dict(yaml.safe_load(text))
    records = load_records(study).set_index("cell")
    assert written.hash == records.loc[panel.locator("h2").inner_text(), "config_hash"]
    assert saved(page, panel.get_by_role("button", name="Save").click).decode() == text


def test_a_run_with_diagnostics_shows_them(page: Any) -> None:
    page.locator("#filter").fill(f"muP optimizer=adamw width=32 seed=0 lr={2**-7}")
    page.locator("#runs tbody button").first.click()
    panel = page.get_by_role("complementary", name="Run")
    assert "Diagnostics of" in panel.locator("svg[role=img]").nth(1).get_attribute("aria-label")
    page.keyboard.press("Escape")
    # Means over layers 0 and 1 and seeds 0 and 1 at steps 0, 100 and 200 are 1.5, 2.5 and 3.5, to 16 bits.
    means = [float(row["mean"]) for row in rows_of(page, "diagnostics") if row["role"] == "q_proj"]
    assert means == pytest.approx([1.5, 2.5, 3.5], abs=1e-4)


TAKEN = {
    "width=64": 60,
    "lr<2^-7 -muon": 24,
    "seed=0|2 setting~muon": 40,
    "diverged": 1,
    "loss>=0 status!=completed": 0,
    "colour=red": 120,  # no such field: nothing is filtered, and the page says so
    '"0-adamw-32-0.0078125-0"': 1,
    "": 120,
}


def test_the_filter_takes_runs_by_text_and_value(page: Any) -> None:
    for text, count in TAKEN.items():
        page.locator("#filter").fill(text)
        assert page.locator("output").first.inner_text() == f"{count} of 120 runs", text
        assert page.locator("#filter-table").input_value() == text
        assert page.locator("#filter-problem").inner_text().startswith("no field" if "colour" in text else "")


def test_rows_sort_by_number_and_run_out_of_sight(page: Any, study: Path) -> None:
    page.get_by_role("button", name="final loss").click()
    losses = load_records(study)["final_loss"].dropna()
    cell = page.locator("#runs tbody tr").first.locator("td.number").nth(3)
    assert cell.inner_text() == f"{losses.min():.4f}"
    header = page.locator("#runs thead th[aria-sort=ascending]")
    assert header.inner_text().startswith("final loss")
    page.get_by_role("button", name="final loss").click()
    assert cell.inner_text() == f"{losses.max():.4f}"
    page.locator(".scroller").evaluate("node => (node.scrollTop = node.scrollHeight)")
    last = page.locator("#runs tbody tr:not(.gap)").last
    last.filter(has_text="diverged").wait_for()
    last.locator("button").focus()
    page.keyboard.press("ArrowUp")
    assert "completed" in page.locator("#runs tbody tr:focus-within").inner_text()
    saved_rows = saved(page, page.get_by_role("button", name="Save these runs as CSV").click).decode()
    table = pd.read_csv(io.StringIO(saved_rows))
    assert len(table) == 120
    assert np.isnan(table["final_loss"].iloc[-1])


def test_figures_are_saved_as_they_are_seen(page: Any) -> None:
    svg = saved(page, figure(page, "loss_vs_lr").get_by_role("button", name="as SVG").click).decode()
    assert svg.startswith("<?xml")
    assert "muP" in svg
    assert "learning rate" in svg
    png = saved(page, figure(page, "loss_vs_lr").get_by_role("button", name="as PNG").click)
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(png) > 10_000
    kept = saved(page, figure(page, "answers_along_factors").get_by_role("button", name="as SVG").click)
    assert kept.startswith(b"<?xml")


def test_axes_can_be_logarithmic_or_linear(page: Any) -> None:
    loss = figure(page, "loss_vs_lr")
    ticks = loss.locator("svg[role=img] text").all_text_contents
    assert "2\u22128" in "".join(ticks())
    loss.locator("[data-option=x]").click()
    assert "2\u22128" not in "".join(ticks())
    assert loss.locator("[data-option=x]").inner_text() == "x: linear"


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (360, "dark")])
def test_the_page_is_open_to_all(browser: Any, study: Path, width: int, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    with opened(browser, study, width, scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
        page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
        page.locator("#runs tbody button").first.click()
        assert page.evaluate("document.documentElement.scrollWidth") == width
        found = Axe().run(page).response["violations"]
        assert [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")] == []


def test_the_switch_changes_the_theme_and_redraws(page: Any) -> None:
    page.locator("#filter").fill("seed=1")
    before = figure(page, "loss_vs_lr").locator("svg[role=img] rect").first.get_attribute("fill")
    page.evaluate(
        "const revoke = URL.revokeObjectURL; window.revoked = [];"
        "URL.revokeObjectURL = (address) => (revoked.push(address), revoke.call(URL, address)); null"
    )
    image = figure(page, "answers_along_factors").locator("img")
    address = image.get_attribute("src")
    page.get_by_role("button", name="Light or dark").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert figure(page, "loss_vs_lr").locator("svg[role=img] rect").first.get_attribute("fill") != before
    assert page.locator("#filter").input_value() == "seed=1"
    assert page.evaluate("revoked") == [address]
    assert image.get_attribute("src") != address
    assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 300


def test_print_is_dark_on_white(browser: Any, study: Path, tmp_path: Path) -> None:
    with opened(browser, study, scheme="dark") as page:
        page.evaluate(
            "addEventListener('beforeprint', () => (window.printed = "
            "document.querySelector('#figure-loss_vs_lr svg[role=img] rect').getAttribute('fill')))"
        )
        assert page.pdf()[:5] == b"%PDF-"
        assert page.evaluate("window.printed") == "#ffffff"
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_names_are_text_whatever_they_say(page: Any) -> None:
    assert page.locator("h1 script, h1 img").count() == 0
    assert page.locator("b").count() == 0
    assert page.get_by_role("group", name="Arms").get_by_role("button").nth(1).inner_text() == VECTORS


def test_a_live_page_follows_its_study_and_keeps_what_the_reader_chose(
    browser: Any, study_dict: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "_INTERVAL", 0.1)
    monkeypatch.setattr(watching, "_SHARE", 1.0)
    folder = StudyFolder(tmp_path / "study")
    with folder.locked():
        folder.claim(StudySpec.from_dict(study_dict()), [])
    first, second, third, running = cells_of(folder)[:4]
    lease = folder.attempts.begin(running.id, 6)
    with watching.Server(folder.path) as server:
        page = browser.new_page()
        asked, complaints = list[str](), list[str]()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(server.address)
        progress = page.get_by_role("region", name="Progress")
        progress.get_by_text("tiny: 0 of 10 cells").wait_for()
        assert running.id in progress.inner_text()
        assert "step 6" in progress.inner_text()
        assert "No run has ended yet" in page.locator("main").inner_text()
        end(folder, first)
        page.locator("output", has_text="1 of 1 run").first.wait_for()
        page.locator("#filter").fill("muP")
        figure(page, "curves").locator("[data-option=y]").click()
        page.evaluate("document.getElementById('figure-curves').scrollIntoView()")
        where = page.evaluate("document.getElementById('figure-curves').getBoundingClientRect().top")
        folder.record(second.id).write_text("{torn")
        end(folder, third)
        page.locator("output", has_text="2 of 2 runs").first.wait_for()
        assert page.locator("#filter").input_value() == "muP"
        assert figure(page, "curves").locator("[data-option=y]").inner_text() == "y: log"
        progress.get_by_text("damaged, not JSON").wait_for()
        progress.get_by_text("2 of 10 cells").wait_for()
        assert "1 damaged" in progress.inner_text()
        now = page.evaluate("document.getElementById('figure-curves').getBoundingClientRect().top")
        assert now == pytest.approx(where, abs=3)
        page.close()
    assert lease is not None
    lease.close("stopped")
    assert complaints == []
    assert {url.removeprefix(server.address) for url in asked} == {"", "state.json", "page.json"}
