"use strict";
// Shows what Python computed: unpacks the data, sorts tables, fills in differences, compares two runs.

const $ = (id) => document.getElementById(id);
const all = (query, root = document) => [...root.querySelectorAll(query)];

// Data lie in the page as gzip in base64: a third of their size.
async function unpacked(id) {
  const bytes = Uint8Array.from(atob($(id).textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null && value !== false) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function options(select, entries, chosen) {
  select.replaceChildren(...entries.map(([value, text]) => element("option", { value }, text)));
  if (chosen !== undefined) select.value = String(chosen);
}

// tables

function sortTable(table, column, header) {
  const down = header.getAttribute("aria-sort") === "ascending";
  all("th", table).forEach((th) => th.removeAttribute("aria-sort"));
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = (row) => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
  const order = (a, b) => {
    const [one, two] = [key(a), key(b)];
    if (one === "" || two === "") return (one === "") - (two === ""); // what is empty comes last either way
    const [x, y] = [Number(one), Number(two)];
    const numbers = !Number.isNaN(x) && !Number.isNaN(y);
    const found = numbers ? x - y : one.localeCompare(two, undefined, { numeric: true });
    return down ? -found : found;
  };
  const body = table.tBodies[0];
  body.append(...[...body.rows].sort(order));
}

function makeSortable() {
  for (const table of all("table.sortable")) {
    all("th", table).forEach((header, column) => {
      header.querySelector("button")?.addEventListener("click", () => sortTable(table, column, header));
    });
  }
}

function written(value, digits, sign = false) {
  if (value === null) return "";
  const size = Math.abs(value);
  const mark = value < 0 ? "−" : sign && value > 0 ? "+" : "";
  if (size && size < 0.5 * 10 ** -digits) return mark + size.toPrecision(2);
  return mark + size.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function showDifferences(data) {
  const base = $("baseline").value;
  $("baseline-note").hidden = base === "";
  $("baseline-name").textContent = data.rows[Number(base)];
  for (const row of all("#table-results tbody tr")) {
    row.classList.toggle("base", row.dataset.row === base);
    data.columns.forEach((column, number) => {
      const place = row.querySelector(`td[data-col="${number}"] .delta`);
      place.textContent = "";
      place.className = "delta";
      if (base === "" || row.dataset.row === base) return;
      const [i, j] = [Number(row.dataset.row), Number(base)];
      const pair = data.pairs[column.metric]?.[`${Math.max(i, j)},${Math.min(i, j)}`];
      if (!pair || pair[0] === null) return;
      const [mean, half, n] = [i > j ? pair[0] : -pair[0], pair[1], pair[2]];
      const spread = half === null ? "" : ` ± ${written(half, column.decimals)}`;
      place.replaceChildren(`${written(mean, column.decimals, true)}${spread} `, element("span", { class: "n" }, `(n = ${n})`));
      if (half !== null && Math.abs(mean) > half && column.better && !column.by_definition) {
        place.classList.add((mean < 0) === (column.better === "lower") ? "better" : "worse");
      }
    });
  }
}

function chooseColumns() {
  const shown = new Set(all("#columns input:checked").map((box) => box.value));
  for (const cell of all("#results [data-col]")) cell.hidden = !shown.has(cell.dataset.col);
}

// two runs

const SECTIONS = { config: "Config", code: "Code", data: "Data", environment: "Environment" };

function partingText(step) {
  return step === -2 ? "never measured at one step" : step === -1 ? "never" : step.toLocaleString("en");
}

function partingTable(compare, a, b) {
  const percent = 100 * compare.tolerance;
  const head = ["first step at which they differ", "as written", `by more than ${percent} %`];
  const rows = compare.metrics.map((metric) => {
    const cells = [compare.parts, compare.drifts].map((matrix) => partingText(matrix[metric][a][b]));
    return element("tr", {}, ...[metric, ...cells].map((text) => element("td", {}, text)));
  });
  return table(head, rows);
}

function table(head, rows, kind = "") {
  const header = element("thead", {}, element("tr", {}, ...head.map((text) => element("th", {}, text))));
  return element("div", { class: "scroll" }, element("table", { class: `compared ${kind}` }, header, element("tbody", {}, ...rows)));
}

// Two texts from the line on in which they part, as far as a table can show them.
const LINES = 8;

function apart(...texts) {
  const lines = texts.map((text) => (text === undefined ? ["–"] : text.split("\n")));
  let first = 0;
  while (first < Math.min(lines[0].length, lines[1].length) - 1 && lines[0][first] === lines[1][first]) first += 1;
  return lines.map((own) => {
    const rest = own.length - first - LINES;
    const before = first ? [`… ${first} equal ${first === 1 ? "line" : "lines"}`] : [];
    return [...before, ...own.slice(first, first + LINES), ...(rest > 0 ? [`… ${rest} more`] : [])].join("\n");
  });
}

function compareRuns(data) {
  const [a, b] = [Number($("run-a").value), Number($("run-b").value)];
  const compare = data.compare;
  const parts = [];
  if (a === b) {
    parts.push(element("p", {}, "This is one run; choose another."));
  } else if (compare.metrics.length) {
    const steps = compare.metrics.map((metric) => compare.parts[metric][a][b]).filter((step) => step >= 0);
    const never = compare.metrics.every((metric) => compare.parts[metric][a][b] === -2);
    const text = steps.length ? `The metrics part at step ${partingText(Math.min(...steps))}.`
      : never ? "These runs measured nothing at a common step."
      : "The metrics are equal wherever both runs measured them.";
    parts.push(element("p", { id: "parting" }, element("b", {}, text)), partingTable(compare, a, b));
  }
  const [same, unknown] = [[], []];
  for (const [name, title] of Object.entries(SECTIONS)) {
    if (a === b) break;
    const keys = Object.entries(compare.sections[name]).filter(([, values]) => values.of[a] !== values.of[b]);
    if ([a, b].some((run) => !compare.known[name][run])) unknown.push(title.toLowerCase());
    else if (!keys.length) same.push(title.toLowerCase());
    else {
      const rows = keys.map(([key, values]) => {
        const texts = [key, ...apart(values.texts[values.of[a]], values.texts[values.of[b]])];
        return element("tr", {}, ...texts.map((text) => element("td", {}, text)));
      });
      parts.push(element("h3", {}, title), table(["", "A", "B"], rows, name));
    }
  }
  if (same.length) parts.push(element("p", { class: "note" }, `The same in both: ${same.join(", ")}.`));
  if (unknown.length) parts.push(element("p", { class: "note" }, `Not recorded for both: ${unknown.join(", ")}.`));
  $("compared").replaceChildren(...parts);
}

// pictures

async function showSamples(data) {
  const kinds = JSON.parse(await unpacked("pictures")).kinds;
  const steps = () => Object.keys(kinds[Number($("kind").value)].steps).map(Number).sort((x, y) => x - y);
  const seeds = [...new Set(data.runs.map((run) => run.seed))].filter((seed) => seed !== "");
  options($("kind"), kinds.map((kind, number) => [number, kind.name]));
  options($("which"), [["", "all"], ...(seeds.length > 1 ? seeds.map((seed) => [seed, `seed ${seed}`]) : [])],
    seeds.length > 1 ? seeds[0] : "");
  $("kind-label").hidden = kinds.length < 2;
  $("which-label").hidden = seeds.length < 2;
  const draw = () => {
    const kind = kinds[Number($("kind").value)];
    const step = $("step-label").hidden ? undefined : steps()[Number($("step").value)];
    const last = steps().length - 1;
    const atEnd = step === undefined || Number($("step").value) === last;
    $("step-text").textContent = atEnd ? "last" : step.toLocaleString("en");
    const figures = data.runs.flatMap((run, number) => {
      if ($("which").value !== "" && run.seed !== $("which").value) return [];
      const end = kind.last[number];
      const uri = atEnd || (end && end[1] === step) ? end?.[0] : kind.steps[step]?.[number];
      if (!uri) return [];
      const at = atEnd ? end[1] : step;
      const label = run.label + (at === null ? "" : ` · step ${at.toLocaleString("en")}`);
      const image = element("img", { src: uri, alt: `samples of ${run.label}`, class: end[2] < 300 ? "small" : null });
      image.addEventListener("click", () => enlarge(image));
      return [element("figure", {}, image, element("figcaption", {}, label))];
    });
    $("grids").replaceChildren(...(figures.length ? figures : [element("p", { class: "note" }, "No pictures here.")]));
  };
  const setSteps = () => {
    $("step").max = Math.max(0, steps().length - 1);
    $("step").value = $("step").max;
    $("step-label").hidden = steps().length < 2;
    draw();
  };
  $("kind").addEventListener("change", setSteps);
  $("which").addEventListener("change", draw);
  $("step").addEventListener("input", draw);
  $("size").addEventListener("input", () => $("grids").style.setProperty("--size", `${$("size").value}px`));
  if (data.runs.length > 24) $("size").value = 160;
  $("grids").style.setProperty("--size", `${$("size").value}px`);
  setSteps();
}

function enlarge(image) {
  const large = $("large").querySelector("img");
  large.src = image.src;
  large.alt = image.alt;
  large.className = image.className;
  $("large").showModal();
}

// all of it

// Acts when something comes near the view, and at last so that a print has everything.
const AT_LAST = 2000; // milliseconds

function whenSeen(node, act) {
  let done = false;
  const once = () => {
    watch.disconnect();
    if (!done) act();
    done = true;
  };
  const watch = new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && once(), { rootMargin: "300px" });
  watch.observe(node);
  setTimeout(once, AT_LAST);
}

async function start() {
  makeSortable();
  const data = JSON.parse(await unpacked("data"));
  all("#columns input").forEach((box) => box.addEventListener("change", chooseColumns));
  if ($("baseline")) {
    $("baseline").value = data.baseline;
    $("baseline").addEventListener("change", () => showDifferences(data));
    showDifferences(data);
  }
  if ($("compare")) {
    const runs = data.runs.map((run, number) => [number, run.label]);
    options($("run-a"), runs, 0);
    options($("run-b"), runs, 1);
    ["run-a", "run-b"].forEach((id) => $(id).addEventListener("change", () => compareRuns(data)));
    compareRuns(data);
  }
  if ($("samples")) whenSeen($("samples"), () => showSamples(data));
  if ($("large")) $("large").addEventListener("click", () => $("large").close());
  startFigures(data);
  document.documentElement.dataset.ready = "true";
}

start();
