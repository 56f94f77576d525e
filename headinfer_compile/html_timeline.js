"use strict";
// Drawing: lanes of one site and of a whole step, to predicted scale. Times are microseconds.

const LANE = 30, LABEL = 74, TOP = 18;
const STREAMS = ["compute", "h2d", "d2h", "cpu"];

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function frame(lanes, width, span, low) {
  const height = TOP + lanes.length * LANE + 4;
  const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
  const x = (time) => LABEL + ((time - low) / span) * (width - LABEL - 12);
  const raw = span / Math.max(2, Math.floor((width - LABEL) / 110));
  const power = 10 ** Math.floor(Math.log10(raw));
  const tick = [1, 2, 5, 10].map((m) => m * power).find((step) => step >= raw);
  for (let time = low; time <= low + span; time += tick) {
    root.append(
      svg("line", { class: "tick", x1: x(time), x2: x(time), y1: TOP - 3, y2: height }),
      svg("text", { x: x(time) + 2, y: 10 }, duration(time - low))
    );
  }
  lanes.forEach((name, row) => {
    const y = TOP + row * LANE;
    root.append(
      svg("line", { class: "lane", x1: 0, x2: width, y1: y + LANE, y2: y + LANE }),
      svg("text", { x: 2, y: y + 19 }, name)
    );
  });
  return { root, x, y: (row) => TOP + row * LANE + 4 };
}

function bar(at, row, start, end, attributes, label, title) {
  const left = at.x(start), width = Math.max(1.2, at.x(end) - left);
  const rect = svg("rect", { x: left, y: at.y(row), width, height: LANE - 8, rx: 2, ...attributes });
  if (title) rect.append(svg("title", {}, title));
  at.root.append(rect);
  if (label && width > 7 * label.length + 6) {
    at.root.append(svg("text", {
      x: left + 4, y: at.y(row) + 15, style: "fill: var(--back); pointer-events: none",
    }, label));
  }
  return rect;
}

// The whole step: a bar for each region and site, and for each layer's copies.
function drawStep(step, width, chosen, choose) {
  const used = streamsOf(step);
  const end = Math.max(step.prediction.us, 1);
  const at = frame(used, width, end, 0);
  for (const [name, start, stop] of step.regions) {
    bar(at, 0, start, stop, { class: "region" }, null, `${name}: ${duration(stop - start)}`);
  }
  step.sites.forEach((site, index) => {
    const [start, stop] = site.time;
    const rect = bar(at, 0, start, stop, {
      class: "compute", role: "button", tabindex: index === chosen ? 0 : -1,
      "data-site": index, "aria-label": `layer ${site.layer}, ${duration(stop - start)}`,
    }, String(site.layer), `layer ${site.layer}: ${duration(stop - start)}`);
    rect.addEventListener("click", () => choose(index));
    for (const stream of used.slice(1)) {
      for (const [from, to] of merged(timesOf(step, site).filter((t) => t.op.stream === stream))) {
        if (to > 0 && from < end) {
          const label = `layer ${site.layer}, ${stream}: ${duration(to - from)}`;
          const copy = bar(at, used.indexOf(stream), Math.max(0, from), Math.min(to, end),
            { class: stream }, null, label);
          copy.addEventListener("click", () => choose(index));
        }
      }
    }
  });
  const [start, stop] = step.sites[chosen].time;
  at.root.append(svg("rect", {
    class: "chosen", x: at.x(start) - 1, width: Math.max(3, at.x(stop) - at.x(start) + 2), y: TOP - 2,
    height: used.length * LANE + 2,
  }));
  return at.root;
}

function streamsOf(step) {
  const found = new Set(["compute"]);
  for (const schedule of step.schedules) for (const op of schedule.ops) found.add(op.stream);
  return STREAMS.filter((stream) => found.has(stream));
}

// Ops of a site with their times: those started before it, then its own.
function timesOf(step, site) {
  const ops = step.schedules[site.schedule].ops;
  const cold = site.cold.map((op) => ({ op, site, index: null, start: op.time[0], end: op.time[1] }));
  return cold.concat(ops.map((op, index) => ({
    op, site, index, start: site.times[index][0], end: site.times[index][1],
  })));
}

// Intervals that touch, as one.
function merged(times) {
  const found = [];
  for (const { start, end } of times.filter((t) => t.end > t.start)) {
    const last = found[found.length - 1];
    if (last && start <= last[1] + 1) last[1] = Math.max(last[1], end);
    else found.push([start, end]);
  }
  return found;
}

