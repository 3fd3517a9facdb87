"use strict";
// Everything from the run's files goes into the page as text nodes and attributes, never as markup.
const DATA = JSON.parse(document.getElementById("data").textContent);
const many = DATA.runs.length > 1;
const longest = Math.max(1, ...DATA.runs.flatMap(r => Object.values(r.stages).map(s => s.steps.length)));
const state = { shown: new Set(DATA.runs.keys()), detail: 0, window: Math.max(1, Math.round(longest / 25)) };
const redraws = [];
const redraw = () => redraws.forEach(f => f());
const color = i => `var(--c${i % 8})`;
const unique = list => [...new Set(list)];

function make(node, props, children) {
  for (const [k, v] of Object.entries(props ?? {})) {
    if (k.startsWith("on")) node.addEventListener(k.slice(2), v);
    else if (k === "style") Object.assign(node.style, v);
    else if (v !== null && v !== undefined && v !== false) node.setAttribute(k, v === true ? "" : v);
  }
  node.append(...children.flat().filter(c => c !== null && c !== undefined));
  return node;
}
const el = (tag, props, ...children) => make(document.createElement(tag), props, children);
const svg = (tag, props, ...children) => make(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);
const swatch = (c, block) => el("span", { class: block ? "swatch block" : "swatch", style: { background: c } });
/** A button that puts `item` into the set and takes it out. */
function toggle(set, item, { off = false, then }, ...label) {
  const pressed = () => String(set.has(item) !== off);
  const flip = () => { set.delete(item) || set.add(item); button.setAttribute("aria-pressed", pressed()); then(); };
  const button = el("button", { "aria-pressed": pressed(), onclick: flip }, label);
  return button;
}
const soft = text => el("p", { class: "note" }, text);

/** Go where the key says, if it says so. */
function arrows(event, to, go) {
  if (!(event.key in to)) return;
  event.preventDefault();
  go(to[event.key]);
}

// ---- numbers
function show(v, digits = 4) {
  if (v === null || v === undefined) return "–";
  if (Math.abs(v) >= 1e5) return Math.round(v).toLocaleString("en");
  const short = Number(v.toPrecision(digits));
  return v && Math.abs(v) < 1e-3 ? short.toExponential() : short.toString().replace("-", "−");
}
const two = v => v === null || v === undefined ? "–" : v.toFixed(2).replace("-", "−");
const decimals = step => Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
function duration(s) {
  return s < 120 ? `${show(s, 3)} s` : s < 7200 ? `${Math.floor(s / 60)} min ${Math.floor(s % 60)} s` : `${(s / 3600).toFixed(1)} h`;
}
/** Round steps of 1, 2 or 5 times a power of ten; the ticks enclose [low, high]. */
function ticks(low, high, count, whole) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  let step = [1, 2, 5, 10].find(m => m * power >= raw * 0.999) * power;
  if (whole) step = Math.max(1, Math.round(step));
  const first = Math.floor(low / step + 1e-9), last = Math.ceil(high / step - 1e-9);
  return { step, at: Array.from({ length: Math.max(1, last - first) + 1 }, (_, i) => (first + i) * step) };
}
function tickText(v, step) {
  if (Math.abs(v) < step / 2) return step < 1e-3 ? "0" : (0).toFixed(decimals(step));
  if (step >= 1e6) return `${Number((v / 1e6).toPrecision(6))} M`;
  if (step >= 1e3) return `${Number((v / 1e3).toPrecision(6))} k`;
  return step < 1e-3 ? Number(v.toPrecision(3)).toExponential() : v.toFixed(decimals(step)).replace("-", "−");
}
/** Running mean over the last values that are there: `most`, or an eighth of all. */
function smooth(values, most) {
  const width = Math.min(most, Math.ceil(values.length / 8)), last = i => values.slice(Math.max(0, i - width + 1), i + 1).filter(v => v !== null);
  return width < 2 ? values : values.map((v, i) => v === null ? null : sum(last(i)) / last(i).length);
}
const sum = list => list.reduce((a, b) => a + b, 0);
const median = a => [...a].sort((x, y) => x - y)[a.length >> 1];

