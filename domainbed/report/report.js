"use strict";
const PER_PAGE = 50;
const COLORS = 7;
const DASHES = ["", "4 5", "0 5", "6 5 0 5"];  // round ends lengthen each dash by the width of the line, 2
const SHAPES = ["circle", "square", "diamond", "triangle"];
const byId = (id) => document.getElementById(id);
const json = (id) => JSON.parse(byId(id).textContent);
const percent = (value) => (value == null ? "–" : (100 * value).toFixed(1));
const runLink = (name) => `#run/${encodeURIComponent(name).replaceAll("'", "%27")}`;
const index = json("index");

// An element; all text goes through text nodes, so nothing that a run is called is ever read as HTML.
function make(name, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "g", "title"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// --- colours of the page

function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  byId("theme").textContent = dark ? "Light colours" : "Dark colours";
}

function startTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  let kept = null;
  try { kept = localStorage.getItem("theme"); } catch { /* a page from a file may have no storage */ }
  setTheme(kept ? kept === "dark" : system.matches);
  system.addEventListener("change", (event) => { if (!kept) setTheme(event.matches); });
  byId("theme").addEventListener("click", () => {
    kept = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    setTheme(kept === "dark");
    try { localStorage.setItem("theme", kept); } catch { /* then only until the page is left */ }
  });
}

// --- sorting and filtering

function numberIn(text) {
  const match = /^[+<>≤≥≈~]?\s*(-?\d[\d,]*\.?\d*(?:e[+-]?\d+)?)/i.exec(text.replace("−", "-"));
  return match ? Number(match[1].replaceAll(",", "")) : NaN;
}

// Numbers before texts before what is missing, in either direction.
function comparison(sign) {
  const rank = (value) => (value === null ? 2 : typeof value === "string" ? 1 : 0);
  return (a, b) => {
    if (rank(a) !== rank(b)) return rank(a) - rank(b);
    if (a === null) return 0;
    return sign * (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
  };
}

function cellKey(cell, column) {
  if (cell.dataset.v !== undefined) return Number(cell.dataset.v);
  const text = cell.textContent.trim();
  if (!text || cell.querySelector(".missing")) return null;
  const number = column === 0 ? NaN : numberIn(text);
  return Number.isNaN(number) ? text : number;
}

function turn(heads, head) {
  const next = head.getAttribute("aria-sort") === "descending" ? "ascending" : "descending";
  heads.forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", next);
  return next === "ascending" ? 1 : -1;
}

function sortTable(table, head) {
  const column = head.cellIndex;
  const compare = comparison(turn(table.querySelectorAll("thead th"), head));
  const rows = [...table.tBodies[0].rows].map((row) => [cellKey(row.cells[column], column), row]);
  rows.sort((a, b) => compare(a[0], b[0]));
  table.tBodies[0].append(...rows.map(([, row]) => row));
}

function filterTable(input) {
  const block = byId(input.dataset.table);
  const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = [...block.querySelector("tbody").rows];
  for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
  const shown = rows.filter((row) => !row.hidden).length;
  input.parentElement.querySelector(".count").textContent = words.length ? `${shown} of ${rows.length} rows` : "";
}

function startTables() {
  document.addEventListener("click", (event) => {
    const button = event.target.closest("table.sortable .sort");
    if (button) sortTable(button.closest("table"), button.closest("th"));
  });
  document.querySelectorAll("input[data-table]").forEach((input) => input.addEventListener("input", () => filterTable(input)));
}

// --- the list of runs

const list = { key: null, sign: 1, page: 0 };

function badge(state) {
  return make("span", { class: `badge ${state}` }, make("span", { "aria-hidden": "true" }, index.symbols[state]), ` ${state}`);
}

function runCell(run, key) {
  if (key === "name") return make("th", { scope: "row" }, make("a", { href: runLink(run.name) }, run.name.slice(0, 10)));
  if (key === "state") return make("td", {}, badge(run.state));
  if (key === "aa" || key === "wga") return make("td", {}, percent(run[key]));
  return make("td", {}, String(run[key] ?? "–"));
}

function wantedRuns() {
  const wanted = Object.fromEntries([...document.querySelectorAll("#run-filters [data-key]")].map((e) => [e.dataset.key, e.value]));
  const words = wanted.text.toLowerCase().split(/\s+/).filter(Boolean);
  const found = index.runs.filter((run) =>
    ["state", "dataset", "row"].every((key) => !wanted[key] || run[key] === wanted[key]) &&
    words.every((word) => `${run.name} ${run.row} ${run.dataset} ${run.state} ${run.seed}`.toLowerCase().includes(word)));
  const compare = comparison(list.sign);
  return list.key ? found.sort((a, b) => compare(a[list.key] ?? null, b[list.key] ?? null)) : found;
}

function showRuns() {
  const found = wantedRuns();
  const pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
  list.page = Math.min(Math.max(0, list.page), pages - 1);
  const keys = [...document.querySelectorAll("#run-table .sort")].map((button) => button.dataset.key);
  const shown = found.slice(list.page * PER_PAGE, (list.page + 1) * PER_PAGE);
  byId("run-table").tBodies[0].replaceChildren(...shown.map((run) => make("tr", {}, ...keys.map((key) => runCell(run, key)))));
  byId("run-count").textContent = `${found.length} of ${index.runs.length} jobs`;
  byId("run-page-number").textContent = `Page ${list.page + 1} of ${pages}`;
  document.querySelector('[data-go="-1"]').disabled = list.page === 0;
  document.querySelector('[data-go="1"]').disabled = list.page === pages - 1;
}

function startRuns() {
  for (const select of document.querySelectorAll("#run-filters select")) {
    const values = [...new Set(index.runs.map((run) => run[select.dataset.key]))].sort();
    select.append(...values.map((value) => make("option", { value }, value)));
  }
  byId("run-filters").addEventListener("input", () => { list.page = 0; showRuns(); });
  byId("run-filters").addEventListener("submit", (event) => event.preventDefault());
  byId("run-table").tHead.addEventListener("click", (event) => {
    const button = event.target.closest(".sort");
    if (!button) return;
    list.sign = turn(byId("run-table").querySelectorAll("thead th"), button.closest("th"));
    list.key = button.dataset.key;
    showRuns();
  });
  document.querySelectorAll("[data-go]").forEach((button) => button.addEventListener("click", () => {
    list.page += Number(button.dataset.go);
    showRuns();
  }));
  showRuns();
}

// --- charts

const AREA = { left: 44, top: 12, width: 420, height: 250 };

function scales([x0, x1], [y0, y1]) {
  return {
    x: (value) => AREA.left + ((value - x0) / (x1 - x0 || 1)) * AREA.width,
    y: (value) => AREA.top + AREA.height - ((value - y0) / (y1 - y0 || 1)) * AREA.height,
  };
}

function ticks([low, high], least = 0, count = 5) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(least, power * [1, 2, 5, 10].find((factor) => factor * power >= rough));
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => (first + i) * step);
}