// One site: lanes of the streams, then of the slots: filled (h2d), held, read (compute).
function drawSite(step, number, width, state, handlers) {
  const site = step.sites[number];
  const used = streamsOf(step);
  const slots = [...Array(step.num_slots).keys()];
  const streams = step.h2d_bytes ? used.concat(slots.map((slot) => `slot ${slot}`)) : used;
  const near = [number - 1, number, number + 1].filter((i) => step.sites[i]);
  const all = near.flatMap((i) => timesOf(step, step.sites[i]));
  const own = all.filter((t) => t.site === site && !t.op.next_layer && t.end > t.start);
  let [low, high] = site.time;
  for (const t of own) if (t.op.stream === "h2d") low = Math.min(low, t.start);
  const span = Math.max(high - low, 1) * 1.02;
  const at = frame(streams, width, span, low);
  const ring = (t) => (t.op.slot === undefined ? null : (t.site.base + t.op.slot) % step.num_slots);
  const inside = all.filter((t) => t.end > low && t.start < low + span);
  const visible = (t) => [Math.max(t.start, low), Math.min(t.end, low + span)];
  for (const t of inside) {
    if (t.end <= t.start) continue;
    const mine = t.site === site && t.index !== null;
    const off = state.slot !== null && ring(t) !== state.slot ? " off" : "";
    const on = mine && t.index === state.shown ? " on" : "";
    const rect = bar(at, used.indexOf(t.op.stream), ...visible(t), {
      class: `op ${t.op.stream}${t.site === site ? "" : " other"}${off}${on}`,
      role: mine ? "button" : null, tabindex: mine ? -1 : null, "data-op": mine ? t.index : null,
      "aria-label": `${t.op.name}: ${t.op.what || t.op.op}`,
    }, t.op.block === undefined || off ? null : `${t.op.block}`,
    mine ? null : `${t.op.name} of layer ${t.site.layer}`);
    if (mine) {
      rect.addEventListener("click", () => handlers.select(t.index));
      rect.addEventListener("mouseenter", () => handlers.preview(t.index));
      rect.addEventListener("mouseleave", () => handlers.preview(null));
    }
  }
  if (step.h2d_bytes) {
    for (const t of inside) {
      const slot = ring(t);
      if (slot === null || t.end <= t.start || !["h2d", "compute"].includes(t.op.stream)) continue;
      const off = state.slot !== null && slot !== state.slot ? " off" : "";
      bar(at, used.length + slot, ...visible(t), { class: `op ${t.op.stream}${off}` }, null,
        `slot ${slot}: ${t.op.stream === "h2d" ? "filled" : "read"} by ${t.op.name}, layer ${t.site.layer}`);
    }
  }
  if (state.shown !== null) drawEdges(at, used, site, all, state.shown, visible, [low, low + span]);
  return at.root;
}

function drawEdges(at, used, site, all, shown, visible, [low, high]) {
  const self = all.find((t) => t.site === site && t.index === shown);
  if (!self) return;
  const point = (t, time) => [
    at.x(Math.min(Math.max(time, low), high)), at.y(used.indexOf(t.op.stream)) + (LANE - 8) / 2,
  ];
  const curve = (from, to, kind) => {
    const [x1, y1] = point(from, from.end), [x2, y2] = point(to, to.start);
    const bend = Math.max(14, Math.abs(x2 - x1) / 2);
    at.root.append(
      svg("path", { class: `edge ${kind}`, d: `M${x1},${y1} C${x1 + bend},${y1} ${x2 - bend},${y2} ${x2},${y2}` }),
      svg("circle", { cx: x2, cy: y2, r: 3, style: "fill: var(--text)" })
    );
  };
  for (const [name] of self.op.after || []) {
    const from = source(all, self, name);
    if (from) curve(from, self, "in");
  }
  for (const t of all) {
    if (t !== self && (t.op.after || []).some(([name]) => source(all, t, name) === self)) {
      curve(self, t, "out");
    }
  }
}

// The op that made the token `name` that `t` waits for; ring inputs lead to the site before.
function source(all, t, name) {
  const here = all.find((o) => o.site === t.site && o.op.name === name && o !== t);
  if (here) return here;
  if (!/^r\d+$/.test(name)) return null;
  const before = all.filter((o) => o.site.order === t.site.order - 1);
  if (!before.length) return null;
  const returned = before[0].site.returns[Number(name.slice(1))];
  return before.find((o) => o.op.name === returned) || null;
}
