// Elements, text and files. Text becomes text nodes, never markup: nothing that a study is called can run.

const SVG = "http://www.w3.org/2000/svg";

/**
 * An HTML element.
 * @param {string} tag
 * @param {Object<string, any>} attributes functions listen to the event of their name ("onclick"); null leaves out
 * @param {...(Node|string|null)} children
 * @returns {any}
 */
function h(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** An SVG element, as `h`. */
function s(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Text with **strong**, *emphasis* and `code`, as nodes. */
function marked(text) {
  const tags = { "**": "strong", "*": "em", "`": "code" };
  return text.split(/(\*\*[^*]+\*\*|\*[^*\s][^*]*\*|`[^`]+`)/).map((part) => {
    const mark = part.length > 2 && Object.keys(tags).find((one) => part.startsWith(one) && part.endsWith(one));
    return mark ? h(tags[mark], {}, part.slice(mark.length, -mark.length)) : part;
  });
}

/** A number for people: four digits, and powers of ten only where they are shorter. */
function written(value, digits = 4) {
  if (value === null || value === undefined || value === "") return "–";
  if (typeof value !== "number") return String(value);
  if (!Number.isFinite(value)) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return value.toLocaleString("en-US");
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e6)) return value.toExponential(digits - 2).replace(/\.?0+e\+?/, "e").replace(/e\+/, "e");
  return String(Number(value.toPrecision(digits)));
}

/** A loss in nats per token: four decimals. */
function lossText(value) {
  return Number.isFinite(value) ? value.toFixed(4) : "–";
}

/** A learning rate, as the filter reads it: a power of two where that is near enough, 2^-6.25, or else three digits. */
function rateText(rate) {
  const quarters = Math.log2(rate) * 4;
  return Math.abs(quarters - Math.round(quarters)) < 0.02 ? `2^${Math.round(quarters) / 4}` : written(rate, 3);
}

function durationText(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds < 90) return `${written(seconds, 3)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function plural(count, noun) {
  return `${count.toLocaleString("en-US")} ${noun}${count === 1 ? "" : "s"}`;
}

/** Offer a file for download. */
function offer(name, content, type) {
  const blob = content instanceof Blob ? content : new Blob([content], { type });
  const address = URL.createObjectURL(blob);
  const link = h("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

/** CSV of rows that are objects; the columns are those of the first. */
function csv(rows) {
  if (!rows.length) return "";
  const names = Object.keys(rows[0]);
  const cell = (value) => {
    const text = value === null || value === undefined ? "" : String(value);
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [names, ...rows.map((row) => names.map((name) => row[name]))].map((row) => row.map(cell).join(",")).join("\n") + "\n";
}

/** A button that copies a text, also from file://. */
function copyButton(text, label = "Copy") {
  const button = h("button", { type: "button", class: "small", onclick: copy }, label);
  async function copy() {
    try {
      await navigator.clipboard.writeText(text());
    } catch {
      const area = h("textarea", { class: "offscreen" });
      area.value = text();
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
      button.focus();
    }
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = label), 1500);
  }
  return button;
}
