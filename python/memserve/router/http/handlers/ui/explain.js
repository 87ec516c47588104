// The decision that placed a request: the answer of /requests/RID as elements.

import { badge, count, el, seconds, stack } from "./draw.js";

const PARTS = [
  ["queue_s", "queue", "waiting for queued requests"],
  ["load_s", "load", "loading or receiving blocks"],
  ["exec_s", "exec", "computing the prompt"],
  ["others_s", "others", "delay of other requests"],
  ["recent_s", "recent", "work placed recently"],
];

export function explain(one) {
  const facts = [
    ["Endpoint", one.path], ["Status", String(one.status)], ["Took", seconds(one.seconds)],
    ["First token", seconds(one.first_token_s)], ["Request id", one.request_id], ["Attempts", String(one.attempts || "–")],
    ["Prompt", one.prompt_tokens === null ? "–" : `${count(one.prompt_tokens)} tokens`],
    ["Cached", one.cached_tokens === null ? "not reported" : `${count(one.cached_tokens)} tokens`],
    ["Expected cached", one.expected_tokens === undefined ? "–" : `${count(one.expected_tokens)} tokens`],
  ];
  const shown = [el("dl", {}, facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))))];
  if (one.reason !== "-") shown.push(el("p", { class: "bad" }, one.reason));
  const decision = one.decision;
  if (!decision) return [...shown, el("p", { class: "quiet" }, "Not dispatched.")];
  shown.push(el("p", { class: "reason" }, decision.reason));
  if (decision.tokens_unknown) shown.push(el("p", { class: "quiet" }, `Placed without token ids: ${decision.tokens_unknown}`));
  shown.push(...candidates("Candidates for its prefill", decision.prefill_candidates, decision.prefill));
  if (decision.decode_candidates.length) shown.push(...candidates("Candidates for its decode", decision.decode_candidates, decision.decode));
  return shown;
}

function candidates(title, all, chosen) {
  const most = Math.max(...all.map((one) => one.total_s));
  const used = PARTS.filter(([field]) => all.some((one) => one[field] > 0));
  const best = [...all].sort((a, b) => (b.instance === chosen) - (a.instance === chosen) || a.total_s - b.total_s);
  const head = ["Instance", "In HBM", "Blocks", "Queued", "Running", "Predicted", "Cost"];
  return [
    el("h3", {}, title),
    el("div", { class: "scroll", role: "region", "aria-label": title, tabindex: "0" },
      el("table", {},
        el("thead", {}, el("tr", {}, head.map((name, i) => el("th", { scope: "col", class: i && i < 6 ? "num" : null }, name)))),
        el("tbody", {}, best.map((one) => el("tr", { class: one.instance === chosen ? "chosen" : null },
          el("th", { scope: "row" }, one.instance, one.instance === chosen ? badge("chosen", "good") : null),
          [one.hbm_blocks, one.blocks, one.queued, one.running].map((value) => el("td", { class: "num" }, count(value))),
          el("td", { class: "num" }, seconds(one.queue_s + one.load_s + one.exec_s)),
          el("td", { class: "cost" }, stack(PARTS.map(([field, kind]) => [one[field], `part-${kind}`]), most),
            el("span", { class: "hidden" }, seconds(one.total_s)))))))),
    el("p", { class: "legend quiet" }, used.map(([, kind, text]) => el("span", { class: `key-${kind}` }, text))),
  ];
}
