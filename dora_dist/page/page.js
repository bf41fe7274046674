"use strict";
// Draws what document.py has put into the element "data": panels (curves.py) and maps (rank_map.py).
const data = JSON.parse(document.getElementById("data").textContent);
const NUM_COLOURS = 8, HEIGHT = 230, FEW_POINTS = 30, LIGHT_BELOW = 0.55;

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

// Charts, which Bokeh draws. Names, values and colours stand under them as elements of the page.

function at(curve, step) {
  // The last value at or before a step of the curve; without a step its last one.
  if (step === null) return curve.values.at(-1);
  return step > curve.steps.at(-1) ? null : curve.values[curve.steps.findLastIndex(one => one <= step)];
}

function legend(panel, lines) {
  const host = element("div", undefined, "legend"), where = element("span", undefined, "faint");
  const values = panel.curves.map((curve, number) => {
    const button = element("button"), mark = element("span", undefined, "mark"), value = element("span", undefined, "value");
    mark.style.borderTop = `2px ${curve.dashed ? "dotted" : curve.colour < NUM_COLOURS ? "solid" : "dashed"} var(--series-${curve.colour % NUM_COLOURS})`;
    button.append(mark, element("bdi", curve.name), value);
    button.title = "show or hide";
    button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", shown);
      lines[number].forEach(line => { line.visible = shown; });
    });
    host.append(button);
    return value;
  });
  host.prepend(where);
  const point = step => {
    where.textContent = step === null ? "latest" : `step ${show(step)}`;
    panel.curves.forEach((curve, number) => { values[number].textContent = show(at(curve, step)); });
  };
  return { host, point };
}

function draw(figure, panel, curve) {
  const x = curve.steps, y = curve.values.map(value => value ?? NaN);
  const colour = theme(`--series-${curve.colour % NUM_COLOURS}`);
  // More curves than colours differ by their dashes.
  const line_dash = curve.dashed ? [2, 4] : curve.colour < NUM_COLOURS ? [] : [4 + 4 * Math.floor(curve.colour / NUM_COLOURS), 3];
  const look = { line_color: colour, line_width: 1.5, line_dash };
  const line = panel.stepped ? figure.step(x, y, "after", look) : figure.line(x, y, look);
  // A point without neighbours is seen only as a dot.
  const size = x.length <= FEW_POINTS ? 5 : 1.5;
  return curve.dashed ? [line] : [line, figure.scatter(x, y, { size, fill_color: colour, line_color: null })];
}

async function chart(panel, host) {
  const figure = Bokeh.Plotting.figure({
    height: HEIGHT, sizing_mode: "stretch_width", toolbar_location: null, background_fill_color: null, border_fill_color: null,
    outline_line_color: null, min_border_right: 12,
    // On a touch screen a finger moves the page.
    tools: matchMedia("(pointer: fine)").matches ? "xbox_zoom" : "",
    ...(panel.x && { x_range: panel.x }), ...(panel.y && { y_range: panel.y }),
  });
  const [text, lines] = [theme("--faint"), theme("--line")];
  [figure.xaxis, figure.yaxis].forEach(axis => Object.assign(axis, {
    axis_line_color: lines, major_tick_line_color: lines, minor_tick_line_color: null, major_label_text_color: text,
    major_label_text_font_size: "12px",
  }));
  figure.xaxis.ticker = new Bokeh.BasicTicker({ min_interval: 1, desired_num_ticks: 5 });
  figure.xaxis.formatter = new Bokeh.NumeralTickFormatter({ format: "0,0" });
  [figure.xgrid, figure.ygrid].forEach(grid => { grid.grid_line_color = lines; });
  const mark = new Bokeh.Span({ dimension: "height", line_color: text, line_width: 1, visible: false });
  figure.add_layout(mark);
  const below = legend(panel, panel.curves.map(curve => draw(figure, panel, curve)));
  const steps = [...new Set(panel.curves.flatMap(curve => curve.steps))];
  figure.on_event("mousemove", ({ x }) => pointAt(steps.reduce((a, b) => Math.abs(b - x) < Math.abs(a - x) ? b : a)));
  figure.on_event("mouseleave", () => pointAt(null));
  const point = step => {
    Object.assign(mark, { location: step ?? 0, visible: step !== null });
    below.point(step);
  };
  point(null);
  host.replaceChildren();
  await Bokeh.Plotting.show(figure, host);
  host.append(below.host);
  return { point, figure };
}

let charts = [];

// One step in all charts.
function pointAt(step) {
  charts.forEach(one => one.point(step));
}

async function drawCharts() {
  charts = await Promise.all([...document.querySelectorAll(".chart")].map(host => chart(data.panels[host.dataset.panel], host)));
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
// The end of a long prompt is what the answer is to.
document.querySelectorAll(".prompt").forEach(one => { one.scrollTop = one.scrollHeight; });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCharts);
