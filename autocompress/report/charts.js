"use strict";
// Draws figures when they come into view, in the colours of day, night or paper. Shared by all pages.
const charts = (() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const figures = data.figures;
  const drawn = new Set();
  const touch = matchMedia("(pointer: coarse)").matches;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let printing = false;
  // on a phone, words beside each baseline would lie over each other: one tells what they all are
  if (innerWidth < 600) for (const name of ["size", "latency"]) {
    const t = figures[name] && figures[name].data.find((t) => t.name === "baselines");
    if (t) t.text = t.text.map((text) => (text.startsWith("uniform") ? "uniform" : ""));
  }

  function theme() {
    const night = dark.matches && !printing;
    return { fg: night ? "#e8e8e8" : "#1a1a1a", grid: night ? "#30363c" : "#e4e4e4", soft: night ? "#7b828a" : "#b0b0b0", bg: night ? "#1e2327" : "#ffffff" };
  }

  function layoutOf(name) {
    const t = theme(), layout = structuredClone(figures[name].layout);
    layout.font = { ...layout.font, color: t.fg, family: "system-ui, sans-serif" };
    layout.hoverlabel = { ...layout.hoverlabel, bgcolor: t.bg, font: { color: t.fg } };
    for (const key of Object.keys(layout)) {
      if (!/^[xy]axis/.test(key)) continue;
      layout[key] = { gridcolor: t.grid, zeroline: false, linecolor: t.soft, ...layout[key] };
      if (touch) layout[key].fixedrange = true;
    }
    for (const note of layout.annotations || []) if (note.font && !note.font.color) note.font.color = t.fg;
    if (touch) layout.dragmode = false;
    if (printing) layout.width = 680;
    return layout;
  }

  function draw(name) {
    const place = $("chart-" + name);
    if (!place || place.hidden || !figures[name]) return;
    const layout = layoutOf(name);
    // what the reader zoomed to stays
    if (drawn.has(name) && !printing) for (const axis of ["xaxis", "yaxis"]) {
      const shown = place.layout && place.layout[axis];
      if (shown && shown.range && figures[name].zoomed) { layout[axis].range = [...shown.range]; layout[axis].autorange = false; }
    }
    Plotly.react(place, figures[name].data, layout, { displayModeBar: false, responsive: true, doubleClick: "reset" });
    if (drawn.has(name)) return;
    drawn.add(name);
    place.on("plotly_click", (event) => place.dispatchEvent(new CustomEvent("trial", { detail: event.points.map((p) => p.customdata) })));
    place.on("plotly_relayout", (change) => { if (Object.keys(change).some((k) => k.includes("range"))) figures[name].zoomed = true; });
  }

  function press(group, button) { for (const other of document.querySelectorAll(`[data-${group}]`)) other.setAttribute("aria-pressed", String(other === button)); }
  for (const button of document.querySelectorAll("[data-axis]")) button.onclick = () => {
    press("axis", button);
    for (const name of ["size", "latency"]) $("chart-" + name).hidden = name !== button.dataset.axis;
    draw(button.dataset.axis);
  };
  for (const button of document.querySelectorAll("[data-zoom]")) button.onclick = () => {
    press("zoom", button);
    for (const name of ["size", "latency"]) {
      const axis = figures[name].layout.yaxis;
      figures[name].near = figures[name].near || axis.range;
      figures[name].zoomed = false;
      Object.assign(axis, button.dataset.zoom === "all" ? { autorange: true, range: null } : { autorange: false, range: figures[name].near });
      draw(name);
    }
  };
  for (const button of document.querySelectorAll("[data-copy]")) button.onclick = async () => {
    const from = $(button.dataset.copy);
    try { await navigator.clipboard.writeText(from.textContent); }
    catch { const range = document.createRange(); range.selectNodeContents(from); getSelection().removeAllRanges(); getSelection().addRange(range); document.execCommand("copy"); }
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  };

  dark.addEventListener("change", () => drawn.forEach(draw));
  addEventListener("beforeprint", () => { printing = true; Object.keys(figures).forEach(draw); });
  addEventListener("afterprint", () => { printing = false; drawn.forEach((name) => { draw(name); Plotly.Plots.resize($("chart-" + name)); }); });

  // Draw what is in view now, and the rest when it comes near.
  function start() {
    const seen = new IntersectionObserver((entries) => {
      for (const entry of entries) if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target.id.slice("chart-".length)); }
    }, { rootMargin: "600px" });
    draw("size");
    for (const name of Object.keys(figures)) if (name !== "latency" && !drawn.has(name) && $("chart-" + name)) seen.observe($("chart-" + name));
    document.documentElement.dataset.ready = String(Math.round(performance.now()));
  }
  return { $, data, figures, drawn, draw, start };
})();
