"use strict";
// Draws the figures with plotly, when they come into view and in the colours of the page.

const HUES = ["#3b6fd4", "#e07b28", "#2f9e6e", "#c8453f", "#8a63d2", "#a8782b", "#d65fa3", "#5b8fa8", "#9aa52b", "#777f8c"];
const shade = { hidden: new Set(), by: "" };

const RAMP = [[68, 58, 131], [49, 104, 142], [33, 145, 140], [53, 183, 121], [168, 205, 45]]; // viridis, without its ends

function colourOf(number, count, numeric) {
  if (numeric && count > 3) { // an order that can be seen
    const at = (number / (count - 1)) * (RAMP.length - 1);
    const [low, high] = [RAMP[Math.floor(at)], RAMP[Math.ceil(at)]];
    return `rgb(${low.map((part, i) => Math.round(part + (high[i] - part) * (at % 1))).join(" ")})`;
  }
  return number < HUES.length ? HUES[number] : `hsl(${(number * 137.5) % 360} 55% 52%)`;
}

// The ways to colour runs: each is the values that become colours, run by run.
function colourings(data) {
  const ways = [["configuration", data.runs.map((run) => data.rows[run.row])]];
  data.keys.forEach((key, place) => ways.push([key, data.runs.map((run) => run.values[place])]));
  if (new Set(data.runs.map((run) => run.seed).filter((seed) => seed !== "")).size > 1) ways.push(["seed", data.runs.map((run) => run.seed)]);
  ways.push(["run", data.runs.map((run) => run.label)]);
  return new Map(ways);
}

function classes(data) {
  const values = data.colourings.get(shade.by);
  const distinct = [...new Set(values)];
  const numeric = distinct.every((value) => value !== "" && !Number.isNaN(Number(value)));
  if (numeric) distinct.sort((a, b) => a - b);
  return distinct.map((value, number) => ({
    value,
    colour: colourOf(number, distinct.length, numeric),
    runs: values.flatMap((own, run) => (own === value ? [run] : [])),
  }));
}

function drawLegends(data) {
  const entries = classes(data);
  for (const legend of all(".legend")) {
    legend.replaceChildren(...entries.map((entry) => {
      const button = element("button", { type: "button", "aria-pressed": String(!shade.hidden.has(entry.value)) }, entry.value || "–");
      button.style.setProperty("--colour", entry.colour);
      button.addEventListener("click", () => {
        if (!shade.hidden.delete(entry.value)) shade.hidden.add(entry.value);
        redraw(data);
      });
      button.addEventListener("dblclick", () => {
        const others = entries.filter((other) => other.value !== entry.value).map((other) => other.value);
        shade.hidden = new Set(others.every((value) => shade.hidden.has(value)) ? [] : others);
        redraw(data);
      });
      return button;
    }));
  }
}

function smoothed(values, weight) {
  if (!weight) return values;
  let [sum, mass] = [0, 0]; // an exponential mean, without the pull of its start
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return sum / mass;
  });
}

function interpolated(x, table) {
  const [xs, ys] = table;
  return x.map((at) => {
    let i = xs.findIndex((known) => known >= at);
    if (i < 0) return ys[ys.length - 1];
    if (i === 0) return (ys[0] * at) / (xs[0] || 1);
    return ys[i - 1] + ((at - xs[i - 1]) / (xs[i] - xs[i - 1])) * (ys[i] - ys[i - 1]);
  });
}

const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");

function trace(x, y, colour, label, count) {
  const many = count > 40; // then single points say nothing, and lines hide each other
  return {
    x, y, type: "scatter", mode: y.length < 30 && !many ? "lines+markers" : "lines", name: escaped(label), showlegend: false,
    line: { color: colour, width: many ? 1.1 : 1.7 }, opacity: many ? 0.65 : 1, marker: { size: 5 }, connectgaps: true,
    hovertemplate: `<b>${escaped(label)}</b><br>%{x:,.6~g}: %{y:.5g}<extra></extra>`,
  };
}

function curveTraces(data) {
  const metric = $("metric").value;
  const weight = Number($("smooth").value);
  if ($("seeds")?.value === "mean") return meanTraces(data, metric, weight);
  const curves = data.curves.runs;
  const times = $("x")?.value === "time" ? data.curves.seconds : null;
  return classes(data).filter((entry) => !shade.hidden.has(entry.value)).flatMap((entry) => entry.runs.flatMap((run) => {
    const curve = curves.of[metric]?.[run];
    if (!curve) return [];
    let x = curves.x[curve[0]];
    if (times) {
      const known = times.of.seconds?.[run];
      if (!known) return [];
      x = interpolated(x, [times.x[known[0]], known[1]]).map((seconds) => seconds / 60);
    }
    return [trace(x, smoothed(curve[1], weight), entry.colour, data.runs[run].label, data.runs.length)];
  }));
}

function meanTraces(data, metric, weight) {
  const curves = data.curves.rows;
  const seen = new Set();
  return classes(data).filter((entry) => !shade.hidden.has(entry.value)).flatMap((entry) => entry.runs.flatMap((run) => {
    const row = data.runs[run].row;
    const curve = curves.of[metric]?.[row];
    if (!curve || seen.has(row)) return [];
    seen.add(row);
    const [x, y] = [curves.x[curve[0]], smoothed(curve[1], weight)];
    const sd = smoothed(curve[2], weight);
    const edge = { x, type: "scatter", mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false };
    return [
      ...(data.rows.length > 12 ? [] : [
        { ...edge, y: y.map((value, i) => value - sd[i]) },
        { ...edge, y: y.map((value, i) => value + sd[i]), fill: "tonexty", fillcolor: faded(entry.colour) },
      ]),
      trace(x, y, entry.colour, data.rows[row], data.rows.length),
    ];
  }));
}

