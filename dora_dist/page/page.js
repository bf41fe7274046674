"use strict";
// Draws what document.py has put into the element "data": panels (curves.py) and maps (rank_map.py).
const data = JSON.parse(document.getElementById("data").textContent);
const NUM_COLOURS = 8, HEIGHT = 230, LIGHT_BELOW = 0.55;

function theme(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function show(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size >= 1e5 ? Math.round(value).toLocaleString("en") : size >= 1e-3 ? String(+value.toPrecision(4)) : value.toExponential(2);
}

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// Charts

function chart(panel, host) {
  const axis = { stroke: theme("--faint"), grid: { stroke: theme("--line"), width: 1 }, ticks: { stroke: theme("--line"), width: 1 } };
  const curves = panel.curves.map(curve => ({
    label: curve.name,
    stroke: theme(`--series-${curve.colour % NUM_COLOURS}`),
    width: 1.5,
    // More curves than colours differ by their dashes.
    dash: curve.dashed ? [2, 4] : curve.colour < NUM_COLOURS ? undefined : [4 + 4 * Math.floor(curve.colour / NUM_COLOURS), 3],
    points: curve.dashed ? { show: false } : undefined,
    paths: panel.stepped ? uPlot.paths.stepped({ align: 1 }) : undefined,
    value: (_, value) => show(value),
  }));
  const options = {
    width: host.clientWidth, height: HEIGHT,
    scales: { x: { time: false } },
    axes: [{ ...axis, label: "optimizer step", labelSize: 18, size: 36, values: (_, steps) => steps.map(n => Number.isInteger(n) ? show(n) : "") },
           { ...axis, size: 62, values: (_, values) => values.map(show) }],
    series: [{ label: "step", value: (_, step) => show(step) }, ...curves],
    cursor: { sync: { key: "step" } },
  };
  return new uPlot(options, uPlot.join(panel.curves.map(curve => [curve.steps, curve.values])), host);
}

let charts = [];

function drawCharts() {
  charts.forEach(one => one.destroy());
  charts = [...document.querySelectorAll(".chart")].map(host => chart(data.panels[host.dataset.panel], host));
}

function resizeCharts() {
  charts.forEach(one => one.setSize({ width: one.root.parentElement.clientWidth, height: HEIGHT }));
}

// Maps of the ranks

function mean(values) {
  const there = values.filter(value => value !== null);
  return there.length ? there.reduce((sum, value) => sum + value, 0) / there.length : null;
}

function rankMap(map) {
  const host = element("section", undefined, "map"), caption = element("p"), table = element("table");
  host.append(element("h3", map.run), caption);
  const head = table.createTHead().insertRow();
  ["", ...map.columns, "mean"].forEach(name => {
    const cell = element("th");
    cell.append(element("span", name));
    head.append(cell);
  });
  const body = table.createTBody();
  const cells = [...map.rows, "mean"].map(name => {
    const row = body.insertRow();
    row.append(element("th", name));
    return [...map.columns, "mean"].map(() => row.insertCell());
  });
  const scroll = element("div", undefined, "scroll"), scale = element("p", undefined, "faint");
  scroll.append(table);
  const [low, bar, high] = [element("span"), element("span", undefined, "scale"), element("span")];
  scale.append(low, " ", bar, " ", high);
  host.append(scroll, scale);
  if (map.note) host.append(element("p", map.note, "faint"));

  function fill(cell, value, share, tip) {
    cell.textContent = value === null ? "" : show(value);
    cell.className = value === null ? "absent" : share > LIGHT_BELOW ? "dark" : "";
    cell.style.setProperty("--share", share);
    cell.title = value === null ? "" : tip;
  }

  function update(step, quantity) {
    const frame = map.frames.filter(one => one.step <= step).at(-1);
    const values = frame && frame[quantity];
    host.querySelectorAll(".scroll, .scale").forEach(one => { one.hidden = !values; });
    scale.hidden = !values;
    if (!frame) { caption.textContent = map.frames.length ? `no event by step ${show(step)}` : "no event yet"; return; }
    const when = frame.step === 0 && map.frames.length > 1 ? "at the start" : `event of step ${show(frame.step)}`;
    caption.textContent = `${when}: ${show(frame.kept)} components kept` + (frame.final ? ", ranks fixed" : "") + (values ? "" : "; no scores are recorded for it");
    if (!values) return;
    const flat = values.flat().filter(value => value !== null);
    // Ranks are compared over all events, scores within one: they fall and rise with the loss.
    const [least, most] = quantity === "ranks" ? [0, map.most] : [Math.min(0, ...flat), Math.max(...flat)];
    low.textContent = show(least); high.textContent = show(most);
    const share = value => most > least ? (value - least) / (most - least) : 0;
    map.rows.forEach((row, r) => map.columns.forEach((column, c) => {
      const value = values[r][c], score = frame.scores && frame.scores[r][c];
      const tip = `layer ${row}, ${column}: ${frame.ranks[r][c]} components` + (score === null ? "" : `, mean score ${show(score)}`);
      fill(cells[r][c], value, value === null ? 0 : share(value), tip);
    }));
    const about = (cell, all) => {
      const value = mean(all);
      cell.textContent = value === null ? "" : quantity === "ranks" ? value.toFixed(1) : show(+value.toPrecision(3));
      cell.className = "mean";
    };
    map.rows.forEach((_, r) => about(cells[r][map.columns.length], values[r]));
    map.columns.forEach((_, c) => about(cells[map.rows.length][c], values.map(row => row[c])));
    about(cells[map.rows.length][map.columns.length], flat);
  }
  return { host, update };
}

// What a reader has chosen survives that the page reads itself again.
const memory = {
  get(key) { try { return sessionStorage.getItem(location.pathname + key); } catch { return null; } },
  set(key, value) { try { sessionStorage.setItem(location.pathname + key, value); } catch { /* not allowed: it is forgotten */ } },
};

function drawMaps() {
  const slider = document.getElementById("slider"), quantity = document.getElementById("quantity");
  if (!slider) return;
  const steps = [...new Set(data.maps.flatMap(map => map.frames.map(frame => frame.step)))].sort((a, b) => a - b);
  const maps = data.maps.map(rankMap);
  document.getElementById("maps").append(...maps.map(map => map.host));
  const update = () => {
    const step = steps[slider.value];
    document.getElementById("position").textContent = `step ${show(step)}`;
    slider.setAttribute("aria-valuetext", `step ${step}`);
    maps.forEach(map => map.update(step, quantity.value));
  };
  const remember = () => {
    memory.set("step", +slider.value === steps.length - 1 ? "" : steps[slider.value]);
    memory.set("quantity", quantity.value);
    update();
  };
  slider.max = steps.length - 1;
  const before = memory.get("step");
  slider.value = before ? Math.max(0, steps.indexOf(+before)) : steps.length - 1;
  quantity.value = memory.get("quantity") || "ranks";
  slider.addEventListener("input", remember);
  quantity.addEventListener("change", remember);
  update();
}

drawCharts();
drawMaps();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCharts);
addEventListener("resize", resizeCharts);
