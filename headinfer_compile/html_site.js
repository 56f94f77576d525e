"use strict";
// The panel of one site (lanes, details, slots, code) or of one region, and the keys of the page.

function drawPanel(graph) {
  const section = byId("site");
  if (state.region) {
    const call = graph.calls.find((c) => c.name === state.region);
    section.replaceChildren(el("h2", {}, call.name),
      el("p", { class: "note" }, `${plural(call.nodes, "node")}, structure ${call.same}: every region of this structure runs this code.`),
      el("div", { class: "code", tabindex: 0, role: "region", "aria-label": "code of the region" },
        ...(graph.code[call.same] || "no code kept").split("\n").map((line) => el("div", {}, line || " "))));
    return;
  }
  if (!graph.step) {
    section.replaceChildren(el("h2", {}, "No site"), el("p", {}, "No attention of this graph was rewritten, so there is no schedule."));
    return;
  }
  const step = graph.step, site = step.sites[state.site], schedule = step.schedules[site.schedule];
  const slots = step.h2d_bytes ? [null, ...Array(step.num_slots).keys()] : [null];
  const tools = el("div", { class: "tools", role: "group", "aria-label": "Slot to follow" }, ...(step.h2d_bytes ? ["Follow:"] : []),
    ...(step.h2d_bytes ? slots.map((slot) => el("button", {
      type: "button", "data-slot": slot === null ? "all" : slot, "aria-pressed": String(state.slot === slot), onclick: () => { show({ slot }); byId("site").querySelector(`[data-slot="${slot === null ? "all" : slot}"]`).focus(); },
    }, slot === null ? "all slots" : `slot ${slot}`)) : []),
    "Zoom:", ...[1, 4, 16].map((zoom) => el("button", {
      type: "button", "data-zoom": zoom, "aria-pressed": String(state.zoom === zoom), onclick: () => show({ zoom }),
    }, `${zoom} x`)));
  const base = step.h2d_bytes ? ` Its ring begins at slot ${site.base}: slot s in the code is ring slot (${site.base} + s) mod ${step.num_slots}.` : "";
  section.replaceChildren(
    el("h2", {}, `Layer ${site.layer}`),
    el("p", { class: "note" }, `Runs the schedule of layers ${schedule.layers}: ${plural(schedule.nodes, "node")}, ${plural(schedule.transfers, "transfer")}, built in ${schedule.build_ms} ms, of it ${schedule.verify_ms} ms of proof.${base}`),
    tools, swatches(step),
    el("div", { id: "lanes", class: "scroll", tabindex: 0, role: "group", "aria-label": "Time line of the site; left and right arrows go from op to op" }),
    el("div", { id: "detail", "aria-live": "polite" }),
    ...(state.slot === null ? [] : [drawSlot(step, site)]),
    el("h3", {}, "The schedule, as it runs"),
    el("div", { id: "code", class: "code", tabindex: 0, role: "listbox", "aria-label": "Ops of the schedule; arrows move" }));
  byId("lanes").addEventListener("keydown", moveOp);
  byId("code").addEventListener("keydown", moveOp);
  drawCode(step, site, schedule);
  redrawSite(graph);
}

function ringSlot(step, site, op) {
  return op.slot === undefined ? null : (site.base + op.slot) % step.num_slots;
}

function drawCode(step, site, schedule) {
  const index = new Map(schedule.ops.map((op, i) => [op.name, i]));
  const lines = schedule.text.split("\n").filter((line) => line && !line.startsWith("# key:"));
  byId("code").replaceChildren(...lines.map((line) => {
    const name = line.trim().split(" = ")[0];
    if (!index.has(name)) return el("div", {}, line);
    const number = index.get(name), op = schedule.ops[number];
    return el("div", {
      class: `s-${op.stream}`, "data-op": number, id: `op-${number}`, role: "option", "aria-selected": "false",
      onclick: () => show({ op: number, shown: number }),
      onmouseenter: () => show({ shown: number }), onmouseleave: () => show({ shown: state.op }),
    }, line);
  }));
}