// ---- charts
const DASH = ["", "6 3", "2 3", "9 3 2 3"];
const HEIGHT = 200, TOP = 10, BOTTOM = 34, RIGHT = 14;
/** The curves that are on: colour by run where several are laid over each other, else by key. Stacks get `base` and `top`. */
function seriesOf(spec, hidden) {
  const found = [], overlaid = many && !spec.one;
  DATA.runs.forEach((run, r) => spec.keys.forEach(([key, label], k) => {
    const stage = run.stages[spec.stage], raw = stage?.columns[key];
    if (hidden.has(key) || (spec.one ? r !== state.detail : !state.shown.has(r)) || !raw?.some(v => v !== null)) return;
    const name = !overlaid ? label : spec.keys.length > 1 ? `${run.name}: ${label}` : run.name;
    const ys = spec.stack ? raw : smooth(raw, state.window);
    found.push({ name, key, xs: stage.steps, raw, ys, color: color(overlaid ? r : k), dash: overlaid ? DASH[k % 4] : "" });
  }));
  let base = found[0]?.xs.map(() => 0);
  if (spec.stack) for (const s of found) {
    s.base = base;
    s.top = base = s.ys.map((v, i) => s.base[i] + (v ?? 0));
  }
  return found;
}
/** Shares of the batch by pass rate, of the run in detail: {x, y, share}. */
function heatOf(spec, run) {
  const stage = run.stages[spec.stage], columns = Object.entries(stage?.columns ?? {}).filter(([k]) => k.startsWith(spec.heat));
  const cell = ([k, shares]) => stage.steps.map((x, i) => ({ x, y: Number(k.slice(spec.heat.length)), share: shares[i] ?? 0 }));
  return columns.flatMap(cell).filter(h => h.share > 0);
}
function path(xs, ys, px, py) {
  const there = i => ys[i] !== null && ys[i] !== undefined, dot = i => there(i - 1) || there(i + 1) ? "" : "h.01";
  const point = (x, i) => `${there(i - 1) ? "L" : "M"}${px(x).toFixed(1)} ${py(ys[i]).toFixed(1)}${dot(i)}`;
  return xs.map((x, i) => there(i) ? point(x, i) : "").join("");
}
/** Where the axes begin and end, their ticks and labels, px(step) and py(value). */
function axes(spec, values, limits, xs, width) {
  let low = Math.min(...values, ...limits), high = Math.max(...values, ...limits);
  if (spec.zero) low = Math.min(0, low);
  const usual = 2.5 * median(values), cut = spec.stack && usual > 0 && high > usual;
  if (cut) high = usual;
  const flat = high - low < 1e-12 * Math.max(1, Math.abs(high)), pad = flat ? Math.abs(high) / 10 || 1 : 0;
  [low, high] = [spec.zero ? low : low - pad, high + pad];
  const y = ticks(low, high, 4, spec.log), power = v => `1e${Math.round(v)}`;
  const label = v => !spec.log ? tickText(v, y.step) : spec.offset ? v > spec.floor ? `${spec.offset}+${power(v)}` : "exact" : v > spec.floor ? power(v) : "0";
  const texts = y.at.map(label), left = 14 + 6.3 * Math.max(...texts.map(t => t.length));
  const x0 = xs[0], x1 = Math.max(xs.at(-1), x0 + 1), y0 = y.at[0], y1 = y.at.at(-1), w = width - left - RIGHT;
  const px = x => left + (x - x0) / (x1 - x0) * w, py = v => TOP + (y1 - v) / (y1 - y0) * (HEIGHT - TOP - BOTTOM);
  const x = ticks(x0, x1, Math.max(2, Math.floor((width - left) / 60)), true).at.filter(v => v >= x0 && v <= x1);
  const foot = HEIGHT - BOTTOM;
  const lines = [
    y.at.map((v, i) => [
      svg("line", { x1: left, x2: width - RIGHT, y1: py(v), y2: py(v), stroke: "var(--line)" }),
      svg("text", { x: left - 6, y: py(v) + 4, "text-anchor": "end" }, texts[i])]),
    x.map(v => [
      svg("line", { x1: px(v), x2: px(v), y1: foot, y2: foot + 4, stroke: "var(--soft)" }),
      svg("text", { x: px(v), y: foot + 16, "text-anchor": "middle" }, v.toLocaleString("en"))]),
    svg("text", { x: left + w / 2, y: HEIGHT - 3, "text-anchor": "middle" }, "step")].flat(2);
  const area = [left - 2, TOP - 2, w + 4, foot - TOP + 4]; // clips what leaves the axes
  const inner = svg("svg", { x: area[0], y: area[1], width: area[2], height: area[3], viewBox: area.join(" ") });
  return { px, py, left, x0, x1, cut, lines, inner };
}
/** spec: stage, title, unit, keys [[column, label]], and zero (axis from 0), log (of value - offset, not below 10^floor), limit (config
 * key), one (of the run in detail alone), stack (areas; outliers leave the axis), heat (column prefix), band (config key of σ), note. */