function axes(xRange, yRange, at, xTitle, yTitle, xText, yText, xLeast = 0) {
  const { left, top, width, height } = AREA;
  const parts = [];
  for (const value of ticks(yRange)) {
    const y = at.y(value);
    parts.push(make("line", { class: "grid", x1: left, x2: left + width, y1: y, y2: y }));
    parts.push(make("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, yText(value)));
  }
  for (const value of ticks(xRange, xLeast)) {
    parts.push(make("line", { class: "axis", x1: at.x(value), x2: at.x(value), y1: top + height, y2: top + height + 4 }));
    parts.push(make("text", { x: at.x(value), y: top + height + 17, "text-anchor": "middle" }, xText(value)));
  }
  parts.push(make("text", { x: left + width / 2, y: top + height + 36, "text-anchor": "middle" }, xTitle));
  parts.push(make("text", { x: 10, y: top + height / 2, "text-anchor": "middle", transform: `rotate(-90 10 ${top + height / 2})` }, yTitle));
  return make("g", { "aria-hidden": "true" }, ...parts);
}

const frame = (attributes, ...children) =>
  make("svg", { viewBox: `0 0 ${AREA.left + AREA.width + 12} ${AREA.top + AREA.height + 44}`, ...attributes }, ...children);

// The path of a line, with gaps where nothing was measured.
function linePath(steps, values, at) {
  let pen = "M";
  return values.map((value, i) => {
    if (value === null) { pen = "M"; return ""; }
    const part = `${pen}${at.x(steps[i]).toFixed(1)} ${at.y(value).toFixed(1)}${pen === "M" ? "h0" : ""}`;  // h0: a dot where no line follows
    pen = "L";
    return part;
  }).join("");
}

const lineStyle = (i) => ({
  fill: "none", "stroke-width": 2, "stroke-linecap": "round", style: `stroke: var(--s${i % COLORS})`,
  "stroke-dasharray": DASHES[i % DASHES.length] || null,
});

// Lines over steps with a box to tick for each; series: [name, values, shown].
function lineChart(title, run, series) {
  const xRange = [run.steps[0], run.steps[run.steps.length - 1] || 1];
  const at = scales(xRange, [0, 1]);
  const lines = series.map(([name, values, shown], i) => {
    const line = make("path", { ...lineStyle(i), d: linePath(run.steps, values, at) }, make("title", {}, name));
    line.style.display = shown ? "" : "none";
    return line;
  });
  const taken = run.chosen == null ? null : at.x(run.steps[run.chosen]);
  const mark = taken === null ? null : make("line", { class: "axis", "stroke-dasharray": "1 3", x1: taken, x2: taken, y1: AREA.top, y2: AREA.top + AREA.height });
  const whole = (value) => String(Math.round(value));
  const legend = make("ul", { class: "legend" }, ...series.map(([name, , shown], i) => {
    const box = make("input", { type: "checkbox", checked: shown });
    box.addEventListener("change", () => { lines[i].style.display = box.checked ? "" : "none"; });
    const sample = make("svg", { viewBox: "0 0 32 14", "aria-hidden": "true" }, make("path", { ...lineStyle(i), d: "M0 7L32 7" }));
    return make("li", {}, make("label", {}, box, sample, name));
  }));
  return make("div", { class: "chart" }, make("h3", {}, title),
    frame({ role: "img", "aria-label": `${title}; the numbers stand in the table below.` },
      axes(xRange, [0, 1], at, "step", "percent", whole, (value) => whole(100 * value), 1), mark, ...lines), legend);
}

function markPath(shape, x, y, r = 5) {
  if (shape === "square") return `M${x - r} ${y - r}h${2 * r}v${2 * r}h${-2 * r}z`;
  if (shape === "diamond") return `M${x} ${y - 1.3 * r}L${x + 1.3 * r} ${y}L${x} ${y + 1.3 * r}L${x - 1.3 * r} ${y}z`;
  if (shape === "triangle") return `M${x} ${y - 1.2 * r}L${x + 1.2 * r} ${y + r}L${x - 1.2 * r} ${y + r}z`;
  return `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`;
}

const around = (values) => {
  const low = Math.min(...values), high = Math.max(...values), room = Math.max(0.02, 0.06 * (high - low));
  return [Math.max(-0.01, low - room), Math.min(1.01, high + room)];
};

function scatterChart(plot) {
  const style = (row) => index.rows.indexOf(row);
  const all = Object.values(plot.rows).flat();
  const ranges = [around(all.map((point) => point[0])), around(all.map((point) => point[1]))];
  const at = scales(...ranges);
  const says = make("p", { class: "says", role: "status" });
  const look = (i) => ({ fill: `var(--s${i % COLORS})`, shape: SHAPES[i % SHAPES.length] });
  const points = Object.entries(plot.rows).flatMap(([row, found]) => found.map(([aa, wga, trial, name]) => {
    const text = `${row}, trial ${trial}: AA ${percent(aa)}, WGA ${percent(wga)}`;
    const { fill, shape } = look(style(row));
    const attributes = { class: "point", d: markPath(shape, at.x(aa), at.y(wga)), style: `fill: ${fill}`, tabindex: -1, role: "link", "aria-label": text };
    const point = make("path", attributes, make("title", {}, text));
    const tell = () => { says.textContent = text; };
    const open = () => { if (name) location.hash = runLink(name); };
    point.addEventListener("mouseenter", tell);
    point.addEventListener("focus", tell);
    point.addEventListener("click", open);
    point.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Enter") open();
      if (!move) return;
      event.preventDefault();
      const next = points[(points.indexOf(point) + move + points.length) % points.length];
      point.setAttribute("tabindex", -1);
      next.setAttribute("tabindex", 0);
      next.focus();
    });
    return point;
  }));
  if (points.length) points[0].setAttribute("tabindex", 0);
  const legend = make("ul", { class: "legend" }, ...Object.keys(plot.rows).map((row) => {
    const { fill, shape } = look(style(row));
    return make("li", {}, make("svg", { viewBox: "0 0 32 14", "aria-hidden": "true" }, make("path", { d: markPath(shape, 16, 7), style: `fill: ${fill}` })), ` ${row}`);
  }));
  const label = `${plot.title}: worst-group accuracy by average accuracy, ${points.length} points; the tables hold the means.`;
  return make("div", { class: "chart" }, make("h4", {}, plot.title),
    frame({ role: "group", "aria-label": label }, axes(...ranges, at, "AA (percent)", "WGA (percent)", percentTick, percentTick), ...points), says, legend);
}

