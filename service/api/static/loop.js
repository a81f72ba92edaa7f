// Quality, Events, Retrainings: what the joiner told of what was served, and the reports of retrainings.
import { api, bar, chart, count, decimal, el, moment, table } from "./page.js";

const EVERY = 10; // seconds from one look to the next: the joiner tells once a minute
const DRIFTED = 0.25; // from which on an index is said to be a large change

/** Shows what the joiner told last, again and again; `draw` makes elements of the figures, of which there are some. */
async function following(page, draw) {
  const body = el("div", {}), told = el("p", { className: "soft", role: "status" }), error = el("p", { className: "bad", role: "alert" });
  page.append(told, error, body);
  let going = true, shown = 0;
  const step = async () => {
    if (!going) return;
    try {
      const { figures, now } = await api("console/api/figures"), last = figures.at(-1);
      const ago = last && Math.max(0, Math.round(now - last.ts));
      told.textContent = last ? `The joiner told this ${count(ago)} s ago. It has counted since ${moment(last.since)} (UTC).` : "No joiner has told anything yet: adrank join writes what was served and what came of it to a log, and tells it here.";
      if (last && last.ts !== shown) body.replaceChildren(...draw(figures, last));
      shown = last?.ts;
      error.textContent = "";
    } catch (failure) {
      error.textContent = `No news of the joiner: ${failure.message}`;
    }
    setTimeout(step, 1000 * EVERY);
  };
  await step();
  return () => { going = false; };
}

const hours = (figures, value) => figures.map((each) => [(each.ts - figures.at(-1).ts) / 3600, value(each)]);
/** A chart under its title, or nothing where there is nothing to draw. */
function titled(title, lines, places) {
  const drawn = chart(title, lines, places);
  return drawn ? [el("h3", {}, title), drawn] : [];
}

const number = (value) => (typeof value === "number" ? value : NaN);

export const quality = (page) => following(page, (figures, last) => {
  const models = Object.entries(last.models ?? {});
  if (!models.length) return [el("p", {}, "No impressions have been closed yet: that takes as long as a click may.")];
  return models.map(([name, each]) => {
    const of = (value) => hours(figures, (told) => number(told.models?.[name] && value(told.models[name])));
    const places = Object.entries(each.places), drift = Object.entries(each.drift), [first, second] = drift.map(([field]) => field);
    const left = [
      el("p", {}, `Sum of p(click) over clicks: ${decimal(number(each.calibration), 3)}. Normalised entropy: ${decimal(number(each.normalised_entropy), 3)}. Of the last 100,000 impressions.`),
      ...titled("Calibration and entropy over time", [{ points: of((told) => told.calibration), kind: "first" }, { points: of((told) => told.normalised_entropy), kind: "second" }], [1, 3]),
      el("p", { className: "legend" }, el("span", { className: "first" }, "p(click) / clicks"), el("span", { className: "second" }, "normalised entropy"), "by hours from now"),
      table("p(click) over clicks by position", [["position", "", ([at]) => at], ["ratio", "number", ([, ratio]) => decimal(number(ratio), 3)], ["", "bars", ([, ratio]) => bar(number(ratio) / 2 || 0, ratio > 1)]], places),
    ];
    const right = drift.length ? [
      table(`Drift by field: population stability index against the train split, red above ${DRIFTED}`, [
        ["field", "text", ([field]) => field],
        ["now", "number", ([, index]) => decimal(number(index), 3)],
        ["", "bars", ([, index]) => bar(number(index) / DRIFTED / 2 || 0, index > DRIFTED)],
      ], drift),
      ...titled("Drift over time, where it is greatest", [first, second].filter(Boolean).map((field, i) => ({ points: of((told) => told.drift[field]), kind: i ? "second" : "first" })), [1, 3]),
      el("p", { className: "legend" }, el("span", { className: "first" }, first), second ? el("span", { className: "second" }, second) : null, "by hours from now"),
    ] : [el("p", { className: "soft" }, "No drift is told yet: that needs 1,000 rows of the version that serves, and a bundle with a training reference.")];
    return el("section", { className: "card" }, el("h2", {}, name), el("div", { className: "pair" }, el("div", {}, ...left), el("div", {}, ...right)));
  });
});

