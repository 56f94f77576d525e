"use strict";
// The page: what is shown follows from `state`; every change of it goes through `show`.

const data = JSON.parse(document.getElementById("data").textContent);
const state = { graph: 0, site: 0, region: null, slot: null, op: null, shown: null, zoom: 1 };
const byId = (id) => document.getElementById(id);

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function duration(us) {
  if (us >= 1e6) return `${(us / 1e6).toFixed(2)} s`;
  if (us >= 1e3) return `${(us / 1e3).toFixed(us < 1e4 ? 2 : 1)} ms`;
  return `${us.toFixed(us < 10 && us > 0 ? 1 : 0)} us`;
}

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0, left = bytes;
  while (left >= 1024 && power < 4) { left /= 1024; power += 1; }
  return `${power ? left.toFixed(1) : left} ${units[power]}`;
}

const exact = (bytes) => `${bytes.toLocaleString("en")} bytes (${size(bytes)})`;
const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
const LIMITS = { link: "the link", attention: "attention", weights: "products with weights" };

for (const graph of data.graphs) {
  (graph.step ? graph.step.sites : []).forEach((site, order) => {
    site.order = order;
    site.returns = graph.step.schedules[site.schedule].returns;
  });
}

function show(change) {
  const before = { ...state };
  Object.assign(state, change);
  const graph = data.graphs[state.graph];
  if (state.graph !== before.graph) {
    Object.assign(state, { site: 0, region: null, slot: null, op: null, shown: null });
  }
  if (!change || state.graph !== before.graph) { drawTabs(); drawSummary(graph); drawGraph(graph); drawChoices(graph); drawTexts(graph); drawRoofline(); }
  if (!change || state.graph !== before.graph || state.site !== before.site || state.region !== before.region) {
    if (state.site !== before.site) Object.assign(state, { op: null, shown: null });
    markGraph();
    drawOverview(graph);
    drawPanel(graph);
    drawPasses(graph);
  } else if (state.slot !== before.slot || state.zoom !== before.zoom) {
    drawPanel(graph);
  } else {
    redrawSite(graph);
  }
  location.replace(`#${["step", state.graph, "layer", graph.step ? graph.step.sites[state.site].layer : 0].join("-")}`);
}

function drawTabs() {
  byId("steps").replaceChildren(...data.graphs.map((graph, index) => el("button", {
    type: "button", role: "tab", id: `tab-${index}`, "aria-controls": "main",
    "aria-selected": String(index === state.graph), tabindex: index === state.graph ? 0 : -1,
    onclick: () => show({ graph: index }),
  }, graph.name)));
  byId("main").setAttribute("aria-labelledby", `tab-${state.graph}`);
}

function card(value, label) {
  return el("div", { class: "card" }, el("b", {}, value), el("span", {}, label));
}

function drawSummary(graph) {
  const step = graph.step;
  const cards = [card(`${graph.unique} of ${graph.regions}`, "regions are unique; equal ones share code")];
  if (step) {
    const p = step.prediction;
    cards.unshift(
      card(duration(p.us), "predicted for the step"),
      card(LIMITS[p.limit], "limits it"),
      card(size(step.h2d_bytes), `to the device: ${step.h2d_bytes.toLocaleString("en")} bytes`),
      card(size(step.d2h_bytes), `to the host: ${step.d2h_bytes.toLocaleString("en")} bytes`),
      card(`${Math.round(p.link * 100)} %`, "of the step the link to the device is busy"),
      card(duration(p.exposed_us), "compute waits for transfers"),
      card(String(step.head_group), `KV heads move together, ${step.num_slots} slots of ${step.slot_tokens.toLocaleString("en")} tokens, ${step.distance} ahead`)
    );
  }
  if (graph.declined) cards.push(card(String(graph.declined), "attentions or masks left alone; see below"));
  byId("summary").replaceChildren(...cards);
}

const swatches = (step) => el("div", { class: "legend" }, ...["region", ...streamsOf(step)].map((name) =>
  el("span", {}, el("i", { class: name }), name === "compute" ? "compute (attention)" : name === "region" ? "compute (region)" : name)));