function chart(spec) {
  const hidden = new Set(), note = soft(""), plot = el("div", { class: "plot", tabindex: 0, role: "img" });
  const tip = el("div", { class: "tip", role: "status", hidden: true });
  const legend = el("div", { class: "keys", role: "group", "aria-label": `Curves of ${spec.title}` });
  let view = null, at = -1;
  const dashed = k => svg("svg", { width: 26, height: 8, "aria-hidden": true },
    svg("line", { x1: 0, x2: 20, y1: 4, y2: 4, stroke: "currentColor", "stroke-width": 2, "stroke-dasharray": DASH[k % 4] }));
  const sign = k => many && !spec.one ? dashed(k) : swatch(color(k), spec.stack);
  if (spec.keys.length > 1) legend.append(...spec.keys.map(([key, label], k) => toggle(hidden, key, { off: true, then: draw }, sign(k), label)));

  function draw() {
    const run = DATA.runs[state.detail], has = spec.keys.some(([key]) => run.stages[spec.stage]?.columns[key]);
    figure.hidden = Boolean(spec.one) && !has;
    const width = plot.clientWidth;
    if (!width) return;
    const series = seriesOf(spec, hidden), log = v => Math.log10(Math.max(v - (spec.offset ?? 0), 10 ** spec.floor));
    const scale = v => v === null || !spec.log ? v : log(v);
    const ends = DATA.runs.filter((_, r) => spec.limit && state.shown.has(r)).map(r => Number(r.config[spec.limit]));
    const limits = unique(ends.filter(v => v > 0)), values = series.flatMap(s => s.top ?? [...s.ys, ...s.raw]).filter(v => v !== null).map(scale);
    plot.replaceChildren();
    leave();
    view = null;
    note.textContent = values.length ? spec.note ?? "" : "Nothing to show for the curves that are on.";
    if (!values.length) return;
    const xs = unique(series.flatMap(s => s.xs)).sort((a, b) => a - b);
    const { px, py, left, x0, x1, cut, lines, inner } = axes(spec, values, limits.map(scale), xs, width);
    if (spec.heat) {
      const w = (px(x1) - px(x0)) / Math.max(1, xs.length - 1), h = py(0) - py(1 / Number(run.config[spec.bins] ?? 8));
      const cell = c => svg("rect", { x: px(c.x) - w / 2, y: py(c.y) - h / 2, width: w + .3, height: h, fill: color(0), opacity: c.share.toFixed(3) });
      inner.append(...heatOf(spec, run).map(cell));
    }
    for (const s of series) {
      const look = { fill: "none", stroke: s.color, "stroke-linecap": "round", "stroke-linejoin": "round" };
      const line = (ys, more) => inner.append(svg("path", { ...look, d: path(s.xs, ys, px, py), ...more }));
      if (s.top) {
        const back = [...s.xs.keys()].reverse().map(i => `L${px(s.xs[i]).toFixed(1)} ${py(s.base[i]).toFixed(1)}`).join("");
        inner.append(svg("path", { d: `${path(s.xs, s.top, px, py)}${back}Z`, fill: s.color, opacity: .8 }));
        if (cut && s === series.at(-1)) {
          const most = Math.max(...s.top);
          note.textContent = `Step ${s.xs[s.top.indexOf(most)]} took ${duration(most)}, above the axis.`;
        }
        continue;
      }
      const sigma = spec.band && s.key === spec.keys[0][0] ? Number(run.config[spec.band]) : 0;
      if (sigma) for (const side of [sigma, -sigma]) line(s.raw.map(v => v === null ? null : v + side), { "stroke-dasharray": "2 4" });
      if (s.ys !== s.raw) line(s.raw.map(scale), { "stroke-width": 1, opacity: .3 });
      line(s.ys.map(scale), { "stroke-width": 2, "stroke-dasharray": s.dash });
    }
    const cursor = svg("line", { y1: TOP, y2: HEIGHT - BOTTOM, stroke: "var(--soft)", visibility: "hidden" });
    const bounds = limits.map(v => [v, py(scale(v))]).map(([v, y]) => [
      svg("line", { x1: left, x2: width - RIGHT, y1: y, y2: y, stroke: "var(--bad)", "stroke-dasharray": "5 4" }),
      svg("text", { x: width - RIGHT, y: y + 13, "text-anchor": "end" }, `limit ${v}: the run stops`)]);
    plot.append(svg("svg", { width, height: HEIGHT, "aria-hidden": true }, lines, inner, cursor, ...bounds));
    view = { xs, px, series, cursor, width };
    const told = series.map(s => `${s.name} from ${show(s.raw.find(v => v !== null))} to ${show(s.raw.findLast(v => v !== null))}`).join("; ");
    plot.setAttribute("aria-label", `${spec.title}${spec.unit ? `, ${spec.unit}` : ""}, steps ${x0} to ${x1}. ${told}. Arrow keys read single steps.`);
  }
  function read(index) {
    if (!view) return;
    at = Math.max(0, Math.min(view.xs.length - 1, index));
    const x = view.xs[at], place = view.px(x), early = place < view.width / 2;
    for (const [k, v] of [["x1", place], ["x2", place], ["visibility", "visible"]]) view.cursor.setAttribute(k, v);
    const rows = view.series.map(s => [s, s.raw[s.xs.indexOf(x)]]).filter(([, v]) => v !== undefined && v !== null);
    const row = ([s, v]) => el("div", {}, el("span", {}, swatch(s.color), s.name), el("b", {}, show(v, spec.digits)));
    tip.replaceChildren(`step ${x}`, ...rows.map(row));
    Object.assign(tip.style, early ? { left: `${place + 10}px`, right: "" } : { left: "", right: `${view.width - place + 10}px` });
    tip.hidden = false;
  }
  function leave() {
    tip.hidden = true;
    view?.cursor.setAttribute("visibility", "hidden");
  }
  plot.addEventListener("pointermove", e => {
    if (!view) return;
    const x = e.clientX - plot.getBoundingClientRect().left, gaps = view.xs.map(v => Math.abs(view.px(v) - x));
    read(gaps.indexOf(Math.min(...gaps)));
  });
  for (const away of ["pointerleave", "blur"]) plot.addEventListener(away, leave);
  plot.addEventListener("keydown", e => {
    arrows(e, { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: Infinity }, read);
    if (e.key === "Escape") leave();
  });
  redraws.push(draw);
  new ResizeObserver(draw).observe(plot);
  const caption = el("figcaption", {}, el("h3", {}, spec.title), " ", el("span", {}, spec.unit ?? ""));
  const figure = el("figure", { class: "chart" }, caption, legend, el("div", { class: "frame" }, plot, tip), note);
  return figure;
}

