// The page: polls /ui/state each second and shows it. Changes nothing at the router.

import { badge, bar, count, duration, el, percent, rows, seconds, show, sparkline } from "./draw.js";
import { explain } from "./explain.js";

const POLL_MS = 1000;
const SLOTS = 120;
const $ = (id) => document.getElementById(id);

let paused = false;
let timer = null;
let answered = 0;

async function ask(path) {
  const answer = await fetch(new URL(path, location.origin), { cache: "no-store" }); // with the browser's key
  if (answer.ok) return answer.json();
  const body = await answer.json().catch(() => null);
  const error = new Error(body?.error?.message ?? `the router answered with status ${answer.status}`);
  error.status = answer.status;
  throw error;
}

async function poll() {
  clearTimeout(timer);
  if (paused || document.hidden) return;
  try {
    const wanted = $("faults").checked ? "/requests?n=50&faults=1" : null;
    const [state, faults] = await Promise.all([ask("/ui/state"), wanted ? ask(wanted) : null]);
    answered = Date.now();
    trouble(null);
    render(faults ? { ...state, requests: faults.requests } : state);
  } catch (error) {
    failed(error);
  }
  timer = setTimeout(poll, POLL_MS);
}

function failed(error) {
  const since = answered ? ` The data below is ${duration((Date.now() - answered) / 1000)} old.` : "";
  const message = error.status ? error.message : "The router does not answer.";
  trouble(`${message}${since}`);
  pill("no contact", "bad");
}

function trouble(text) {
  $("trouble").hidden = !text;
  if (text) show($("trouble"), text, text);
}

function pill(text, kind) {
  show($("health"), `${kind} ${text}`, badge(text, kind));
}

function render(state) {
  const reason = state.reason_unready;
  if (!paused) pill(reason ? `not serving: ${reason}` : "serving", reason ? "warn" : "good");
  const policies = [...new Set(Object.values(state.policies))].join(" / ");
  const about = `${state.version} · up ${duration(state.uptime_s)} · ${policies}`;
  show($("about"), about, about);
  tiles(state);
  instances(state.instances);
  prefixes(state.hottest);
  requests(state.requests);
}

// ---- the last two minutes

function tiles(state) {
  const series = state.series;
  const of = (name) => series.map((point) => point[name]);
  const newest = (name) => of(name).slice(-5).reverse().find((one) => one !== null) ?? null;
  const running = state.instances.filter((one) => one.role !== "prefill").reduce((sum, one) => sum + (one.running ?? 0), 0);
  const queued = state.instances.reduce((sum, one) => sum + (one.queued ?? 0), 0);
  const rate = newest("requests_s");
  const faults = of("faults_s").reduce((sum, one, i) => sum + one * series[i].seconds, 0);
  const all = [
    ["Requests per second", rate === null ? "–" : rate < 100 ? rate.toFixed(1) : count(Math.round(rate)),
      faults >= 0.5 ? `${count(Math.round(faults))} failed in two minutes` : "none failed in two minutes", of("requests_s"), 1],
    ["First token, median", seconds(newest("first_token_p50_s")),
      `95 % within ${seconds(newest("first_token_p95_s"))}`, of("first_token_p50_s"), 0.001],
    ["Prompt tokens from cache", percent(newest("hit_ratio")), "of prefills that report it", of("hit_ratio"), 1],
    ["Running", count(running), `${count(state.waiting)} waiting for a slot · ${count(queued)} in prefill`, null, 1],
  ];
  const shape = JSON.stringify(all);
  show($("tiles"), shape, all.map(([title, value, note, values, least]) =>
    el("article", { class: "tile" },
      el("h2", {}, title), el("p", { class: "value" }, value), el("p", { class: "quiet" }, note),
      values ? sparkline(values, least, SLOTS) : load(state.instances))));
}

/** The fourth tile's chart: one bar per instance, its running requests. */
function load(all) {
  const serving = all.filter((one) => one.running !== undefined);
  const most = Math.max(4, ...serving.map((one) => one.running));
  return el("div", { class: "loads", "aria-hidden": "true" },
    serving.slice(0, 16).map((one) => bar(one.running, most, "", one.role)));
}

// ---- tables

const STATES = { ready: "good", joining: "warn", suspect: "warn", draining: "warn", down: "bad" };
const STUCK_S = 5;
const BREAKERS = { closed: "good", half_open: "warn", "half-open": "warn", open: "bad" };

function instances(all) {
  const kinds = {};
  for (const one of all) kinds[one.role] = (kinds[one.role] ?? 0) + 1;
  const kindsText = Object.entries(kinds).map(([role, num]) => `${num} ${role}`).join(" · ");
  show($("instances-count"), kindsText, kindsText);
  $("instances-empty").hidden = all.length > 0;
  const most = (name) => Math.max(1, ...all.map((one) => one[name] ?? 0));
  const [hbm, dram] = [most("hbm_blocks"), most("dram_blocks")];
  rows($("instances"), all, (one) => one.instance_id, (one) => [
    { head: true, text: one.instance_id },
    { signature: one.role, nodes: () => [el("span", { class: `role ${one.role}` }, one.role)] },
    state(one),
    { num: true, text: count(one.running) },
    { num: true, text: one.queued_s >= 0.001 ? `${count(one.queued)} · ${seconds(one.queued_s)}` : count(one.queued) },
    blocks(one.hbm_blocks, one.hbm_capacity, hbm, "hbm"),
    blocks(one.dram_blocks, one.dram_capacity, dram, "dram"),
    { signature: String(one.breaker), nodes: () => [one.breaker ? badge(one.breaker, BREAKERS[one.breaker] ?? "idle") : "–"] },
  ]);
}

