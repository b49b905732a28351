"use strict";
// Draws the figures of a page, and answers to its controls: arms, axes, layers or steps, columns of tables. State is of
// the page, so that a live page keeps it when its main part is replaced by a newer one.
(() => {
  const hidden = new Set(), panels = new Map(), sorted = new Map();
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const paper = matchMedia("print"), dark = matchMedia("(prefers-color-scheme: dark)");
  const coarse = matchMedia("(pointer: coarse)").matches;
  const CONFIG = {displaylogo: false, displayModeBar: coarse ? false : "hover", modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"]};
  const NAMES = {step: "step", seconds: "seconds of training"};
  const MANY = 9;  // curves beyond which one alone is named where the pointer is
  let specs = {};

  // Colours are the style sheet's, by day, by night and on paper.
  const coloured = (value, css) => {
    if (typeof value === "string") return value.startsWith("var(") ? css.getPropertyValue(value.slice(4, -1)).trim() : value;
    if (Array.isArray(value)) return typeof value[0] === "object" ? value.map((item) => coloured(item, css)) : value;
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, coloured(item, css)]));
  };

  const stateOf = (plot) => {
    const panel = plot.closest(".panel"), title = panel?.querySelector("h2")?.textContent;
    if (!panels.has(title)) panels.set(title, {at: null, over: "step", scale: "linear"});
    return panels.get(title);
  };

  function draw(plot) {
    if (!plot.clientWidth) return;
    const spec = specs[plot.id], state = stateOf(plot), width = plot.clientWidth, narrow = width < 480;
    const log = spec.over && state.scale === "log", over = spec.over && state.over;
    const frame = spec.frames?.[Math.min(state.at ?? Infinity, spec.frames.length - 1)];
    const data = spec.data.map((trace, i) => {
      const drawn = {...trace, ...frame?.data[i], visible: !hidden.has(trace.meta?.arm)};
      if (over === "seconds") drawn.x = trace.meta.seconds;
      if (over) drawn.hovertemplate = spec.data.length > MANY ? `${NAMES[over]} %{x:,}: %{y:.5~g}` : "%{y:.5~g}";
      return drawn;
    });
    const axis = {gridcolor: "var(--grid)", zerolinecolor: "var(--soft)", zeroline: false, linecolor: "var(--line)", automargin: true,
      ticks: "", fixedrange: coarse};
    const asked = spec.layout, top = spec.map ? 4 : 8;
    const layout = {
      height: 230, ...asked, width, margin: {t: top, b: 40, l: 48, r: 12, ...asked.margin}, showlegend: false, autosize: false,
      hovermode: asked.hovermode ?? (data.length > MANY ? "closest" : "x unified"), dragmode: coarse ? false : "zoom",
      uirevision: `${state.over} ${state.scale}`, font: {family: getComputedStyle(document.body).fontFamily, size: 12, color: "var(--soft)"},
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: asked.plot_bgcolor ?? "rgba(0,0,0,0)",
      modebar: {bgcolor: "rgba(0,0,0,0)", color: "var(--soft)", activecolor: "var(--ink)"},
      hoverlabel: {bgcolor: "var(--panel)", bordercolor: "var(--line)", font: {color: "var(--ink)", size: 12}, namelength: 40},
      xaxis: {...axis, ...(over ? {title: {text: NAMES[over]}, unifiedhovertitle: {text: `${NAMES[over]} %{x:,}`}} : {}), ...(spec.map ? {showgrid: false, constrain: "domain"} : {}), ...asked.xaxis},
      yaxis: {...axis, ...(spec.map ? {showgrid: false} : {}), ...asked.yaxis, ...(log ? {type: "log", range: undefined} : {})},
      annotations: (asked.annotations ?? []).map((note) => ({...note, visible: !hidden.has(note.name)})),
    };
    for (const [key, letter] of [["xaxis", "x"], ["yaxis", "y"]])
      if (layout[key].type === "log") layout[key].dtick = powers(data.flatMap((trace) => trace[letter]));
    if (over && !narrow && data.length <= MANY) label(data, layout, log);
    const css = getComputedStyle(document.documentElement);
    Plotly.react(plot, coloured(data, css), coloured(layout, css), CONFIG);
    plot.removeAttribute("style");
    for (const svg of all("svg", plot)) svg.setAttribute("aria-hidden", "true");
  }

  // Distance of a logarithmic axis's ticks: 1, 2, 5 where few powers of ten are shown, else so many powers.
  function powers(values) {
    const known = values.filter((value) => value > 0), range = Math.log10(Math.max(...known) / Math.min(...known));
    return range < 2 ? "D2" : Math.ceil(range / 5);
  }

  // Names at the ends of the curves, pushed apart where they would lie on each other.
  function label(data, layout, log) {
    const ends = data.filter((trace) => trace.visible && trace.meta?.label).map((trace) => {
      const y = trace.y.findLast((value) => value !== null && (!log || value > 0));
      return {trace, y: log ? Math.log10(y) : y};
    }).filter(({y}) => Number.isFinite(y)).sort((a, b) => b.y - a.y);
    if (ends.length < 2) return;
    const values = data.flatMap((trace) => trace.y).filter((y) => y !== null && (!log || y > 0)).map((y) => log ? Math.log10(y) : y);
    const [low, high] = layout.yaxis.range ?? [Math.min(...values), Math.max(...values)];
    const scale = (layout.height - layout.margin.t - layout.margin.b) / (1.1 * (high - low) || 1);
    let free = -Infinity;
    for (const {trace, y} of ends) {
      const place = Math.max((high - y) * scale, free);
      layout.annotations.push({text: trace.meta.label, xref: "paper", x: 1, y, yshift: (high - y) * scale - place, xanchor: "left", align: "left", xshift: 4,
        showarrow: false, font: {color: trace.line.color, size: 11}});
      free = place + 13;
    }
    layout.margin.r = Math.min(layout.width * 0.3, 12 + 6.2 * Math.max(...ends.map(({trace}) => trace.meta.label.length)));
  }

  // Controls ----------------------------------------------------------------------------------------------------------

  const drawIn = (root) => all(".plot", root).forEach(draw);

  function dress() {
    for (const button of all("button[data-arm]")) button.setAttribute("aria-pressed", !hidden.has(button.dataset.arm));
    for (const figure of all("figure[data-of]")) figure.hidden = hidden.has(figure.dataset.of);
    for (const panel of all(".panel")) {
      const state = stateOf(panel), input = panel.querySelector("input");
      for (const kind of ["over", "scale"])
        for (const button of all(`[data-${kind}]`, panel)) button.setAttribute("aria-pressed", button.dataset[kind] === state[kind]);
      if (!input) continue;
      const frames = all(".plot", panel).map((plot) => specs[plot.id].frames ?? []).sort((a, b) => b.length - a.length)[0] ?? [];
      input.max = Math.max(frames.length - 1, 0);
      input.value = state.at ??= Math.min(Number(input.getAttribute("value")), frames.length - 1);
      panel.querySelector("output").textContent = frames[input.value]?.name ?? "";
      input.setAttribute("aria-valuetext", frames[input.value]?.name ?? "");
      input.closest(".slider").hidden = frames.length < 2;
    }
  }

  document.addEventListener("click", ({target}) => {
    const button = target.closest("button");
    if (!button) return;
    const {arm, over, scale} = button.dataset;
    if (arm !== undefined) hidden.delete(arm) || hidden.add(arm);
    if (over) stateOf(button).over = over;
    if (scale) stateOf(button).scale = scale;
    if (button.closest("th")) return sort(button.closest("th"), button.closest("th").ariaSort === "ascending" ? "descending" : "ascending");
    dress();
    drawIn(arm === undefined ? button.closest(".panel") : document);
  });
  document.addEventListener("input", ({target}) => {
    stateOf(target).at = Number(target.value);
    dress();
    drawIn(target.closest(".panel"));
  });

  // Tables ------------------------------------------------------------------------------------------------------------

  const valueOf = (row, column) => {
    const cell = row.cells[column].cloneNode(true);
    all("small", cell).forEach((small) => small.remove());
    const text = cell.textContent.trim(), number = Number(text.replace("\u2212", "-").replaceAll(",", ""));
    return text === "\u2013" || text === "" ? null : Number.isNaN(number) ? text : number;
  };

  function sort(head, order) {
    const table = head.closest("table"), sign = order === "ascending" ? 1 : -1;
    const compare = (a, b) => {
      if (a === null || b === null) return (a === null) - (b === null);  // unknown values come last in either order
      return sign * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", {numeric: true}));
    };
    for (const th of head.parentNode.cells) th === head ? (th.ariaSort = order) : th.removeAttribute("aria-sort");
    for (const body of table.tBodies) {
      const rows = [...body.rows].filter((row) => row.className !== "group").map((row) => [valueOf(row, head.cellIndex), row]);
      body.append(...rows.sort(([a], [b]) => compare(a, b)).map(([, row]) => row));
    }
    sorted.set(table.closest(".box").getAttribute("aria-label"), [head.cellIndex, order]);
  }

  function makeSortable(table) {
    for (const th of table.tHead.rows[0].cells) {
      if (!th.textContent) continue;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...th.childNodes);
      th.append(button);
    }
    const [column, order] = sorted.get(table.closest(".box").getAttribute("aria-label")) ?? [];
    if (order) sort(table.tHead.rows[0].cells[column], order);
  }

  // The page ----------------------------------------------------------------------------------------------------------

  async function show() {
    specs = JSON.parse(document.getElementById("figures").textContent);
    all("main table").filter((table) => !table.closest("noscript") && table.rows.length > 2).forEach(makeSortable);
    dress();
    for (const plot of all(".plot")) {  // the page answers in between
      if (plot.isConnected) draw(plot);
      if (!paper.matches) await new Promise((done) => setTimeout(done));
    }
    document.documentElement.dataset.drawn = "true";
  }

  let etag = "";
  async function refresh() {
    const status = document.querySelector(".live");
    try {
      const answer = await fetch("main", {headers: {"If-None-Match": etag}, cache: "no-store"});
      if (answer.status === 200) {
        etag = answer.headers.get("ETag");
        const main = new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("main");
        for (const plot of all(".plot", main)) {
          const old = document.getElementById(plot.id);
          if (!old) continue;
          old.setAttribute("aria-label", plot.getAttribute("aria-label"));
          plot.replaceWith(old);  // keeps its zoom
        }
        const [focus, top] = [document.activeElement, scrollY], at = all("main :is(button, input)").indexOf(focus);
        document.querySelector("main").replaceWith(main);
        await show();
        if (at >= 0) all("main :is(button, input)")[at]?.focus({preventScroll: true});
        scrollTo(0, top);
      }
      status.textContent = answer.ok || answer.status === 304 ? `live, ${new Date().toLocaleTimeString()}` : await answer.text();
    } catch {
      status.textContent = "The server has ended; this is what it showed last.";
    }
    setTimeout(refresh, Number(document.body.dataset.live));
  }

  document.documentElement.classList.add("scripted");
  let waiting = 0;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(() => drawIn(document), 100); });
  dark.addEventListener("change", () => drawIn(document));
  paper.addEventListener("change", () => drawIn(document));
  show().then(() => { if (document.body.dataset.live) refresh(); });
})();