// ---- sections
const AFTER = { init: "untrained", sft: "after SFT", grpo: "after GRPO" }, STAGES = { sft: "SFT", grpo: "GRPO" };
const NAMES = {
  completion_tokens_mean: "mean", completion_tokens_max: "longest", unfinished: "cut off by the token budget",
  mixed_groups: "groups with mixed rewards", clip_fraction: "tokens clipped", staleness_mean: "mean", staleness_max: "oldest token",
  parity_prob_error: "servers against learner", prob_error: "engine against learner", pass_rate: "actual mean", pass_rate_target: "target centre",
};
const CHARTS = [
  { title: "Reward and its parts", unit: "mean of rollouts", keys: ["reward"], parts: true, zero: true },
  { title: "Reward by task", unit: "mean of rollouts", prefix: "reward/", zero: true },
  { title: "Loss", unit: "per token", keys: ["loss"] },
  { title: "KL to the reference", unit: "nats per token", keys: ["kl_ref"], zero: true },
  { title: "KL between sampler and learner", unit: "nats per token, log scale", keys: ["sampler_kl"], log: true, floor: -12 },
  { title: "Entropy", unit: "nats per token", keys: ["entropy"], zero: true },
  { title: "Completion length", unit: "tokens", keys: ["completion_tokens_mean", "completion_tokens_max"], zero: true },
  { title: "Shares", unit: "of completions, groups, tokens", keys: ["unfinished", "mixed_groups", "clip_fraction"], zero: true },
  { title: "Gradient norm", unit: "before clipping", keys: ["grad_norm"], zero: true },
  { title: "Learning rate", keys: ["learning_rate"], zero: true },
  { title: "Staleness", unit: "steps behind the learner", keys: ["staleness_mean", "staleness_max"], zero: true },
  { title: "Parity oracle", unit: "mean exp|difference of logprobs|", keys: ["parity_prob_error", "prob_error"],
    log: true, offset: 1, floor: -8, limit: "engine.parity_limit", digits: 9 },
  { title: "Curriculum", unit: "pass rate of the prompts", keys: ["pass_rate_target", "pass_rate"], zero: true, one: true,
    heat: "pass_rate/", bins: "grpo.curriculum.bins", band: "grpo.curriculum.sigma",
    note: "Shade: share of the batch at that pass rate. Dots: one σ around the target." },
  { title: "Time by phase", unit: "seconds of a step", prefix: "time.", stack: true, one: true, zero: true },
  { title: "Throughput", unit: "tokens per second", prefix: "rate.", zero: true },
];
function section(title, ...content) {
  const id = title.toLowerCase().replace(/[^a-z0-9]+/g, "-");
  document.getElementById("nav").append(el("a", { href: `#${id}` }, title));
  return el("section", { "aria-labelledby": id }, el("h2", { id }, title), ...content);
}
/** The charts of a stage for which there is something to see; what never changes is one line, what no chart names is folded away. */
function stageSection(name) {
  const runs = DATA.runs.filter(r => r.stages[name]), columns = unique(runs.flatMap(r => Object.keys(r.stages[name].columns)));
  const values = key => runs.flatMap(r => r.stages[name].columns[key] ?? []).filter(v => v !== null);
  const still = columns.filter(k => !/[./]/.test(k) && values(k).length > 1 && unique(values(k)).length === 1), used = new Set(still);
  const build = spec => {
    const parts = spec.parts ? unique(runs.flatMap(r => r.parts)) : [], named = p => columns.filter(k => k.startsWith(p));
    const keys = (spec.prefix ? named(spec.prefix) : [...spec.keys, ...parts]).filter(k => values(k).length && !still.includes(k));
    [...keys, ...(spec.heat ? named(spec.heat) : [])].forEach(k => used.add(k));
    if (spec.stack) keys.sort((a, b) => sum(values(b)) - sum(values(a))).splice(8);
    const label = k => spec.prefix ? k.slice(spec.prefix.length) : NAMES[k] ?? k.replaceAll("_", " ");
    return keys.length ? chart({ ...spec, stage: name, keys: keys.map(k => [k, label(k)]) }) : null;
  };
  const main = CHARTS.map(build);
  const rest = columns.filter(k => !used.has(k) && !/^(time|rate)\./.test(k) && values(k).length);
  const more = rest.map(k => build({ title: k.replaceAll("_", " "), keys: [k] }));
  const thinned = runs.filter(r => r.stages[name].every > 1).map(r => soft(`${r.name}: one step of every ${r.stages[name].every} is drawn.`));
  return section(STAGES[name] ?? name, el("div", { class: "grid" }, main), thinned,
    still.length ? soft(`The same at every step: ${still.map(k => `${k} ${show(values(k)[0])}`).join(", ")}.`) : null,
    rest.length ? el("details", {}, el("summary", {}, `${rest.length} more figures of each step`), el("div", { class: "grid" }, more)) : null);
}
function facts(run) {
  const s = run.summary, pairs = (o, f) => Object.entries(o).map(f).join(", ");
  const found = {
    steps: pairs(run.stages, ([k, v]) => `${STAGES[k] ?? k} ${v.steps.at(-1)}`),
    "time, all phases": s.seconds && duration(sum(Object.values(s.seconds))),
    tokens: s.tokens && pairs(s.tokens, ([k, v]) => `${k.replace("_tokens", "").replace(".", " ")} ${v.toLocaleString("en")}`),
    model: s.parameters && `${s.parameters.toLocaleString("en")} parameters`,
    device: s.device && `${s.device}, mesh ${pairs(s.mesh, ([k, v]) => `${k} ${v}`)}`,
    config: s.name ? `${s.name} ${s.config_hash}` : run.config.name,
    state: s.name ? "" : "no summary yet: the run has not ended",
  };
  return el("dl", {}, Object.entries(found).filter(f => f[1]).map(([k, v]) => [el("dt", {}, k), el("dd", {}, v)]).flat());
}
function result(run, r) {
  const evals = run.evals, first = evals[0], last = evals.at(-1);
  const head = [swatch(color(r), true), el("h3", {}, run.name)], foot = [facts(run), ...run.notes.map(soft)];
  if (!last) return el("article", { class: "card" }, head, soft("No held-out evaluation."), foot);
  const [from, to] = ticks(Math.min(0, ...evals.map(e => e.low)), Math.max(1, ...evals.map(e => e.high)), 1).at, at = v => 100 * (v - from) / (to - from);
  const bar = e => el("div", { class: "track", "aria-hidden": true },
    el("i", { style: { left: `${at(e.low)}%`, right: `${100 - at(e.high)}%`, background: color(r) } }),
    el("b", { style: { left: `${at(e.mean)}%`, background: color(r) } }));
  const row = e => [el("span", {}, AFTER[e.after] ?? `after ${e.after}`), bar(e), el("span", {}, `${two(e.mean)}  (${two(e.low)} to ${two(e.high)})`)];
  const verdict = first.high < last.low ? "; the intervals are apart" : first.low > last.high ? "; it fell, the intervals are apart" : "; the intervals overlap";
  return el("article", { class: "card" }, head,
    el("p", { class: "big" }, evals.length > 1 ? `${two(first.mean)} → ${two(last.mean)}` : two(last.mean)),
    soft(`accuracy on ${last.num_prompts} prompts${evals.length > 1 ? verdict : ""}`),
    el("div", { class: "forest" }, evals.flatMap(row), el("span"),
      el("div", { class: "ends" }, el("span", {}, show(from)), el("span", {}, show(to))), el("span", { class: "soft" }, "95 % interval")),
    foot);
}
function configs() {
  const all = [DATA.parent, ...DATA.runs.map(r => r.parent)].filter(Boolean), parents = all.filter((p, i) => all.findIndex(q => q.name === p.name) === i);
  const columns = [...parents.map(p => ({ ...p, name: `${p.name} (parent)` })), ...DATA.runs].filter(c => Object.keys(c.config).length);
  if (!columns.length) return null;
  const keys = unique(columns.flatMap(c => Object.keys(c.config))), differ = keys.filter(k => unique(columns.map(c => c.config[k])).length > 1);
  const head = el("tr", {}, el("th", { scope: "col" }, "key"), columns.map(c => el("th", { scope: "col" }, c.name)));
  const row = k => el("tr", {}, el("th", { scope: "row" }, k), columns.map(c => el("td", {}, c.config[k] ?? "–")));
  const table = rows => el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Config values" },
    el("table", {}, el("thead", {}, head.cloneNode(true)), el("tbody", {}, rows.map(row))));
  const first = columns.length === 1 ? soft("No parent run to compare with.") : differ.length ? table(differ) : soft("The configs are the same.");
  return section("Config", first, el("details", {}, el("summary", {}, `All ${keys.length} keys`), table(keys)));
}