function redrawSite(graph) {
  if (!graph.step || state.region) return;
  const step = graph.step, site = step.sites[state.site], lanes = byId("lanes");
  const width = Math.max(lanes.clientWidth, 520) * state.zoom, left = lanes.scrollLeft;
  lanes.replaceChildren(drawSite(step, state.site, width, state, {
    select: (op) => show({ op, shown: op }),
    preview: (op) => { if (state.shown !== (op === null ? state.op : op)) show({ shown: op === null ? state.op : op }); },
  }));
  lanes.scrollLeft = left;
  const schedule = step.schedules[site.schedule];
  for (const line of byId("code").querySelectorAll("[data-op]")) {
    const number = Number(line.dataset.op);
    const off = state.slot !== null && ringSlot(step, site, schedule.ops[number]) !== state.slot;
    line.classList.toggle("on", number === state.shown);
    line.classList.toggle("off", off);
    line.setAttribute("aria-selected", String(number === state.op));
  }
  if (state.op !== null) byId("code").setAttribute("aria-activedescendant", `op-${state.op}`);
  drawDetail(step, site);
}

function edgeText(step, site, [name, stream, event]) {
  const ring = /^r(\d+)$/.exec(name);
  if (!ring) return `${event}, recorded on ${stream} by ${name}`;
  const before = step.sites[site.order - 1];
  const cold = site.cold.find((op) => op.name === name);
  if (cold && event === "slot.filled") return `${event}, recorded on h2d by ${name}: started before the site, by no earlier one`;
  if (before) return `${event}, recorded by ${before.returns[Number(ring[1])]} of layer ${before.layer} (${name} here)`;
  return step.chained ? `${event}, recorded by the last layer of the step before (${name} here)` : `${event}, recorded by an earlier step (${name} here)`;
}

function drawDetail(step, site) {
  const schedule = step.schedules[site.schedule];
  if (state.shown === null) {
    byId("detail").replaceChildren(el("p", { class: "dim" }, "Point at an op in the lanes or in the code, or move with the arrow keys: what it touches and which events order it."));
    return;
  }
  const op = schedule.ops[state.shown], [start, end] = site.times[state.shown];
  const rows = [["stream", `${op.stream}, ${duration(start)} to ${duration(end)} of the step`]];
  if (op.what) rows.push(["what", op.what]);
  if (op.next_layer) rows.push(["for", "the layer after this one"]);
  if (op.slot !== undefined) rows.push(["slot", `ring slot ${ringSlot(step, site, op)} (base ${site.base} + ${op.slot}), ${exact(op.slot_bytes || 0)}${op.slot_bytes ? "" : " new"}`]);
  if (op.pages) rows.push(["pages", op.pages.map(([block, n]) => `token block ${block} (${n.toLocaleString("en")} rows)`).join(", ")]);
  if (op.link_bytes) rows.push(["over the link", exact(op.link_bytes)]);
  if (op.memory_bytes) rows.push([op.stream === "cpu" ? "host memory" : "device memory", exact(op.memory_bytes)]);
  if (op.flop) rows.push(["work", `${(op.flop / 1e9).toLocaleString("en", { maximumSignificantDigits: 3 })} GFLOP`]);
  rows.push(["waits for", (op.after || []).map((edge) => edgeText(step, site, edge)).join("; ") || "nothing but its stream"]);
  const users = schedule.ops.filter((other) => (other.after || []).some(([name]) => name === op.name));
  if (users.length) rows.push(["waited for by", users.map((other) => `${other.name} (${other.stream})`).join(", ")]);
  byId("detail").replaceChildren(el("b", {}, op.name), " ", el("code", {}, op.code),
    el("dl", {}, ...rows.flatMap(([name, text]) => [el("dt", {}, name), el("dd", {}, text)])));
}

