// Live: what the metrics of all workers say, once a second. Rates and percentiles are differences of two reads, made here.
import { api, count, decimal, el, table } from "./page.js";

const KEPT = 300, OVER = 10; // reads that are kept; how many seconds a rate or a percentile is over
const STAGES = ["features", "queue", "inference", "post"];

/** The samples of an exposition, by metric: [labels, value]. */
export function parse(text) {
  const samples = {};
  for (const [, name, labels = "", value] of text.matchAll(/^(\w+)(?:\{(.*)\})? (\S+)$/gm)) {
    const named = Object.fromEntries([...labels.matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map(([, key, text]) => [key, text]));
    (samples[name] ??= []).push([named, Number(value)]);
  }
  return samples;
}

const sum = (read, name, wanted = () => true) => (read.samples[name] ?? []).reduce((total, [labels, value]) => total + (wanted(labels) ? value : 0), 0);
const ranking = (labels) => labels.route === "/rank" || labels.route === "/v1/rank";

/** A percentile of what a histogram counted between two reads, in milliseconds, in proportion within its bucket. */
export function percentile(before, now, name, share, wanted = () => true) {
  const grown = new Map();
  for (const [read, sign] of [[now, 1], [before, -1]])
    for (const [labels, value] of read.samples[`${name}_bucket`] ?? [])
      if (wanted(labels)) grown.set(labels.le, (grown.get(labels.le) ?? 0) + sign * value);
  const buckets = [...grown].map(([le, n]) => [le === "+Inf" ? Infinity : Number(le), n]).sort(([a], [b]) => a - b);
  const all = buckets.at(-1)?.[1] ?? 0;
  if (all <= 0) return NaN;
  let low = 0, under = 0;
  for (const [high, n] of buckets) {
    if (n >= share * all) return 1000 * (high === Infinity ? low : low + ((high - low) * (share * all - under)) / (n - under));
    [low, under] = [high, n];
  }
  return NaN;
}

const TILES = [
  ["requests / s", (was, now, s) => (sum(now, "adrank_requests_total", ranking) - sum(was, "adrank_requests_total", ranking)) / s, (v) => decimal(v, 1)],
  ["candidates / s", (was, now, s) => (sum(now, "adrank_candidates_sum") - sum(was, "adrank_candidates_sum")) / s, count],
  ["p50, ms", (was, now) => percentile(was, now, "adrank_request_duration_seconds", 0.5, ranking), (v) => decimal(v, 1)],
  ["p99, ms", (was, now) => percentile(was, now, "adrank_request_duration_seconds", 0.99, ranking), (v) => decimal(v, 1)],
  ["degraded / s", (was, now, s) => (sum(now, "adrank_degraded_total") - sum(was, "adrank_degraded_total")) / s, (v) => decimal(v, 1)],
  ["shed / s", (was, now, s) => (sum(now, "adrank_shed_total") - sum(was, "adrank_shed_total")) / s, (v) => decimal(v, 1)],
  ["events taken / s", (was, now, s) => (sum(now, "adrank_events_total", (l) => l.result === "accepted") - sum(was, "adrank_events_total", (l) => l.result === "accepted")) / s, count],
  ["under way", (was, now) => sum(now, "adrank_inflight_requests"), count],
  ["ads in the catalogue", (was, now) => sum(now, "adrank_catalogue_ads"), count],
  ["catalogue behind, s", (was, now) => sum(now, "adrank_catalogue_lag_seconds"), (v) => decimal(v, 1)],
];

export async function live(page) {
  const reads = [], tiles = TILES.map(tile), stages = el("div", { className: "card" }), models = el("div", { className: "card" });
  const state = el("p", { className: "soft" }), error = el("p", { className: "bad", role: "alert" });
  page.append(error, el("div", { className: "tiles" }, ...tiles.map((each) => each.box)), el("div", { className: "pair" }, models, stages), state);
  let going = true;
  const step = async () => {
    if (!going) return;
    if (!document.hidden) {
      try {
        const [text, health, loaded] = await Promise.all([api("metrics", { text: true }), api("readyz", { also: [503] }), api("v1/models")]);
        reads.push({ at: performance.now() / 1000, samples: parse(text) });
        if (reads.length > KEPT) reads.shift();
        const now = reads.at(-1), was = reads.find((read) => read.at > now.at - OVER - 0.5);
        if (was !== now) tiles.forEach((each) => each.put(was, now));
        if (was !== now) stages.replaceChildren(byStage(was, now));
        models.replaceChildren(versions(loaded), ...challengers(loaded));
        state.textContent = told(health);
        error.textContent = "";
      } catch (failure) {
        error.textContent = `No news of the service: ${failure.message}`;
      }
    }
    setTimeout(step, 1000);
  };
  await step();
  return () => { going = false; };
}

function tile([title, value, written]) {
  const number = el("output", {}, "–"), points = [];
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const line = svg.appendChild(document.createElementNS(svg.namespaceURI, "polyline"));
  for (const [name, set] of Object.entries({ preserveAspectRatio: "none", "aria-hidden": "true" })) svg.setAttribute(name, set);
  return {
    box: el("section", { className: "tile" }, el("h2", {}, title), number, svg),
    put(was, now) {
      points.push(value(was, now, now.at - was.at));
      if (points.length > KEPT) points.shift();
      number.textContent = written(points.at(-1));
      const most = Math.max(...points.filter(Number.isFinite), 1e-9), wide = points.length > 60 ? KEPT : 60, from = wide - points.length;
      svg.setAttribute("viewBox", `0 0 ${wide - 1} 40`);
      line.setAttribute("points", points.map((each, i) => [from + i, each]).filter(([, each]) => Number.isFinite(each)).map(([x, each]) => `${x},${(38 - (36 * each) / most).toFixed(1)}`).join(" "));
    },
  };
}

function byStage(was, now) {
  const at = (share) => (stage) => decimal(percentile(was, now, "adrank_stage_duration_seconds", share, (labels) => labels.stage === stage), 2);
  return table(`Stages of the rankings of the last ${OVER} s`, [["stage", "", (stage) => stage], ["p50, ms", "number", at(0.5)], ["p99, ms", "number", at(0.99)]], STAGES);
}

function versions({ models }) {
  const challenger = (each) => (each.challenger ? `${each.challenger.version}, ${each.challenger.mode} ${each.challenger.share}, ${each.challenger.state}` : "–");
  return table("Models that rank", [
    ["model", "text", (each) => (each.default ? `${each.name} (default)` : each.name)],
    ["version", "", (each) => each.version],
    ["runs on", "optional", (each) => `${each.provider.replace("ExecutionProvider", "")} ${each.precision}`],
    ["challenger", "text", challenger],
  ], models);
}

function challengers({ models, refused, notice }) {
  const told = models.filter((each) => each.challenger?.verdict).map((each) => `${each.name} ${each.challenger.version} was stopped: ${each.challenger.verdict.detail}`);
  const wrong = Object.entries(refused).map(([name, why]) => `${name} is refused: ${why}`);
  return [...told, ...wrong, ...(notice ? [notice] : [])].map((line) => el("p", { className: "bad" }, line));
}

function told({ store, served_log: served, reasons }) {
  const redis = store.status === "up" ? `The store (${store.kind}) is up` : `The store (${store.kind}) is down: ${store.detail}`;
  return [`${redis}; the log of rankings is ${served.status}.`, ...reasons, "All workers of this service together."].join(" ");
}
