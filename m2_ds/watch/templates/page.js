"use strict";
const settings = JSON.parse(document.getElementById("settings").textContent);
const by = id => document.getElementById(id);
const root = document.documentElement;
const held = {};  // curves of each run, by its place
let state = null, axis = "step", answered = Date.now(), renders = 0;

function element(tag, { text, ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// -- looks -------------------------------------------------------------------

const prefersDark = matchMedia("(prefers-color-scheme: dark)");
function setTheme(theme) { root.dataset.theme = theme; if (state) drawCharts(true); }
function colour(name) { return getComputedStyle(root).getPropertyValue(`--${name}`).trim(); }
function seriesColour(n) { return colour(`series-${n % 6}`); }
const DASHES = ["solid", "dash", "dot", "longdashdot"];

// -- what the page says ------------------------------------------------------

function drawRuns() {
  by("runs").replaceChildren(...state.runs.map((run, n) => {
    const card = element("section", { class: "card run", style: `--c:var(--series-${n % 6})` },
      element("h2", {}, element("i"), element("span", { text: run.name, title: run.folder })),
      element("p", {}, element("span", { class: `state ${run.state}`, text: run.state }), ` · ${run.words}`),
      element("p", { class: "progress", text: run.progress }));
    if (run.share !== null) card.append(element("div", { class: "bar" }, element("i", { style: `width:${(100 * run.share).toFixed(1)}%` })));
    card.append(...run.notes.map(note => element("p", { class: "note", text: note })));
    return card;
  }));
}

function drawNumbers() {
  const table = element("table");
  table.append(element("thead", {}, element("tr", {}, element("th"), ...state.runs.map(run => element("th", { text: run.name })))));
  const body = element("tbody");
  const titles = [...new Set(state.runs.flatMap(run => Object.keys(run.groups)))];
  for (const title of titles) {
    body.append(element("tr", {}, element("th", { class: "group", colspan: 1 + state.runs.length, text: title })));
    const cells = state.runs.map(run => new Map((run.groups[title] || []).map(one => [one.label, one])));
    for (const label of new Set(cells.flatMap(some => [...some.keys()])))
      body.append(element("tr", {}, element("th", { text: label }), ...cells.map(some => {
        const one = some.get(label);
        return element("td", { class: one ? one.level : "", text: one ? one.text : "–" });
      })));
  }
  table.append(body);
  by("numbers").replaceChildren(element("h2", { text: "Newest numbers" }), table);
}

function drawDifferences() {
  const box = by("differences"), rows = state.differences;
  box.hidden = state.runs.length < 2;
  const heads = state.runs.map(run => element("th", { text: run.name }));
  box.replaceChildren(element("h2", { text: "Where the configurations differ" }), rows.length
    ? element("table", {}, element("thead", {}, element("tr", {}, element("th", { text: "field" }), ...heads)),
      element("tbody", {}, ...rows.map(row => element("tr", {}, element("th", { text: row.field }),
        ...row.values.map(value => element("td", { text: value }))))))
    : element("p", { text: "Nowhere." }));
}

// -- charts ------------------------------------------------------------------

// A running mean over the neighbourhood of each point, as wide as a fortieth of the series.
function smoothed(y) {
  const reach = Math.floor(y.length / 80), sums = [0];
  if (!by("smooth").checked || reach < 1) return y;
  for (const value of y) sums.push(sums[sums.length - 1] + value);
  return y.map((_, n) => {
    const low = Math.max(0, n - reach), high = Math.min(y.length, n + reach + 1);
    return (sums[high] - sums[low]) / (high - low);
  });
}

function tracesOf(chart) {
  const found = [], several = state.runs.length > 1;
  state.runs.forEach((run, n) => {
    const curves = held[n];
    ((curves && curves.series[chart.key]) || []).forEach((one, place) => {
      const x = one.i.map(i => curves[one.of][axis][i]);
      found.push({ run: n, place, label: one.label, x, y: one.of === "rows" ? smoothed(one.y) : one.y,
        colour: several ? n : place, dash: several ? place : Math.floor(place / 6), few: x.length < 13 });
    });
  });
  return found;
}

function marks() {
  return state.runs.flatMap((run, n) => ((held[n] && held[n].events) || []).map(event => ({
    type: "line", xref: "x", yref: "paper", x0: event[axis], x1: event[axis], y0: 0, y1: 1, layer: "below",
    line: { color: colour(event.kind === "restarts" ? "soft" : "bad"), width: 1, dash: "dot" } })));
}

// 1, 2 and 5 of every power of ten that the curves pass through; of many decades, the ones.
function logTicks(traces) {
  const all = traces.flatMap(t => t.y), low = Math.min(...all), high = Math.max(...all);
  const powers = [], digits = high / low > 300 ? [1] : [1, 2, 5];
  for (let p = Math.floor(Math.log10(low)) - 1; p <= Math.log10(high) + 1; p += 1)
    powers.push(...digits.map(d => Number(`${d}e${p}`)));
  return powers;
}

function legendOf(traces) {
  const several = state.runs.length > 1, lines = new Map();
  for (const t of traces) {
    const key = several ? t.label : `${t.run} ${t.label}`;
    if (!lines.has(key)) lines.set(key, t);
  }
  if (lines.size < 2) return [];
  return [...lines.values()].map(t => element("span", { style: `--c:${several ? "var(--soft)" : `var(--series-${t.colour % 6})`}` },
    element("i", { class: `dash${t.dash % 4}` }), t.label));
}

function drawCharts(changed) {
  if (!changed) return;
  for (const chart of settings.charts) {
    const traces = tracesOf(chart);
    let card = by(`chart-${chart.key}`);
    if (!traces.length) { if (card) card.remove(); continue; }
    if (!card) {
      card = element("section", { class: "card chart", id: `chart-${chart.key}` },
        element("header", {}, element("h3", { text: chart.title }), element("small", { text: chart.note })),
        element("div", { class: "legend" }), element("div", { class: "plot" }));
      const keys = settings.charts.map(one => one.key), place = keys.indexOf(chart.key);
      const next = [...by("charts").children].find(other => keys.indexOf(other.id.slice(6)) > place);
      by("charts").insertBefore(card, next || null);
    }
    card.querySelector(".legend").replaceChildren(...legendOf(traces));
    const ink = colour("soft"), line = colour("line");
    const font = { family: getComputedStyle(document.body).fontFamily, size: 11.5, color: ink };
    const ticks = { gridcolor: line, linecolor: line, zeroline: false, automargin: true };
    const named = state.runs.length > 1;
    Plotly.react(card.querySelector(".plot"), traces.map(t => ({
      type: "scatter", mode: t.few ? "lines+markers" : "lines", x: t.x, y: t.y,
      name: named ? `${state.runs[t.run].name}${traces.some(o => o.place) ? `, ${t.label}` : ""}` : t.label,
      line: { color: seriesColour(t.colour), dash: DASHES[t.dash % 4], width: 1.7 }, marker: { size: 6 },
      hovertemplate: "%{y:.5~g}",
    })), {
      font, showlegend: false, hovermode: "x unified", shapes: marks(), uirevision: axis,
      margin: { l: 42, r: 12, t: 8, b: 30 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      hoverlabel: { bgcolor: colour("card"), bordercolor: line, font: { ...font, color: colour("ink") } },
      xaxis: { ...ticks, showgrid: false, nticks: 7, rangemode: "tozero" },
      yaxis: { ...ticks, nticks: 6, type: chart.log ? "log" : "linear", rangemode: chart.from_zero ? "tozero" : "normal",
        ...(chart.log ? { tickvals: logTicks(traces) } : {}) },
    }, { responsive: true, displaylogo: false, displayModeBar: false });
    const last = traces[0];
    card.dataset.points = traces.map(t => t.x.length).join(" ");
    card.dataset.last = `${last.x[last.x.length - 1]} ${last.y[last.y.length - 1]}`;
  }
}

// -- going on ----------------------------------------------------------------

function take(told) {
  const changed = Object.keys(told.curves).length > 0 || !state;
  for (const [n, curves] of Object.entries(told.curves)) held[n] = { ...curves, version: told.runs[n].version };
  state = told;
  by("read").textContent = settings.poll_s ? `read ${told.read}` : `as of ${told.read}`;
  drawRuns(); drawNumbers();
  if (changed) { drawDifferences(); drawCharts(true); renders += 1; }
  document.body.dataset.renders = renders;
}

function trouble(text) { by("trouble").hidden = !text; by("trouble").textContent = text; }

async function look() {
  const have = Object.entries(held).map(([n, curves]) => `${n}:${curves.version}`).join(",");
  try {
    const answer = await fetch(`data?have=${have}`, { cache: "no-store" });
    if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
    take(await answer.json());
    answered = Date.now();
    trouble("");
  } catch (error) {
    console.error(error);
    trouble(`No news for ${Math.round((Date.now() - answered) / 1000)} s (${error.message}): is m2 watch still running? Numbers are those read before.`);
  }
  setTimeout(look, 1000 * settings.poll_s);
}

by("axis").append(...settings.axes.map(([value, text]) => element("option", { value, text })));
by("axis").addEventListener("change", event => { axis = event.target.value; drawCharts(true); });
by("smooth").addEventListener("change", () => drawCharts(true));
by("theme").addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));
prefersDark.addEventListener("change", event => setTheme(event.matches ? "dark" : "light"));
const asked = new URLSearchParams(location.search);
if (settings.axes.some(([name]) => name === asked.get("axis"))) axis = asked.get("axis");
by("axis").value = axis;
setTheme(asked.get("theme") || (prefersDark.matches ? "dark" : "light"));
if (settings.state) take(settings.state); else look();