// Everything that touches one ring slot while a layer runs, in order of time.
function drawSlot(step, site) {
  const before = step.sites[site.order - 1];
  const early = before ? timesOf(step, before).filter((t) => t.op.next_layer) : [];
  const found = [...early, ...timesOf(step, site)].filter((t) => ringSlot(step, t.site, t.op) === state.slot);
  found.sort((a, b) => a.start - b.start || a.end - b.end);
  const rows = found.map((t) => ({ cells: [
    duration(t.start), [el("i", { class: t.op.stream }), t.op.stream],
    t.site === site ? t.op.name : `${t.op.name} (in layer ${t.site.layer})`,
    t.op.what + (t.op.next_layer && t.site === site ? ", of the next layer" : ""),
    t.op.slot_bytes && t.op.link_bytes ? exact(t.op.link_bytes) : "",
    (t.op.after || []).map((edge) => edgeText(step, t.site, edge)).join("; ") || (t.index === null ? "started before the site" : "its stream"),
  ] }));
  const streams = STREAMS.filter((stream) => found.some((t) => t.op.stream === stream));
  return el("div", { id: "slot" }, el("h3", {}, `Slot ${state.slot} in layer ${site.layer}: touched by ${streams.join(" and ") || "nothing"}`),
    table([["starts", "n"], ["stream", "w"], ["op"], ["what"], ["over the link"], ["after"]], rows));
}

// -- keys -----------------------------------------------------------------------------------------

function moveOp(event) {
  const step = data.graphs[state.graph].step;
  const count = step.schedules[step.sites[state.site].schedule].ops.length;
  const now = state.op === null ? -1 : state.op;
  const next = {
    ArrowRight: now + 1, ArrowDown: now + 1, ArrowLeft: now - 1, ArrowUp: now - 1, Home: 0, End: count - 1,
  }[event.key];
  if (event.key === "Escape") { show({ op: null, shown: null }); return; }
  if (next === undefined) return;
  event.preventDefault();
  const op = Math.min(Math.max(next, 0), count - 1);
  show({ op, shown: op });
  const line = byId(`op-${op}`), box = byId("code");
  if (line.offsetTop < box.scrollTop + box.offsetTop || line.offsetTop > box.scrollTop + box.offsetTop + box.clientHeight - 20) {
    box.scrollTop = line.offsetTop - box.offsetTop - box.clientHeight / 2;
  }
}

byId("steps").addEventListener("keydown", (event) => {
  const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!move) return;
  show({ graph: (state.graph + move + data.graphs.length) % data.graphs.length });
  byId(`tab-${state.graph}`).focus();
});

byId("overview").addEventListener("keydown", (event) => {
  const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const step = data.graphs[state.graph].step;
  if (!move || !step.sites[state.site + move]) return;
  event.preventDefault();
  show({ site: state.site + move, region: null });
  byId("overview").querySelector(`[data-site="${state.site}"]`).focus();
});

// -- theme and start ------------------------------------------------------------------------------

const dark = matchMedia("(prefers-color-scheme: dark)");
function setTheme(name) { document.documentElement.dataset.theme = name; }
setTheme(dark.matches ? "dark" : "light");
dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
byId("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));

const wanted = /^#step-(\d+)-layer-(\d+)$/.exec(location.hash);
state.graph = wanted && data.graphs[wanted[1]] ? Number(wanted[1]) : data.graphs.length - 1;
const sites = data.graphs[state.graph].step ? data.graphs[state.graph].step.sites : [];
state.site = Math.max(0, wanted ? sites.findIndex((site) => site.layer === Number(wanted[2])) : 0);
show();
let lastWidth = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === lastWidth) return;
  lastWidth = innerWidth;
  drawOverview(data.graphs[state.graph]);
  redrawSite(data.graphs[state.graph]);
});
