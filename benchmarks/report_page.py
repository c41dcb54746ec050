"""How long the page of a report takes to make, to open and to filter, and how large it is, with many records.

    python benchmarks/report_page.py [--records 10000] [--json report_page.json]

The records are made up, with curves of the length that `train.log_every` leaves of a run of 3,000 steps. Opening lasts
from the request to the page with all figures; filtering from a letter typed to the rows of the table, and to the dots
of the figures. The browser is Chromium without a network, and without a GPU.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from environment import environment, headline, write_json
from playwright.sync_api import sync_playwright
from records import CELLS_OF_A_SEED, write_study

from lit_mult.analysis.page.document import document
from lit_mult.analysis.page.payload import payload
from lit_mult.analysis.report import drawn, read_content

LIMITS = {"page_seconds": 15.0, "megabytes": 15.0, "open_seconds": 3.0, "filter_seconds": 0.2}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
FILTERS = ("v", "vectors", "vectors lr<2^-6", "vectors lr<2^-6 seed=0|1|2", "", "loss<2.9 -muon")
_FILTER = """text => new Promise((done) => {
    const field = document.getElementById("filter");
    const start = performance.now();
    field.value = text;
    field.dispatchEvent(new Event("input"));
    const rows = performance.now() - start;
    const before = document.querySelector("#figure-loss_vs_lr svg[role=img]");
    const wait = () => (document.querySelector("#figure-loss_vs_lr svg[role=img]") === before
        ? requestAnimationFrame(wait) : done([rows / 1000, (performance.now() - start) / 1000]));
    wait();
})"""


def made(folder: Path, records: int) -> tuple[Path, dict[str, float]]:
    """The page of a made-up study, and what it took."""
    write_study(folder, records // CELLS_OF_A_SEED, log_every=1)
    start = time.perf_counter()
    content = drawn(read_content(folder))
    read, busy = time.perf_counter(), time.process_time()
    text = document(payload(content))
    page = folder / "report.html"
    page.write_text(text, encoding="utf-8")
    found = {"rest_seconds": read - start, "page_seconds": time.perf_counter() - read}
    found |= {"page_cpu_seconds": time.process_time() - busy, "megabytes": page.stat().st_size / 1e6}
    return page, found


def opened(page: Path, rounds: int) -> dict[str, float]:
    """Medians of seconds to open and to filter."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        times = list[float]()
        for _ in range(rounds):
            tab = browser.new_context(viewport={"width": 1440, "height": 900}, offline=True).new_page()
            start = time.perf_counter()
            tab.goto(page.as_uri())
            tab.locator("html[data-ready=yes]").wait_for()
            times.append(time.perf_counter() - start)
        filtered = [tab.evaluate(_FILTER, text) for text in FILTERS * rounds]
        browser.close()
    rows, dots = zip(*filtered, strict=True)
    return {
        "open_seconds": statistics.median(times),
        "filter_seconds": statistics.median(rows),
        "filter_seconds_at_most": max(rows),
        "filter_and_figures_seconds": statistics.median(dots),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000, help=f"a multiple of {CELLS_OF_A_SEED}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    about = environment("cpu", records=arguments.records, rounds=arguments.rounds)
    print(headline(about))
    with TemporaryDirectory() as folder:
        page, found = made(Path(folder, "growth"), arguments.records)
        found |= opened(page, arguments.rounds)
    results: list[dict[str, Any]] = []
    for name, value in found.items():
        limit = LIMITS.get(name)
        holds = "" if limit is None else f"<= {limit:g}: {'yes' if value <= limit else 'NO'}"
        print(f"| {name.replace('_', ' ')} | {value:.3g} | {holds} |")
        results.append({"name": name, "value": value, "limit": limit})
    write_json(arguments.json, about, results)


if __name__ == "__main__":
    main()
