// A live page asks its server how the study goes on, and takes a new report when there is one.

const EVERY = 2000; // milliseconds

/**
 * @param {Page} page
 * @param {string} version of the report that the page has; "" for none
 */
function live(page, version) {
  const node = h("section", { class: "live", id: "live", "aria-label": "Progress" });

  let undrawn = []; // what kept the last report from being drawn

  async function ask() {
    try {
      const state = await answerTo("/state.json");
      show(state);
      if (state.version && state.version !== version) {
        await take(await answerTo("/page.json"));
        show(state);
      }
    } catch (error) {
      node.replaceChildren(h("p", { class: "problem", role: "status" }, `no answer from lit-mult watch (${error.message}); asking again`));
    }
    setTimeout(ask, EVERY);
  }

  async function answerTo(address) {
    return (await fetch(address, { cache: "no-store" })).json();
  }

  /** Show a report. One that cannot be drawn is a problem, and is not asked for again: the next may do. */
  async function take(report) {
    version = report.version;
    undrawn = [];
    try {
      await page.receive(report);
    } catch (error) {
      undrawn = [`the page cannot draw this report (${error.message})`];
      console.error(error);
    }
  }

  function show({ name, cells, ended, running, waiting, interrupted, failed, sweeps, seconds_left: left, problems: reported }) {
    const problems = [...reported, ...undrawn];
    const done = Object.entries(ended).reduce((sum, [status, count]) => sum + (status === "damaged" ? 0 : count), 0);
    const all = Math.max(cells, done + running.length + Object.keys(failed).length);
    const bar = h("progress", { max: Math.max(all, 1), value: done, "aria-label": "Cells done" });
    const counts = [...Object.entries(ended), ["running", running.length], ["waiting", waiting], ["failed", Object.keys(failed).length]].filter(([, count]) => count);
    const eta = left === null ? (done < all ? (sweeps ? "time left unknown yet" : "no sweep is running") : "done") : `about ${durationText(Math.round(left))} left`;
    const rows = running.map((cell) => h("tr", {}, h("th", { scope: "row" }, cell.cell), h("td", {}, `${cell.machine}, process ${cell.pid}`), h("td", {}, durationText(Math.round(cell.seconds))), h("td", {}, cell.step === null ? "–" : `step ${cell.step.toLocaleString("en-US")}`)));
    const put = (title, entries) => (entries.length ? h("details", {}, h("summary", {}, h("h3", {}, title), " ", h("span", { class: "note" }, String(entries.length))), h("ul", { class: "sentences" }, ...entries.map((line) => h("li", {}, line)))) : null);
    const open = [...node.querySelectorAll("details")].filter((one) => one.open).map((one) => one.querySelector("h3").textContent);
    node.replaceChildren(
      h("div", { class: "live-head" }, h("span", { class: sweeps ? "beat on" : "beat" }), h("strong", {}, `${name}: ${done.toLocaleString("en-US")} of ${plural(all, "cell")}`), h("span", { class: "note" }, eta)),
      bar,
      h("p", { class: "note" }, counts.map(([what, count]) => `${count.toLocaleString("en-US")} ${what}`).join(" · ")),
      ...(rows.length ? [h("div", { class: "wide", tabindex: 0, role: "group", "aria-label": "Running cells" }, h("table", {}, h("thead", {}, h("tr", {}, ...["running", "where", "for", "checkpoint"].map((title) => h("th", { scope: "col" }, title)))), h("tbody", {}, ...rows)))] : []),
      ...[put("Failed", Object.entries(failed).map(([cell, reason]) => `${cell}: ${reason}`)), put("Interrupted", Object.entries(interrupted).map(([cell, step]) => `${cell}: resumes from ${step ? `step ${step}` : "the start"}`)), put("Problems", problems)].filter(Boolean),
    );
    for (const one of node.querySelectorAll("details")) one.open = open.includes(one.querySelector("h3").textContent) || one.querySelector("h3").textContent === "Problems";
  }

  return { node, ask };
}