function state(one) {
  const age = one.load?.step_age_s ?? 0;
  const why = one.reason ?? (age > STUCK_S ? `its scheduler made no step for ${duration(age)}` : null);
  const kind = why && one.state === "ready" ? "warn" : STATES[one.state] ?? "idle";
  return { signature: `${one.state} ${why}`, nodes: () => [
    badge(one.state, kind), why ? el("span", { class: "quiet reason", title: why }, why) : null,
  ].filter(Boolean) };
}

function blocks(held, capacity, most, kind) {
  if (held === null || held === undefined) return { text: "–" };
  const text = capacity ? `${count(held)} of ${count(capacity)}` : count(held);
  return { signature: `${text} ${capacity ?? most}`, nodes: () => [bar(held, capacity || most, text, kind)] };
}

function prefixes(all) {
  $("prefixes-empty").hidden = all.length > 0;
  const most = Math.max(1, ...all.map((one) => one.prompts));
  rows($("prefixes"), all, (one) => one.key, (one) => [
    { head: true, signature: String(one.sample), nodes: () => [
      one.sample ? el("span", { class: "sample" }, one.sample) : null,
      el("code", { class: one.sample ? "quiet" : null }, one.key),
    ].filter(Boolean) },
    { num: true, text: one.tokens === null ? count(one.blocks) : `${count(one.blocks)} · ${count(one.tokens)} tokens` },
    { signature: `${one.prompts} ${most}`, nodes: () => [bar(one.prompts, most, count(Math.round(one.prompts)))] },
    { signature: JSON.stringify(one.holders), nodes: () => one.holders.length
      ? one.holders.slice(0, 8).map((it) => el("span", { class: `chip ${it.tier}` }, it.instance, el("small", {}, ` ${it.tier.toUpperCase()}`)))
        .concat(one.holders.length > 8 ? [` and ${one.holders.length - 8} more`] : [])
      : [el("span", { class: "quiet" }, "no instance")] },
  ]);
}

const clock = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });

function requests(all) {
  $("requests-empty").hidden = all.length > 0;
  rows($("requests"), all, (one) => `${one.rid} ${one.ended_s}`, (one) => [
    { head: true, signature: one.rid, nodes: () => [opener(one)] },
    { text: clock.format(new Date(one.ended_s * 1000)) },
    { signature: `${one.status}`, nodes: () => [badge(String(one.status), one.status < 400 ? "good" : one.status < 500 ? "warn" : "bad")] },
    { num: true, text: seconds(one.seconds) },
    { num: true, text: seconds(one.first_token_s) },
    cached(one),
    { text: one.instances === "-" ? "–" : one.instances.replaceAll("+", " + ") },
    { text: one.path },
  ]);
}

function cached(one) {
  const had = one.cached_tokens ?? one.expected_tokens;
  if (!one.prompt_tokens || had === null || had === undefined) return { text: "–" };
  const text = `${count(had)} of ${count(one.prompt_tokens)}`;
  return { signature: text, nodes: () => [bar(had, one.prompt_tokens, text)] };
}

function opener(one) {
  const name = one.request_id || one.rid;
  const button = el("button", { type: "button", class: "link", "aria-haspopup": "dialog", title: name }, short(name));
  button.setAttribute("aria-label", `Decision for request ${name}`);
  button.addEventListener("click", () => open(one.rid));
  return button;
}

/** Keeps both ends: ids of the router differ at the end, ids of clients maybe at the beginning. */
function short(name) {
  return name.length > 16 ? `${name.slice(0, 5)}…${name.slice(-9)}` : name;
}

// ---- the explanation

async function open(rid) {
  const dialog = $("why");
  show($("why-title"), rid, `Request ${rid}`);
  $("why-body").dataset.shows = "";
  $("why-body").replaceChildren(el("p", { class: "quiet" }, "Loading …"));
  dialog.showModal();
  try {
    $("why-body").replaceChildren(...explain(await ask(`/requests/${encodeURIComponent(rid)}`)));
  } catch (error) {
    $("why-body").replaceChildren(el("p", { class: "bad" }, error.message));
  }
}

$("why-close").addEventListener("click", () => $("why").close());
$("why").addEventListener("click", (event) => {
  if (event.target === $("why")) $("why").close();
});

// ---- controls

$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", String(paused));
  if (paused) pill("paused", "idle");
  poll();
});
$("faults").addEventListener("change", poll);
document.addEventListener("visibilitychange", poll);
poll();