// ---- rollouts
function rollouts() {
  if (!DATA.runs.some(r => r.rollouts.length)) return null;
  let groups = [], current = null, filled = null;
  const count = el("span", { class: "soft", role: "status" }), pane = el("div");
  const list = el("div", { class: "list", role: "group", "aria-label": "Groups" }), step = el("select", { id: "step", onchange: filter });
  const search = el("input", { type: "search", id: "search", placeholder: "prompts and responses", oninput: filter });
  const shade = el("input", { type: "checkbox", id: "shade", checked: true, onchange: () => current && open(groups.indexOf(current)) });
  const text = x => x.texts.join(""), place = g => `${g.stage} ${g.step}`;
  /** [begin, end) of every place where the search text stands. */
  function hits(words) {
    const query = search.value.toLowerCase(), lower = words.toLowerCase(), found = [];
    for (let i = query ? lower.indexOf(query) : -1; i >= 0; i = lower.indexOf(query, i + query.length)) found.push([i, i + query.length]);
    return found;
  }
  function marked(words) {
    const found = hits(words), ends = [0, ...found.map(h => h[1])];
    return [...found.flatMap(([a, b], i) => [words.slice(ends[i], a), el("span", { class: "hit" }, words.slice(a, b))]), words.slice(ends.at(-1))];
  }
  function filter() {
    const run = DATA.runs[state.detail], wanted = g => !search.value || [text(g.prompt), g.question, ...g.rollouts.map(text)].some(t => hits(t).length);
    groups = run.rollouts.filter(g => (!step.value || step.value === place(g)) && wanted(g));
    const left = run.recorded > run.rollouts.length ? ` (a sample of the ${run.recorded} recorded)` : "";
    count.textContent = `${groups.length} of ${run.rollouts.length} groups${left}`;
    list.hidden = !groups.length;
    const mean = g => sum(g.rollouts.map(x => x.reward)) / g.rollouts.length, go = to => { open(to); list.children[to].focus(); };
    const key = i => e => arrows(e, { ArrowDown: i + 1, ArrowUp: i - 1 }, to => groups[to] && go(to));
    list.replaceChildren(...groups.map((g, i) => el("button", { onclick: () => open(i), onkeydown: key(i) },
      el("em", {}, g.question || g.prompt_id), el("span", { class: "row" }, el("span", {}, place(g)), el("span", {}, `reward ${two(mean(g))}`)))));
    if (groups.length) open(Math.max(0, groups.indexOf(current)));
    else pane.replaceChildren(soft("No group has this text."));
  }
  function open(i) {
    const g = current = groups[i], p = g.prompt;
    [...list.children].forEach((b, k) => b.setAttribute("aria-current", k === i));
    const told = [`${g.stage} step ${g.step}`, g.prompt_id, `verifier ${g.verifier}`, g.pass_rate === null ? "" : `pass rate ${show(g.pass_rate)}`,
      `${p.tokens} prompt tokens`, `${g.rollouts.length} of ${g.num_rollouts} responses recorded`, `one of the step's ${g.num_groups} groups`];
    const skipped = p.skipped ? `\n[… ${p.skipped} tokens …]\n` : "";
    const words = el("div", { class: "text", tabindex: 0, role: "region", "aria-label": "Prompt" }, marked(p.texts[0]), skipped, marked(p.texts[1]));
    pane.replaceChildren(
      el("div", { class: "card" }, el("h3", {}, "Prompt"), soft(told.filter(Boolean).join(" · ")), words, soft(`Checked against: ${g.args}`)),
      el("div", { class: "answers" }, g.rollouts.map(answer)));
  }
  function answer(x, k) {
    const versions = x.versions.flatMap(([v, n]) => Array(n).fill(v)), found = hits(text(x)), [head, skipped] = x.skipped;
    const readout = el("p", { class: "note readout", role: "status" }, "Point at a token, or use the arrow keys.");
    let end = 0, at = -1;
    const tokens = x.texts.map((t, i) => {
      const begin = end, lp = x.logprobs[i], real = i < head ? i : i + skipped, changed = real > 0 && versions[real] !== versions[real - 1];
      end += t.length;
      const hit = found.some(([a, b]) => a < end && b > begin);
      const node = el("span", { class: `${hit ? "hit " : ""}${changed ? "new" : ""}`.trim() || null }, t);
      const heat = Math.round(70 * Math.min(1, -lp / 5));
      if (shade.checked && lp !== null) node.style.background = `color-mix(in srgb, var(--heat) ${heat}%, transparent)`;
      const odds = lp === null ? "logprob unknown" : `logprob ${show(lp)}, p ${show(Math.exp(lp), 2)}`;
      return { node, about: `${JSON.stringify(t)} token ${real + 1}: ${odds}, version ${versions[real]}` };
    });
    const pick = i => {
      tokens[at]?.node.classList.remove("at");
      tokens[at = i].node.classList.add("at");
      readout.textContent = tokens[i].about;
    };
    const over = e => { const i = tokens.findIndex(t => t.node === e.target); if (i >= 0) pick(i); };
    const go = to => { if (tokens[to]) { pick(to); tokens[to].node.scrollIntoView({ block: "nearest" }); } };
    const key = e => arrows(e, { ArrowRight: at + 1, ArrowLeft: at - 1 }, go);
    const nodes = tokens.map(t => t.node), numbers = unique(x.versions.map(v => v[0])), low = Math.min(...numbers), high = Math.max(...numbers);
    if (skipped) nodes.splice(head, 0, `\n[… ${skipped} tokens …]\n`);
    const parts = Object.entries(x.parts).map(([n, v]) => `${n} ${show(v)}`).join(", ");
    const told = [parts, `${x.tokens} tokens`, x.finished ? "" : "cut off", low === high ? `version ${low}` : `versions ${low} to ${high}`, x.failure && `no verdict: ${x.failure}`];
    const sign = x.advantage > 0 ? "plus" : x.advantage < 0 ? "minus" : "soft";
    const title = [el("h3", {}, `Response ${k + 1}`), el("b", {}, `reward ${two(x.reward)}`), el("span", { class: sign }, `advantage ${x.advantage > 0 ? "+" : ""}${two(x.advantage)}`)];
    const words = el("div", { class: "text", tabindex: 0, role: "group", "aria-label": `Response ${k + 1}`, onpointerover: over, onkeydown: key }, nodes);
    return el("article", { class: "card" }, el("div", { class: "row base" }, title), soft(told.filter(Boolean).join(" · ")), words, readout);
  }
  redraws.push(() => {
    if (filled === state.detail) return;
    filled = state.detail;
    const steps = unique(DATA.runs[filled].rollouts.map(place));
    step.replaceChildren(el("option", { value: "" }, "all"), ...steps.map(s => el("option", { value: s }, s)));
    filter();
  });
  const ramp = el("span", { class: "soft" }, "likely ", el("span", { class: "ramp" }), " logprob −5 or less");
  return section("Rollouts", el("div", { class: "row" }, el("label", { for: "search" }, "Search"), search, el("label", { for: "step" }, "Step"), step,
    el("label", {}, shade, " Shade tokens by logprob"), ramp, count), el("div", { class: "browser" }, list, pane));
}