const percentTick = (value) => String(Math.round(1000 * value) / 10);

// --- the page of one run

function numbers(title, header, rows) {
  const head = header.map((text) => make("th", { scope: "col" }, text));
  const body = rows.map(([first, ...cells]) => make("tr", {}, make("th", { scope: "row" }, String(first)), ...cells.map((cell) => make("td", {}, String(cell)))));
  return make("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": title },
    make("table", {}, make("caption", {}, title), make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body)));
}

function facts(title, entries) {
  const lines = Object.entries(entries ?? {}).flatMap(([key, value]) => [make("dt", {}, key), make("dd", {}, String(value))]);
  return lines.length ? [make("h3", {}, title), make("dl", {}, ...lines)] : [];
}

function text(title, lines, wrap = false) {
  return lines?.length ? [make("h3", {}, title), make("pre", { class: wrap ? "wrap" : null, tabindex: "0" }, [lines].flat().join("\n"))] : [];
}

function curveParts(run) {
  if (!run.steps) return [make("p", {}, "No records yet.")];
  const series = Object.entries(run.series).map(([name, values]) => [name, values, true]);
  const groups = run.groups.map(([name, values]) => [name, values, true]);
  const taken = run.chosen == null ? "No checkpoint can be judged on validation." : `Validation takes step ${run.steps[run.chosen]}: the dotted line.`;
  const all = [...series, ...groups];
  const rows = run.steps.map((step, i) => [step, ...all.map(([, values]) => percent(values[i]))]);
  const header = ["Group", "Training images", "Validation images", "Test images", "Validation accuracy", "Test accuracy", "Test accuracy at the end"];
  const cells = run.table.map(([name, ...rest]) => [name, ...rest.slice(0, 3), ...rest.slice(3).map(percent)]);
  return [
    make("p", {}, taken),
    make("div", { class: "charts" }, lineChart("Accuracy", run, series), groups.length ? lineChart("Test accuracy of each group", run, groups) : null),
    make("details", {}, make("summary", {}, "The curves as a table"), numbers("Percent by step", ["Step", ...all.map(([name]) => name)], rows)),
    cells.length ? make("h3", {}, "Groups") : null,
    cells.length ? numbers("Percent at the step that validation takes, and at the last one", header, cells) : null,
  ];
}