function drawOverview(graph) {
  const section = byId("overview");
  section.hidden = !graph.step;
  if (!graph.step) return;
  const box = el("div", { class: "scroll" });
  section.replaceChildren(el("h2", {}, "The step, to predicted scale"),
    el("p", { class: "note" }, `Click a site, or choose one with the arrow keys. Predicted for ${graph.step.machine}.`), swatches(graph.step), box);
  const width = Math.max(box.clientWidth, graph.step.sites.length * 9 + 90, 320);
  box.append(drawStep(graph.step, width, state.site, (site) => show({ site, region: null })));
}

// -- the model graph ----------------------------------------------------------------------------

function repetition(labels, from) {
  let best = [1, 1];
  for (let period = 1; period <= Math.min(32, (labels.length - from) / 2); period += 1) {
    let times = 1;
    const same = (i) => labels[from + i] === labels[from + (i % period)];
    while (from + period * (times + 1) <= labels.length &&
      [...Array(period).keys()].every((i) => same(period * times + i))) times += 1;
    if (times > 1 && period * times > best[0] * best[1]) best = [period, times];
  }
  return best;
}

function drawGraph(graph) {
  const labels = graph.calls.map((call) => `${call.kind} ${call.same}`);
  const item = (call) => el("li", {}, el("button", {
    type: "button", class: call.kind, "data-call": call.name, onclick: () => choose(graph, call),
  }, call.kind === "region" ? call.name : `layer ${call.layer}`,
  el("small", {}, call.kind === "region" ? plural(call.nodes, "node") : call.kind === "site" ? call.same : "left alone")));
  const list = el("ol", {});
  for (let i = 0; i < graph.calls.length;) {
    const [period, times] = repetition(labels, i);
    const part = graph.calls.slice(i, i + period * times);
    if (times > 1) {
      const layers = part.filter((call) => call.layer !== null).map((call) => call.layer);
      list.append(el("li", {}, el("details", { open: times * period <= 12 ? "" : null },
        el("summary", {}, `${times} x the same ${plural(period, "call")}: layers ${layers[0]}-${layers[layers.length - 1]}`),
        el("ol", {}, ...part.map(item)))));
    } else list.append(...part.map(item));
    i += period * times;
  }
  list.addEventListener("keydown", moveFocus);
  byId("graph").replaceChildren(el("h2", {}, "Model graph"),
    el("p", { class: "note" }, "In order; up and down move, Enter opens. Equal regions share their code."), list);
}

function moveFocus(event) {
  const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!move) return;
  const stops = [...event.currentTarget.querySelectorAll("button, summary")].filter((node) => node.offsetParent);
  const next = stops[stops.indexOf(document.activeElement) + move];
  if (next) { next.focus(); event.preventDefault(); }
}

function choose(graph, call) {
  if (call.kind === "region") show({ region: call.name });
  else if (call.kind === "site") show({ site: graph.step.sites.findIndex((site) => site.layer === call.layer), region: null });
}

function markGraph() {
  const graph = data.graphs[state.graph];
  const layer = graph.step ? graph.step.sites[state.site].layer : null;
  for (const button of byId("graph").querySelectorAll("button[data-call]")) {
    const call = graph.calls.find((c) => c.name === button.dataset.call);
    const on = state.region ? call.name === state.region : call.kind === "site" && call.layer === layer;
    button.setAttribute("aria-current", String(on));
    if (on && button.closest("details")) button.closest("details").open = true;
  }
}

// -- other head groups, attentions, bytes -------------------------------------------------------

function table(head, rows) {
  return el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, ...head.map(([text, kind]) => el("th", { class: kind, scope: "col" }, text)))),
    el("tbody", {}, ...rows.map((row) => el("tr", { class: row.on ? "on" : null },
      ...row.cells.map((cell, i) => el("td", { class: head[i][1] }, ...[cell].flat())))))));
}

function drawChoices(graph) {
  const section = byId("choices");
  section.hidden = !graph.step;
  if (!graph.step) return;
  const base = graph.step.choices.find((choice) => choice.chosen);
  const rows = graph.step.choices.map((c) => ({
    on: c.chosen,
    cells: [`head_group=${c.head_group}${c.chosen ? " (this plan)" : ""}`, String(c.groups), c.slot_tokens.toLocaleString("en"),
      c.transfers.toLocaleString("en"), size(c.transfer_bytes), size(c.slot_bytes), c.h2d_bytes.toLocaleString("en"),
      duration(c.us), c.chosen ? "" : `${(c.us / base.us).toFixed(3)} x`, LIMITS[c.limit]],
  }));
  section.replaceChildren(el("h2", {}, "What another head group would change"),
    el("p", { class: "note" }, `The same step, planned anew with each head_group and else the same options. A slot holds as many bytes either way, so fewer heads make longer KV blocks. Why this plan has ${base.head_group}: ${graph.step.why_head_group}.`),
    table([["option"], ["groups per site", "n"], ["tokens per slot", "n"], ["transfers", "n"], ["largest", "n"], ["all slots", "n"], ["bytes to the device", "n"], ["predicted", "n"], ["", "n"], ["limited by"]], rows));
}