export const events = (page) => following(page, (figures, last) => {
  const named = (kind) => Object.entries(last).filter(([name]) => name.startsWith(kind)).map(([name, counts]) => [name.slice(kind.length), counts]);
  const rows = named("event ").flatMap(([type, outcomes]) => Object.entries(outcomes).map(([outcome, n]) => [type, outcome, n]));
  const streams = named("stream "), most = Math.max(1, ...rows.map(([, , n]) => n));
  const pairs = (counts) => Object.entries(counts ?? {}).map(([what, n]) => `${count(n)} ${what.replaceAll("_", " ")}`).join(", ") || "none";
  return [
    el("div", { className: "card" }, table("What became of events", [["event", "text", ([type]) => type], ["outcome", "text", ([, outcome]) => outcome.replaceAll("_", " ")], ["count", "number", ([, , n]) => count(n)], ["", "bars", ([, , n]) => bar(n / most)]], rows)),
    el("div", { className: "card" },
      table("What waits for the joiner", [["stream", "text", ([name]) => name], ["entries", "number", ([, each]) => count(each.backlog)], ["the oldest waits, s", "number", ([, each]) => count(each.lag)]], streams),
      ...streams.slice(0, 1).flatMap(([name]) => titled(`Seconds that the oldest entry of ${name} has waited, by hours from now`, [{ points: hours(figures, (told) => number(told[`stream ${name}`]?.lag)), kind: "first" }], [1, 0])),
      el("p", {}, `Rankings by how it is known what was shown: ${pairs(last.shown)}.`),
      el("p", {}, `What should not happen: ${pairs(last.incidents)}.`)),
  ];
});

export async function retrainings(page) {
  const { reports } = await api("console/api/reports");
  const list = el("div", { className: "card" }), one = el("div", { className: "card", ariaLive: "polite" });
  if (!reports.length) {
    page.append(el("p", {}, "No retraining has left a report in the repository yet; adrank retrain does."));
    return;
  }
  page.append(el("div", { className: "pair" }, list, one));
  const pick = (report) => {
    [...list.querySelectorAll("tbody tr")].forEach((row, i) => row.classList.toggle("picked", reports[i] === report));
    one.replaceChildren(...verdict(report));
  };
  list.append(table("Retrainings, the newest first", [
    ["started", "when", (each) => el("button", { type: "button", className: "link", onclick: () => pick(each) }, moment(each.started))],
    ["model", "text", (each) => String(each.name)],
    ["", "", (each) => el("span", { className: each.accepted ? "tag live" : "tag stopped" }, each.accepted ? "published" : "refused")],
    ["verdict", "values", (each) => String(each.verdict)],
  ], reports));
  pick(reports[0]);
}

function verdict({ verdict: line, version, reasons = [], warnings = [], metrics = {}, differences = {} }) {
  const { champion = {}, challenger = {} } = metrics;
  const cell = (value) => (Number.isInteger(value) ? count(value) : decimal(number(value), 4));
  const between = (each) => (each ? `${cell(each.low)} to ${cell(each.high)}` : "–");
  const compared = Object.keys(challenger).length ? table("On the newest slice", [
    ["", "text", (name) => name.replaceAll("_", " ")],
    ["live", "number", (name) => cell(champion[name])],
    ["new", "number", (name) => cell(challenger[name])],
    ["difference, 95 %", "number", (name) => between(differences[name])],
  ], Object.keys(challenger)) : null;
  const listed = (title, lines) => (lines.length ? [el("h3", {}, title), el("ul", {}, ...lines.map((each) => el("li", {}, String(each))))] : []);
  return [
    el("h2", {}, String(line)),
    ...listed("Why it was refused", reasons),
    ...listed("To be known", warnings),
    compared,
    el("p", { className: "soft" }, `${version ? `Version ${version}. ` : ""}The whole report is in the model's folder, reports/.`),
  ].filter(Boolean);
}