function faded(colour) {
  return colour.startsWith("#") ? `${colour}33` : colour.replace(")", " / 0.2)");
}

function timestepTraces(data) {
  const curves = data.timesteps[Number($("quantity").value)].curves;
  const [name] = Object.keys(curves.of);
  return classes(data).filter((entry) => !shade.hidden.has(entry.value)).flatMap((entry) => entry.runs.flatMap((run) => {
    const curve = curves.of[name][run];
    return curve ? [trace(curves.x[curve[0]], curve[1], entry.colour, data.runs[run].label, data.runs.length)] : [];
  }));
}

function layout(xTitle, yTitle, xLog, yLog) {
  const style = getComputedStyle(document.documentElement);
  const paint = (name) => style.getPropertyValue(name).trim();
  const narrow = window.innerWidth < 640;
  const axis = {
    gridcolor: paint("--line"), linecolor: paint("--line"), zerolinecolor: paint("--line"), tickcolor: paint("--line"),
    automargin: true, tickfont: { size: 12 }, exponentformat: "power", nticks: narrow ? 5 : 9,
  };
  const title = (text) => ({ text, font: { size: 13 }, standoff: 10 });
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest", dragmode: narrow ? false : "zoom",
    font: { color: paint("--soft"), family: style.fontFamily || "system-ui, sans-serif" },
    margin: { l: 10, r: 12, t: narrow ? 8 : 30, b: 10 },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: paint("--soft"), activecolor: paint("--accent") },
    xaxis: { ...axis, title: title(xTitle), type: xLog ? "log" : "linear" },
    yaxis: { ...axis, title: title(escaped(yTitle)), type: yLog ? "log" : "linear" },
    hoverlabel: { bgcolor: paint("--panel"), bordercolor: paint("--line"), font: { color: paint("--ink"), size: 13 }, align: "left", namelength: -1 },
  };
}

// Named one by one: plotly's own choice has a button that sends the figure to a server.
const SETTINGS = {
  responsive: true, displaylogo: false, plotlyServerURL: "",
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
};
const figures = {
  "figure-curves": (data) => {
    const time = $("x")?.value === "time" && $("seeds")?.value !== "mean";
    return [curveTraces(data), layout(time ? "minutes of training" : "step", $("metric").value, $("logx").checked, $("log").checked)];
  },
  "figure-timesteps": (data) => {
    const quantity = data.timesteps[Number($("quantity").value)];
    const made = layout(quantity.axis, quantity.name, false, $("logt").checked);
    if (quantity.axis.startsWith("quarter")) Object.assign(made.xaxis, { tickvals: [1, 2, 3, 4], range: [0.8, 4.2] });
    return [timestepTraces(data), made];
  },
};
const drawn = new Set();
let plotly = null;

function loadPlotly() {
  plotly ??= unpacked("plotly").then((text) => {
    document.head.append(element("script", {}, text));
    return window.Plotly;
  });
  return plotly;
}

function draw(data, id) {
  const [traces, made] = figures[id](data);
  window.Plotly.react($(id), traces, made, { ...SETTINGS, displayModeBar: window.innerWidth < 640 ? false : "hover" });
  drawn.add(id);
  $(id).dataset.drawn = traces.length;
}

function redraw(data) {
  drawLegends(data);
  for (const id of drawn) draw(data, id);
}

function grouped(select, groups, chosen) {
  select.replaceChildren(...groups.map(([title, names]) =>
    element("optgroup", { label: title }, ...names.map((name) => element("option", { value: name }, name)))));
  if (chosen) select.value = chosen;
}

function startFigures(data) {
  const present = Object.keys(figures).filter((id) => $(id));
  if (!present.length) return;
  data.colourings = colourings(data);
  shade.by = data.colour;
  for (const select of all("select.colour")) {
    options(select, [...data.colourings.keys()].map((name) => [name, name]), shade.by);
    select.addEventListener("change", () => {
      [shade.by, shade.hidden] = [select.value, new Set()];
      all("select.colour").forEach((other) => { other.value = shade.by; });
      redraw(data);
    });
  }
  if ($("metric")) grouped($("metric"), data.curves.metrics, data.metric);
  if ($("seeds") && data.runs.length > 40) $("seeds").value = "mean";
  if ($("quantity")) options($("quantity"), data.timesteps.map((quantity, number) => [number, quantity.name]), data.quantity);
  for (const id of ["metric", "seeds", "x", "smooth", "log", "logx"]) $(id)?.addEventListener("input", () => again(data, "figure-curves"));
  for (const id of ["quantity", "logt"]) $(id)?.addEventListener("input", () => again(data, "figure-timesteps"));
  drawLegends(data);
  for (const id of present) whenSeen($(id), () => loadPlotly().then(() => draw(data, id)));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw(data));
  addEventListener("beforeprint", () => window.Plotly && present.forEach((id) => draw(data, id)));
}

function again(data, id) {
  if (drawn.has(id)) draw(data, id);
}
