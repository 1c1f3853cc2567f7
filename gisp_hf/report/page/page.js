"use strict";
// All texts go through textContent: nothing of the facts is ever parsed as HTML.
const facts = JSON.parse(document.getElementById("facts").textContent);
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function add(parent, tag, text, attributes = {}) {
  const svg = parent.namespaceURI === SVG || tag === "svg";
  const element = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== null && text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

const percent = (fraction, digits = 1) => `${(100 * fraction).toFixed(digits)} %`;
const whole = (number) => number.toLocaleString("en-US");
function shown(value) {
  if (value === null || value === undefined) return "–";
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(2);
  return value.toLocaleString("en-US", { maximumSignificantDigits: Math.abs(value) >= 1000 ? 6 : 4 });
}

function table(parent, head, rows) {
  const element = add(parent, "table");
  const top = add(add(element, "thead"), "tr");
  for (const cell of head) add(top, "th", cell, { scope: "col" });
  const body = add(element, "tbody");
  for (const row of rows) {
    const line = add(body, "tr");
    for (const cell of row) add(line, "td", cell);
  }
}

// ---- the top --------------------------------------------------------------------------------------------------------

const levels = [facts.dense, ...facts.levels]; // the unpruned model first
$("title").textContent = facts.title;
$("summary").append("Structured pruning of ");
if (facts.base.link) add($("summary"), "a", facts.base.name, { href: facts.base.link, rel: "noreferrer" });
else $("summary").append(facts.base.name);
$("summary").append(` (${facts.architecture}) by the method ${facts.method}, ${facts.steps}.`);

function levelTable() {
  const names = [...new Set(levels.flatMap((level) => Object.keys(level.metrics)))];
  const bytes = levels.some((level) => level.bytes);
  const restored = levels.some((level) => level.restored);
  const commits = levels.some((level) => level.commit);
  const head = ["level", "removed", "parameters", ...(bytes ? ["weights"] : []), ...(restored ? ["restored"] : [])];
  head.push(...names, ...(commits ? ["commit"] : []));
  const rows = levels.map((level) => {
    const row = [level.name, percent(level.removed), whole(level.parameters)];
    if (bytes) row.push(level.bytes ? `${(level.bytes / 1e6).toFixed(1)} MB` : "–");
    if (restored) row.push(level.restored ? "yes" : "no");
    row.push(...names.map((name) => shown(level.metrics[name])));
    if (commits) row.push(level.commit ? level.commit.slice(0, 8) : "–");
    return row;
  });
  table(add($("levels"), "div", null, { class: "scroll" }), head, rows);
  if (!names.length) add($("levels"), "p", "Nothing was measured yet: gisp-hf eval measures every level.", { class: "note" });
}

// ---- curves ---------------------------------------------------------------------------------------------------------

function ticks(low, high, log) {
  if (log) {
    const steps = high / low > 30 ? [1] : high / low > 8 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 7];
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const step of steps) found.push(step * 10 ** power);
    return found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
  }
  const raw = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw * 0.999);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(n * step);
  return found;
}

