// Models: every version in the repository, how it did in training, and the commands that make it live.
import { api, chart, copyable, decimal, el, table } from "./page.js";

export async function models(page) {
  const { versions, wrong, notice } = await api("console/api/versions");
  const list = el("div", { className: "card" }), one = el("div", { className: "card", ariaLive: "polite" });
  page.append(el("div", { className: "pair" }, list, one));
  if (notice) list.append(el("p", { className: "bad" }, notice));
  for (const [name, why] of Object.entries(wrong)) list.append(el("p", { className: "bad" }, `${name}: ${why}`));
  if (!versions.length) {
    list.append(el("p", {}, "No model has been published yet; adrank train makes one."));
    return;
  }
  const pick = async (version) => {
    [...list.querySelectorAll("tbody tr")].forEach((row, i) => row.classList.toggle("picked", versions[i] === version));
    try {
      const query = new URLSearchParams({ model: version.name, version: version.version });
      one.replaceChildren(...detail(version, await api(`console/api/version?${query}`)));
    } catch (error) {
      one.replaceChildren(el("p", { className: "bad" }, error.message));
    }
  };
  list.append(table("Versions, the newest of each model first", [
    ["model", "text", (each) => each.name],
    ["version", "", (each) => el("button", { type: "button", className: "link", onclick: () => pick(each) }, each.version)],
    ["role", "", (each) => (each.role ? el("span", { className: `tag ${each.role}` }, each.role) : "")],
    ["network", "optional", (each) => each.wrong ?? each.network ?? "–"],
    ["AUC", "number", (each) => decimal(each.metrics.auc, 5)],
    ["log loss", "number optional", (each) => decimal(each.metrics.log_loss, 5)],
    ["p(click) / clicks", "number optional", (each) => decimal(each.metrics.calibration_ratio, 3)],
  ], versions));
  await pick(versions.find((each) => each.role === "live") ?? versions[0]);
}

function detail(version, { manifest, metrics, report }) {
  const splits = Object.keys(metrics), names = [...new Set(splits.flatMap((split) => Object.keys(metrics[split])))];
  const written = (value) => (Number.isInteger(value) ? value.toLocaleString("en") : Number.isFinite(value) ? value.toFixed(5) : "–");
  const live = version.role === "live";
  const flags = `--models MODELS --name ${version.name}`;
  const parts = [el("h2", {}, `${version.name} ${version.version}`)];
  if (splits.length) parts.push(table("Measured in training", [["", "text", (name) => name.replaceAll("_", " ")], ...splits.map((split) => [split, "number", (name) => written(metrics[split][name])])], names));
  parts.push(...drawn(report));
  if (manifest.gate?.reasons?.length) parts.push(el("h3", {}, "Why it did not go live by itself"), el("p", {}, manifest.gate.reasons.join("; ")));
  parts.push(el("h3", {}, live ? "Take it back" : "Make it live, or try it on a tenth of the users"));
  const commands = live ? [`adrank rollback ${flags}`] : [`adrank promote ${flags} --version ${version.version}`, `adrank promote ${flags} --version ${version.version} --canary 0.1`];
  return [...parts, ...commands.map(copyable), el("h3", {}, "Manifest"), el("pre", { tabIndex: 0 }, JSON.stringify(manifest, null, 1))];
}

/** The learning curve and the reliability diagram of a version whose training drew a report. */
function drawn(report) {
  const [epochs, bins] = [report.epochs, report.reliability].map((rows) => (Array.isArray(rows) ? rows : []));
  const learned = ["train_loss", "valid_loss"].map((name, i) => ({ kind: i ? "second" : "first", points: epochs.map((each) => [each.number, each[name]]) }));
  const curve = epochs.length < 2 ? null : chart(`Log loss of train and valid after each of ${epochs.length} epochs`, learned);
  const most = Math.max(...bins.map((each) => Math.max(each.p, each.high)));
  const even = { kind: "even", points: [[0, 0], [most, most]] }, rates = { kind: "first", points: bins.map((each) => [each.p, each.rate]) };
  const intervals = bins.map((each) => ({ kind: "first", points: [[each.p, each.low], [each.p, each.high]] }));
  const diagram = bins.length ? chart("Click rate by mean p(click), in bins of about equally many rows, beside the diagonal", [even, rates, ...intervals], [2, 2]) : null;
  return [
    ...(curve ? [el("h3", {}, "Learning curve: log loss by epoch"), curve, el("p", { className: "legend" }, el("span", { className: "first" }, "train"), el("span", { className: "second" }, "valid"))] : []),
    ...(diagram ? [el("h3", {}, "Reliability on test: click rate by p(click), with 95 % intervals"), diagram] : []),
    ...(curve || diagram ? [el("p", { className: "soft" }, "More is in report.html, in the version's folder.")] : []),
  ];
}
