"use strict";
// Moves the page from one trial to another. Texts go in as text only.
(() => {
  const { $, data, figures, drawn, draw, start } = charts;
  const points = new Map(data.points.map((p) => [p.n, p]));
  let current = null;

  const trace = (name, which) => figures[name] && figures[name].data.find((t) => t.name === which);

  // --- the selected trial ---

  const number = (value, digits) => (value === null || value === undefined ? "–" : value.toLocaleString("en", { maximumFractionDigits: digits ?? 0 }));
  const quality = (value) => (value === null || value === undefined ? "–" : value.toFixed(4));
  const percent = (value) => (100 * value).toFixed(1) + "%";
  const size = (b) => (b >= 1e6 ? (b / 1e6).toPrecision(3) + " MB" : b >= 1e3 ? (b / 1e3).toPrecision(3) + " kB" : b + " B");

  function bars(p) {
    const share = data.groups.map((groups) => groups.reduce((left, group) => left * (p.keep[group] ?? 1), 1));
    return {
      bits: p.c.map((c, i) => (share[i] ? data.choices[c][0] : 0)),
      zeros: p.c.map((c, i) => (share[i] ? 100 * data.choices[c][1] : 0)),
      channels: share.map((s) => 100 * s),
      after: p.c.map((c, i) => (p.sizes ? p.sizes[i] : Math.round(data.takes[i][c] * share[i]))),
    };
  }

  function say(id, text) { $(id).textContent = text; }

  function describe(p) {
    const d = data.dense, change = p.q - d.q;
    const place = data.front.includes(p.n) ? "on the front" : p.fits ? "not on the front" : "over the budget";
    say("selected-title", `Trial ${p.n}${p.n === data.picked ? ", picked" : ""}: ${place}`);
    const test = p.qt === undefined ? "" : `, ${quality(p.qt)} on test`;
    const part = p.part ? " on a part of val" : " on val";
    const faster = p.ms > 0 ? ` (${(d.ms / p.ms).toFixed(2)}x as fast)` : "";
    say("selected-numbers", `${data.metric} ${quality(p.q)}${part} (${change >= 0 ? "+" : ""}${change.toFixed(4)} against the original)${test}; ` +
      `${size(p.b)}, ${number(p.b)} bytes (${percent(p.b / d.b)} of the original); ${p.ms === null ? "–" : Number(p.ms.toPrecision(3))} ms${faster}; ${number(p.macs)} multiply-accumulates.`);
    const narrow = p.keep ? Object.entries(p.keep).map(([g, r]) => (r ? `${g} ${Math.round(100 * r)}%` : `${g} removed`)) : [];
    say("selected-channels", p.c ? (narrow.length ? `Channels kept by ${p.by}: ${narrow.join(", ")}.` : "All channels are kept.")
      : "Its policy is not in this page, which shows the front and the latest trials layer by layer.");
    const before = p.before ? ` It began as trial ${p.before[0]} with ${quality(p.before[1])} and ${number(p.before[2])} bytes.` : "";
    say("selected-recipe", p.recipe ? `Recovery training, ${p.recipe}.${before}` : "Without recovery training.");
    const named = p.part ? p.whole : p.n, reason = p.part && (p.whole === null || p.whole === undefined);
    $("selected-commands").hidden = reason;
    say("selected-warning", !p.part ? "" : reason ? "It was scored on a part of val only, so it cannot be exported."
      : `It was scored on a part of val only; trial ${p.whole} is the same policy on all of it.`);
    say("command-pick", data.commands.pick + named);
    say("command-export", data.commands.export + named);
    const at = data.front.indexOf(p.n);
    $("smaller").disabled = at === 0 || !data.front.length;
    $("larger").disabled = at === data.front.length - 1 || !data.front.length;
    $("back").disabled = p.n === data.chosen;
  }

  function details(p) {
    const own = data.details && data.details.trials[p.n], note = $("details-note");
    if (!figures.details) return;
    note.textContent = own ? "" : `Front members only: trial ${p.n} has none; what was shown before stays.`;
    if (!own) return;
    const dense = data.details.dense;
    const rows = Object.keys(dense).filter((k) => k in own).map((k) => [k, dense[k], own[k]])
      .sort((a, b) => Math.abs(b[2] - b[1]) - Math.abs(a[2] - a[1])).slice(0, data.most_details);
    const escape = (text) => { const e = document.createElement("i"); e.textContent = text.length > 26 ? text.slice(0, 26) + "…" : text; return e.innerHTML; };
    trace("details", "change").x = rows.flatMap((r) => [r[1], r[2], null]);
    trace("details", "original").x = rows.map((r) => r[1]);
    trace("details", "trial").x = rows.map((r) => r[2]);
    trace("details", "trial").hovertemplate = `trial ${p.n}: %{x:.4~g}<extra></extra>`;
    figures.details.layout.yaxis.ticktext = rows.map((r) => escape(r[0]));
  }

  function select(n) {
    const p = points.get(n);
    if (!p || p === current) return;
    current = p;
    describe(p);
    for (const [name, key] of [["size", "b"], ["latency", "ms"]]) {
      const ring = trace(name, "selected");
      Object.assign(ring, { x: [p[key]], y: [p.q], customdata: [p.n], text: [`trial ${p.n}`] });
    }
    if (p.c) {
      for (const [name, values] of Object.entries(bars(p))) trace("policy", name).y = values;
      const marks = trace("sensitivity", "chosen");
      if (marks) { const known = new Set(trace("sensitivity", "sensitivity").x); marks.x = p.c.map((c) => (known.has(data.choices[c][2]) ? data.choices[c][2] : null)); }
    }
    if (figures.curves) for (const t of figures.curves.data) Object.assign(t, structuredClone(data.styles[t.meta === n ? 1 : 0]));
    details(p);
    for (const row of document.querySelectorAll("tr[data-trial]")) row.classList.toggle("current", Number(row.dataset.trial) === n);
    for (const name of drawn) if (["size", "latency", "policy", "sensitivity", "curves", "details"].includes(name)) draw(name);
  }

  function step(by) {
    if (!current || !data.front.length) return;
    const at = data.front.indexOf(current.n);
    if (at >= 0) return select(data.front[Math.min(data.front.length - 1, Math.max(0, at + by))]);
    const sizes = data.front.map((n) => points.get(n).b);
    const larger = sizes.findIndex((b) => b > current.b);
    const next = by > 0 ? larger : (larger < 0 ? sizes.length : larger) - 1;
    select(data.front[Math.min(sizes.length - 1, Math.max(0, next < 0 && by > 0 ? sizes.length - 1 : next))]);
  }

  // --- the reader's hands ---

  for (const name of ["size", "latency"]) $("chart-" + name).addEventListener("trial", (event) => {
    const number = event.detail.find((n) => points.has(n));
    if (number !== undefined) select(number);
  });
  for (const row of document.querySelectorAll("tr[data-trial]")) row.onclick = () => select(Number(row.dataset.trial));
  $("smaller").onclick = () => step(-1);
  $("larger").onclick = () => step(1);
  $("back").onclick = () => select(data.chosen);

  select(data.chosen);
  start();
})();