function runPage(position) {
  const line = index.runs[position];
  const run = json(`run-${position}`);
  const sizes = Object.fromEntries(Object.entries(run.models ?? {}).map(([name, bytes]) => [name, `${(bytes / 1e6).toFixed(2)} MB`]));
  const parts = [
    make("p", {}, make("a", { href: "#runs" }, "All runs")),
    make("h2", { id: "run-title", tabindex: "-1" }, `${line.row} on ${line.dataset}`),
    make("p", {}, badge(line.state), ` ${line.name}`),
    run.error ? make("p", {}, make("code", {}, run.error)) : null,
    ...facts("Run", { "test environments": line.envs, trial: line.trial ?? "–", "draw of hparams": line.draw ?? "–", seed: line.seed ?? "–", ...run.status }),
    ...curveParts(run),
    ...text("Command", run.command, true),
    ...facts("Hparams", run.hparams), ...facts("Arguments", run.args), ...facts("Model files", sizes),
    ...text("Last lines of out.txt", run.out), ...text("Last lines of err.txt", run.err),
  ];
  byId("run").replaceChildren(...parts.filter(Boolean));
}

function route() {
  if (location.hash === "#main") return;  // the link past the navigation stays on the page that is shown
  const name = /^#run\/(.+)$/.exec(location.hash)?.[1];
  const position = name === undefined ? -1 : index.runs.findIndex((run) => runLink(run.name) === `#run/${name}`);
  byId("overview").hidden = position >= 0;
  byId("run").hidden = position < 0;
  if (position >= 0) {
    runPage(position);
    scrollTo(0, 0);
    byId("run-title").focus();
  } else {
    byId("run").replaceChildren();
    if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
  }
}

document.documentElement.classList.remove("no-js");
startTheme();
startTables();
startRuns();
byId("scatter")?.append(...index.plots.map(scatterChart));
addEventListener("hashchange", route);
route();