function drawTexts(graph) {
  byId("attention").replaceChildren(el("h2", {}, "Attentions found and left alone"),
    el("ul", { class: "lines" }, ...graph.sites.map((line) => el("li", {}, line))));
  byId("bytes").replaceChildren(el("h2", {}, "Where the bytes are after these steps"),
    el("p", { class: "note" }, `${data.tokens.toLocaleString("en")} tokens in ${Object.entries(data.tiers).map(([tier, n]) => `${plural(n, "token block")} on the ${tier}`).join(", ") || "no token blocks"}.`),
    table([["part"], ["size", "n"], ["bytes", "n"], [""]], data.storage.map((row) => ({ cells: [row.name, row.text, row.bytes.toLocaleString("en"), row.note] }))));
}

function drawRoofline() {
  const plan = data.plan, section = byId("roofline");
  section.hidden = !plan;
  if (!plan) return;
  const number = (value, scale) => (value / scale).toLocaleString("en", { maximumSignificantDigits: 3 });
  section.replaceChildren(el("h2", {}, "What limits each phase"),
    el("p", { class: "note" }, `For ${plan.machine}. Prefill of ${plan.context.toLocaleString("en")} tokens takes ${duration(plan.prefill_us)}, a token after it ${duration(plan.token_us)}.`),
    el("ul", { class: "lines" }, ...Object.entries(plan.limits).map(([phase, bound]) => el("li", {}, `${phase}: ${bound}`))),
    table([["phase"], ["part"], ["TFLOP", "n"], ["device memory", "n"], ["link", "n"], ["FLOP per byte", "n"], ["attainable TFLOP/s", "n"], ["time", "n"], ["bound by"]],
      plan.roofline.map((row) => ({ cells: [row.phase, row.part, number(row.flop, 1e12), size(Math.round(row.hbm_bytes)), size(Math.round(row.link_bytes)),
        number(row.intensity, 1), number(row.attainable, 1e12), duration(row.seconds * 1e6), row.bound] }))));
}

function drawHunks(pass) {
  const ops = Object.entries(pass.ops).map(([op, n]) => `${n > 0 ? "+" : ""}${n} ${op.replace(/\.default$/, "")}`).join(", ");
  const lines = pass.hunks.flatMap((hunk, i) => [
    el("div", { class: "gap" }, `change ${i + 1} of ${pass.hunks.length}${hunk.times > 1 ? `, found ${hunk.times} times with other numbers` : ""}`),
    ...hunk.lines.map(([tag, line]) => el("div", { class: { "+": "add", "-": "del" }[tag] }, `${tag} ${line}`)),
  ]);
  if (pass.left_out) lines.push(el("div", { class: "gap" }, `${plural(pass.left_out, "more change")} left out; debug_dir has the whole text`));
  return el("details", {}, el("summary", {}, el("b", {}, pass.name), ` ${pass.ms} ms, ${pass.nodes[0]} to ${pass.nodes[1]} nodes`),
    ops ? el("p", { class: "note" }, ops) : null,
    lines.length ? el("div", { class: "diff", tabindex: 0, role: "region", "aria-label": `changes of ${pass.name}` }, ...lines) : el("p", {}, "No change."));
}

function drawPasses(graph) {
  const parts = [el("h2", {}, "What every pass did"), el("p", { class: "note" }, "Before and after as a diff; lines that only moved count as unchanged."),
    el("h3", {}, "On the model graph, once for each Dynamo graph"), ...graph.passes.map(drawHunks)];
  if (graph.step) {
    const site = graph.step.sites[state.site];
    const schedule = graph.step.schedules[site.schedule];
    parts.push(el("h3", {}, `On the schedule of layer ${site.layer} (layers ${schedule.layers})`), ...schedule.passes.map(drawHunks));
  }
  byId("passes").replaceChildren(...parts);
}
