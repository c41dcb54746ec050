// A figure on the page: drawn to its width, asked with mouse, finger or arrow keys, saved as SVG, PNG or CSV.

const NEAR = 26; // pixels within which a dot answers

/**
 * @param {string} name of one of FIGURES
 * @param {Page} page
 * @returns {{node: HTMLElement, update: () => void}}
 */
function figureCard(name, page) {
  const about = FIGURES[name];
  const on = (page.options[name] ??= { ...about.options });
  const choices = about.choices?.(page.data) ?? [];
  let choice = choices.includes(page.choices[name]) ? page.choices[name] : (choices.find((one) => one.includes("weight_rms")) ?? choices[0]);
  /** @type {Drawing} */
  let drawing;
  let figure;
  let width = 0;
  let current = -1;

  const switches = Object.keys(about.options).map((option) => {
    const label = () => (option === "smooth" ? (on.smooth ? "smoothed" : "every point") : `${option}: ${on[option] ? "log" : "linear"}`);
    const button = h("button", { type: "button", class: "small", "data-option": option, onclick: change }, label());
    function change() {
      on[option] = !on[option];
      button.textContent = label();
      update();
    }
    return button;
  });
  const picker = choices.length > 1 && h("select", { "aria-label": `What ${about.title} shows`, onchange: pick }, ...choices.map((one) => h("option", { value: one, selected: one === choice }, one)));
  function pick(event) {
    page.choices[name] = choice = event.target.value;
    update();
  }
  const save = (ending, make) => h("button", { type: "button", class: "small", "aria-label": `Save ${about.title} as ${ending}`, onclick: make }, ending);
  const tools = h("div", { class: "tools" }, picker || null, ...switches,
    save("SVG", () => offer(`${name}.svg`, svgText(drawing.svg), "image/svg+xml")),
    save("PNG", async () => offer(`${name}.png`, await png(drawing.svg), "image/png")),
    save("CSV", () => offer(`${name}.csv`, csv(figure.data), "text/csv")));
  const canvas = h("div", { class: "canvas", tabindex: 0, role: "group", "aria-label": `${about.title}: arrow keys step through its points, Enter opens a run`, onmousemove: hover, onmouseleave: leave, onclick: open, onkeydown: step, onblur: leave });
  const caption = page.data.captions[name] && name !== "loss_vs_lr" && name !== "sensitivity" ? page.data.captions[name] : about.caption;
  const node = h("figure", { class: "card", id: `figure-${name}` }, h("div", { class: "card-head" }, h("h3", {}, about.title), tools), canvas, h("figcaption", {}, ...marked(caption)));

  function update() {
    width = Math.floor(canvas.clientWidth) || 900;
    const view = { data: page.data, armsOff: page.armsOff, seedsOff: page.seedsOff, matches: page.matches, on, choice, curve: page.curve };
    figure = about.build(view);
    drawing = draw(figure, width, page.theme(), caption);
    current = -1;
    canvas.replaceChildren(drawing.svg);
  }

  function nearest(event) {
    const box = drawing.svg.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top].map((value) => (value * width) / box.width);
    let found = -1;
    let least = NEAR * NEAR;
    drawing.hits.forEach((hit, place) => {
      const distance = (hit.x - x) ** 2 + (hit.y - y) ** 2;
      if (distance < least && !hit.dot.faint) [found, least] = [place, distance];
    });
    return found;
  }

  function show(place) {
    current = place;
    drawing.svg.querySelector(".ring")?.remove();
    if (place < 0) return page.tip.hide();
    const { x, y, dot } = drawing.hits[place];
    drawing.svg.append(s("circle", { class: "ring", cx: x, cy: y, r: 7, fill: "none", stroke: INKS[page.theme()].ink, "stroke-width": 1.5 }));
    const box = drawing.svg.getBoundingClientRect();
    page.tip.show(dot.text().concat(dot.run === undefined ? [] : ["click or Enter: the run"]), box.left + (x * box.width) / width, box.top + (y * box.width) / width);
  }

  function hover(event) {
    const place = nearest(event);
    if (place !== current) show(place);
  }

  function leave() {
    if (drawing) show(-1);
  }

  function open(event) {
    const place = nearest(event);
    show(place);
    if (place >= 0 && drawing.hits[place].dot.run !== undefined) page.openRun(drawing.hits[place].dot.run, canvas);
  }

  function step(event) {
    const count = drawing.hits.length;
    const moves = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    if (event.key in moves && count) {
      event.preventDefault();
      let place = Math.max(current, moves[event.key] > 0 ? -1 : 0);
      for (let tried = 0; tried < count; tried++) {
        place = (place + moves[event.key] + count) % count;
        if (!drawing.hits[place].dot.faint) return show(place);
      }
    } else if (event.key === "Enter" && current >= 0 && drawing.hits[current].dot.run !== undefined) {
      page.openRun(drawing.hits[current].dot.run, canvas);
    } else if (event.key === "Escape") leave();
  }

  new ResizeObserver(() => {
    if (canvas.clientWidth && Math.abs(canvas.clientWidth - width) > 1) update();
  }).observe(canvas);
  return { node, update };
}

/** A figure of the report as it is, which the page cannot draw anew; the address of its image joins `addresses`. */
function staticCard({ name, caption, svg, png }, addresses) {
  const title = sentence(name.replaceAll("_", " "));
  const bytes = svg ? new TextEncoder().encode(svg) : decoded(png);
  const type = svg ? "image/svg+xml" : "image/png";
  const blob = new Blob([bytes], { type });
  const address = URL.createObjectURL(blob);
  addresses.push(address);
  const image = h("img", { src: address, alt: caption || title });
  const save = svg
    ? [
        h("button", { type: "button", class: "small", "aria-label": `Save ${title} as SVG`, onclick: () => offer(`${name}.svg`, blob) }, "SVG"),
        h("button", { type: "button", class: "small", "aria-label": `Save ${title} as PNG`, onclick: async () => offer(`${name}.png`, await rastered(image.src, image.naturalWidth, image.naturalHeight)) }, "PNG"),
      ]
    : [h("button", { type: "button", class: "small", "aria-label": `Save ${title} as PNG`, onclick: () => offer(`${name}.png`, blob) }, "PNG")];
  return h("figure", { class: "card", id: `figure-${name}` }, h("div", { class: "card-head" }, h("h3", {}, title), h("div", { class: "tools" }, ...save)), h("div", { class: "paper" }, image), h("figcaption", {}, ...marked(caption)));
}

function svgText(svg) {
  const copy = svg.cloneNode(true);
  copy.querySelector(".ring")?.remove();
  copy.setAttribute("xmlns", SVG);
  return `<?xml version="1.0" encoding="UTF-8"?>\n${new XMLSerializer().serializeToString(copy)}`;
}

function png(svg) {
  const source = URL.createObjectURL(new Blob([svgText(svg)], { type: "image/svg+xml" }));
  return rastered(source, svg.width.baseVal.value, svg.height.baseVal.value).finally(() => URL.revokeObjectURL(source));
}

/** @returns {Promise<Blob>} a PNG of an image, two pixels for each of its own */
async function rastered(source, width, height) {
  const image = new Image();
  image.src = source;
  await image.decode();
  const canvas = h("canvas", { width: 2 * width, height: 2 * height });
  canvas.getContext("2d").drawImage(image, 0, 0, 2 * width, 2 * height);
  return new Promise((made) => canvas.toBlob(made, "image/png"));
}