// ---- the page
document.title = `${DATA.runs.map(r => r.name).join(", ")} – lnjax report`;
const names = DATA.runs.map((run, r) => many ? toggle(state.shown, r, { then: redraw }, swatch(color(r), true), run.name) : el("b", {}, run.name));
document.getElementById("runs").append(...names);
const told = () => state.window > 1 ? `${state.window} steps` : "1 step, as logged";
const output = el("output", { for: "window" }, told()), knobs = document.getElementById("knobs");
const slide = e => { state.window = Number(e.target.value); output.textContent = told(); redraw(); };
knobs.append(el("label", { for: "window" }, "Running mean of up to"),
  el("span", {}, el("input", { type: "range", id: "window", min: 1, max: 50, value: state.window, oninput: slide }), " ", output));
const turn = e => { state.detail = Number(e.target.value); redraw(); };
if (many) knobs.append(el("label", { for: "detail" }, "Rollouts, phases and curriculum of"),
  el("select", { id: "detail", onchange: turn }, DATA.runs.map((r, i) => el("option", { value: i }, r.name))));
const stages = unique(DATA.runs.flatMap(r => Object.keys(r.stages)));
const results = section("Held-out results", el("div", { class: "grid wide" }, DATA.runs.map(result)));
document.getElementById("main").append(...[results, ...stages.map(stageSection), rollouts(), configs()].filter(Boolean));
redraw();