function chart(parent, { name, better, dense, series }) {
  const [width, height, left, right, top, bottom] = [340, 220, 50, 14, 12, 38];
  const values = [...series.flatMap((one) => one.points.map((point) => point[1])), ...(dense === null ? [] : [dense])];
  let [low, high] = [Math.min(...values), Math.max(...values)];
  const log = low > 0 && high > 1 && high / low >= 3;
  const pad = log ? (high / low) ** 0.06 : (high - low || Math.abs(high) || 1) * 0.08;
  [low, high] = log ? [low / pad, high * pad] : [low - pad, high + pad];
  const end = Math.max(...series.flatMap((one) => one.points.map((point) => point[0]))) * 1.03 || 1;
  const scale = log ? Math.log : (value) => value;
  const x = (value) => left + (value / end) * (width - left - right);
  const y = (value) => height - bottom - ((scale(value) - scale(low)) / (scale(high) - scale(low))) * (height - top - bottom);
  const figure = add(parent, "figure");
  add(figure, "h3", name);
  const hint = [better && `${better} is better`, log && "log scale"].filter(Boolean).join(", ");
  const svg = add(figure, "svg", null, { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${name} over sparsity` });
  for (const value of ticks(low, high, log)) {
    add(svg, "line", null, { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) });
    add(svg, "text", shown(Number(value.toPrecision(6))), { x: left - 6, y: y(value) + 4, "text-anchor": "end" });
  }
  for (const value of ticks(0, end, false))
    add(svg, "text", percent(value, 0), { x: x(value), y: height - bottom + 16, "text-anchor": "middle" });
  add(svg, "text", "sparsity", { x: (left + width - right) / 2, y: height - 5, "text-anchor": "middle" });
  if (dense !== null) add(svg, "line", null, { class: "dense", x1: left, x2: width - right, y1: y(dense), y2: y(dense) });
  series.forEach(({ points }, number) => {
    const style = `s${number % 4}`;
    add(svg, "polyline", null, { class: `line ${style}`, points: points.map(([a, b]) => `${x(a)},${y(b)}`).join(" ") });
    if (points.length > 40) return;
    for (const [a, b] of points)
      add(add(svg, "circle", null, { class: `dot ${style}`, cx: x(a), cy: y(b), r: 3.5 }), "title", `${percent(a)}: ${shown(b)}`);
  });
  const caption = add(figure, "figcaption");
  if (series.length > 1) series.forEach(({ label }, number) => add(caption, "span", label, { class: `key s${number % 4}` }));
  caption.append([dense === null ? "" : `dashed: unpruned, ${shown(dense)}`, hint].filter(Boolean).join("; "));
}

// ---- layers ---------------------------------------------------------------------------------------------------------

const cells = []; // {element, kind, layer}
function lost(kind, layer, level) {
  const size = kind.sizes[layer];
  return size ? 1 - (kind.kept[level] ?? kind.sizes)[layer] / size : 0;
}

function paint(element, fraction) {
  element.style.background = fraction > 0 ? `color-mix(in oklab, var(--full) ${Math.round(12 + 88 * fraction)}%, var(--empty))` : "";
}

function heatMap() {
  const count = facts.layers[0].sizes.length;
  const grid = add($("heat"), "div", null, { class: "heat" });
  grid.style.gridTemplateColumns = `repeat(${count}, minmax(8px, 1fr))`;
  for (const kind of facts.layers) {
    add(grid, "div", kind.kind, { class: "name" });
    kind.sizes.forEach((size, layer) => {
      const element = add(grid, "div", null, { class: size ? "cell" : "cell none" });
      if (size) cells.push({ element, kind, layer });
      for (const event of ["pointerenter", "click"]) element.addEventListener(event, () => read(layer));
    });
  }
  const step = [1, 2, 5, 10, 20, 50, 100].find((n) => count / n <= 16) ?? 500;
  for (let layer = 0; layer < count; layer++) add(grid, "div", layer % step ? "" : String(layer), { class: "number" });
  $("scale").append("removed:");
  for (const fraction of [0, 0.25, 0.5, 0.75, 1]) {
    paint(add($("scale"), "i"), fraction);
    if (fraction === 0 || fraction === 1) add($("scale"), "b", percent(fraction, 0));
  }
}

let pointed = null; // the layer that the readout is about
function read(layer) {
  pointed = layer;
  const level = levels[$("slider").value].name;
  const parts = facts.layers
    .filter((kind) => kind.sizes[layer])
    .map((kind) => `${whole((kind.kept[level] ?? kind.sizes)[layer])} of ${whole(kind.sizes[layer])} ${kind.kind}`);
  $("readout").textContent = `Layer ${layer} keeps ${parts.join(", ")}.`;
}

function choose(number) {
  const level = levels[number];
  $("slider").value = number;
  $("slider").setAttribute("aria-valuetext", level.name);
  $("chosen").textContent = `${level.name}, ${percent(level.removed)} removed`;
  for (const { element, kind, layer } of cells) {
    paint(element, lost(kind, layer, level.name));
    element.title = `layer ${layer}: ${percent(lost(kind, layer, level.name), 0)} of ${kind.kind} removed`;
  }
  if (pointed === null) $("readout").textContent = "Point at a layer, or tap it, to see its numbers.";
  else read(pointed);
  const head = ["layer", ...facts.layers.map((kind) => kind.kind)];
  const rows = facts.layers[0].sizes.map((_, layer) => [
    String(layer),
    ...facts.layers.map((kind) =>
      kind.sizes[layer] ? `${whole((kind.kept[level.name] ?? kind.sizes)[layer])} of ${whole(kind.sizes[layer])}` : "–"),
  ]);
  $("counts").replaceChildren();
  table($("counts"), head, rows);
}

// ---- answers and commands -------------------------------------------------------------------------------------------

function samples() {
  for (const { prompt, texts } of facts.samples) {
    if (prompt) add($("samples"), "blockquote", prompt, { dir: "auto" });
    const answers = add($("samples"), "div", null, { class: "answers" });
    for (const level of levels) {
      if (texts[level.name] === undefined) continue;
      const card = add(answers, "div");
      add(card, "h3", level.name);
      add(card, "p", texts[level.name].trimStart(), { dir: "auto" });
    }
  }
  $("samples").hidden = !facts.samples.length;
}

function commands(name) {
  $("select").value = name;
  $("commands").replaceChildren();
  for (const { title, text } of facts.commands[name]) {
    add($("commands"), "h3", title);
    add($("commands"), "pre", text, { tabindex: "0" });
  }
}

levelTable();
for (const one of facts.charts) chart(document.querySelector(".charts"), one);
$("curves").hidden = !facts.charts.length;
heatMap();
samples();
for (const level of facts.levels) add($("select"), "option", level.name, { value: level.name });
$("slider").max = levels.length - 1;
$("slider").addEventListener("input", () => choose(Number($("slider").value)));
$("select").addEventListener("change", () => commands($("select").value));
choose(levels.length - 1);
commands(facts.levels[0].name);
