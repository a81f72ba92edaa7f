// Rank: a user, a context and candidates; the ads with p(click), and why.
import { api, bar, copyable, count, decimal, el, features, hasToken, moment, table } from "./page.js";

const known = new Map(); // features of the ads that samples brought

export async function rank(page) {
  const [{ models, default: first, notice }, { schemas }] = await Promise.all([api("v1/models"), api("v1/schema")]);
  const form = el("form", { className: "card" }), results = el("div", { ariaLive: "polite" });
  page.append(el("div", { className: "split" }, form, results));
  if (!models.length) {
    results.append(el("p", { className: "card" }, notice || "No model is loaded yet; adrank train makes one."));
    return;
  }
  const user = el("input", { name: "user", required: true, autocomplete: "off", placeholder: "such as u378" });
  const model = choice("model", models.flatMap(versions), first ?? models[0].name);
  const beside = choice("beside", ["", ...models.flatMap(versions)], "", "none");
  const candidates = el("textarea", { name: "candidates", rows: 7, required: true, spellcheck: false });
  const schema = () => Object.values(schemas).find((each) => each.models.includes(model.value.split(" ")[0])) ?? { fields: [] };
  const context = el("fieldset"), sample = sampler(schema, candidates, results);
  const fields = () => {
    const named = schema().fields.filter((field) => field.side === "context");
    context.replaceChildren(...(named.length ? [el("legend", {}, "Context")] : []), ...named.map((field) => el("label", {}, field.name, el("input", { name: `context ${field.name}`, autocomplete: "off" }))));
  };
  model.onchange = fields;
  fields();
  form.append(
    el("label", {}, "User id", user), context,
    el("label", {}, "Candidates, an ad id a line", candidates), sample,
    el("div", { className: "row" }, el("label", {}, "Model", model), el("label", {}, "Beside it", beside)),
    el("button", { className: "primary" }, "Rank"),
    el("p", { className: "soft" }, "Nothing ranked here counts as shown, so none of it is trained on. Without a version, a canary ranks the users that fall to it."),
  );
  form.onsubmit = async (event) => {
    event.preventDefault();
    const request = () => ({
      user: { id: user.value.trim() },
      context: values(context, schema()),
      candidates: [...new Set(candidates.value.split("\n").map((line) => line.trim()).filter(Boolean))],
    });
    try {
      const asked = [model.value, beside.value].filter(Boolean).map((each) => {
        const [name, version] = each.split(" ");
        return { ...request(), options: { model: name, ...(version && { version }), explain: true, shown: 0 } };
      });
      const [answers, state] = await Promise.all([Promise.all(asked.map((body) => api("rank", { body }))), api(`console/api/user?id=${encodeURIComponent(asked[0].user.id)}`).catch(() => null)]);
      results.replaceChildren(...ranked(asked[0], answers, state));
    } catch (error) {
      results.replaceChildren(el("p", { className: "card bad", role: "alert" }, `Not ranked: ${error.message}`));
    }
  };
  results.append(el("p", { className: "card soft" }, "Name a user, take a sample of the catalogue or type ad ids, and rank."));
}

/** What a model can be asked for by: its name and, where it is challenged, each of the versions that are loaded. */
function versions({ name, version, challenger }) {
  return challenger?.state === "running" ? [name, `${name} ${version} live`, `${name} ${challenger.version} ${challenger.mode}`] : [name];
}

function choice(name, options, chosen, none) {
  return el("select", { name }, ...options.map((each) => el("option", { value: each, selected: each === chosen }, each || none)));
}

function sampler(schema, candidates, results) {
  const number = el("input", { type: "number", min: 1, max: 1000, value: 20 });
  const field = choice("field", ["ad_id", ...schema().fields.filter((each) => each.side === "ad" && each.name !== "ad_id").map((each) => each.name)], "ad_id");
  const value = el("input", { autocomplete: "off", placeholder: "any" });
  const button = el("button", { type: "button" }, "Take a sample");
  button.onclick = async () => {
    try {
      const query = new URLSearchParams({ count: number.value, field: field.value, value: value.value });
      const { ads } = await api(`console/api/ads?${query}`);
      for (const ad of ads) known.set(ad.ad_id, ad.features);
      candidates.value = ads.map((ad) => ad.ad_id).join("\n");
    } catch (error) {
      results.replaceChildren(el("p", { className: "card bad", role: "alert" }, error.message));
    }
  };
  const filter = el("div", { className: "row" }, el("label", {}, "Where", field), el("label", {}, "is (ids: begins)", value));
  return el("fieldset", {}, el("legend", {}, "From the catalogue"), el("label", {}, "How many", number), filter, button);
}

/** The context's fields that are filled in, each as its kind asks. */
function values(context, schema) {
  const given = [...context.querySelectorAll("input")].map((input) => [input.name.slice("context ".length), input.value.trim()]);
  const kinds = Object.fromEntries(schema.fields.filter((field) => field.side === "context").map((field) => [field.name, field.kind]));
  const as = { number: Number, list: (text) => text.split(",").map((each) => each.trim()), vector: (text) => text.split(",").map(Number) };
  return Object.fromEntries(given.filter(([, text]) => text).map(([name, text]) => [name, (as[kinds[name]] ?? String)(text)]));
}

function ranked(request, [answer, other], state) {
  const most = Math.max(...[answer, other].flatMap((each) => each?.ads ?? []).map((ad) => ad.p_click), 1e-9);
  const theirs = new Map(other?.ads.map((ad) => [ad.ad_id, ad]));
  const why = el("div", { className: "card" }), list = el("div", { className: "card" });
  const pick = (ad) => {
    [...list.querySelectorAll("tbody tr")].forEach((row, i) => row.classList.toggle("picked", answer.ads[i] === ad));
    why.replaceChildren(...explained(ad, answer, state));
  };
  const named = (ad) => el("button", { type: "button", className: "link", onclick: () => pick(ad) }, ad.ad_id);
  const { name, version } = answer.model;
  const by = (model) => (other.model.name === name ? `${name} ${model.version}` : model.name);
  const columns = [
    ["", "number", (ad) => String(ad.rank)],
    ["ad", "text", named],
    ["features", "values optional", (ad) => (ad.known === false ? "not in the catalogue" : features(known.get(ad.ad_id) ?? {}))],
    [other ? by(answer.model) : "p(click)", "number", (ad) => decimal(ad.p_click)],
    ["", "bars", (ad) => bar(ad.p_click / most)],
  ];
  if (other) {
    columns.push([by(other.model), "number", (ad) => decimal(theirs.get(ad.ad_id)?.p_click)]);
    columns.push(["its rank", "number", (ad) => String(theirs.get(ad.ad_id)?.rank ?? "–")]);
  }
  list.append(table(`${count(answer.ads.length)} ads by ${name} ${version}, in ${decimal(answer.timings_ms.total - (answer.timings_ms.explain ?? 0), 1)} ms`, columns, answer.ads));
  for (const each of answer.degraded) list.append(el("p", { className: "bad" }, `Degraded: ${each.stage}, ${each.reason}; ${each.fallback} stood in.`));
  if (answer.omitted.length) list.append(el("p", { className: "soft" }, `Omitted: ${answer.omitted.map((each) => `${each.ad_id} (${each.reason})`).join(", ")}`));
  if (answer.ads.length) pick(answer.ads[0]);
  return [el("div", { className: "pair" }, list, why), el("div", { className: "card" }, el("h2", {}, "The same by curl"), copyable(curl(request)))];
}

function curl(request) {
  const quoted = JSON.stringify(request).replaceAll("'", "'\\''");
  const token = hasToken() ? ` -H "authorization: Bearer $TOKEN"` : "";
  return `curl -s ${new URL("rank", location.href.split("#")[0])} -H 'content-type: application/json'${token} -d '${quoted}'`;
}

function explained(ad, answer, state) {
  const parts = [el("h2", {}, `Why ${ad.ad_id} has ${decimal(ad.p_click)}`)];
  if (answer.explain?.notice) parts.push(el("p", { className: "soft" }, `${answer.explain.notice}.`));
  if (ad.contributions) {
    const all = Object.entries(ad.contributions).sort(([, a], [, b]) => Math.abs(b) - Math.abs(a)).slice(0, 15);
    const most = Math.max(...all.map(([, value]) => Math.abs(value)), 1e-9);
    parts.push(table("What fields add to the logit", [
      ["field", "text", ([field]) => field],
      ["adds", "number", ([, value]) => (value < 0 ? "−" : "+") + decimal(Math.abs(value), 3)],
      ["", "bars", ([, value]) => bar(Math.abs(value) / most, value < 0)],
    ], all));
  }
  parts.push(...behaviours(ad.attention, state));
  return parts;
}

/** The user's history, newest first, each behaviour with its weight for the ad: weights are of the newest behaviours, oldest first. */
function behaviours(attention, state) {
  if (state === null) return [el("p", { className: "soft" }, "The user's history cannot be read now.")];
  if (!state.known) return [el("p", { className: "soft" }, "The store does not know this user.")];
  const about = Object.entries(state.features).slice(0, 12).map(([name, value]) => `${name}: ${value}`).join(" · ");
  const rows = state.history.map((each, i) => ({ ...each, weight: attention?.[attention.length - state.history.length + i] })).filter((row, i, all) => i >= all.length - (attention?.length || 20)).reverse();
  const most = Math.max(...rows.map((row) => Math.abs(row.weight ?? 0)), 1e-9);
  const columns = [["clicked, UTC", "when", (row) => moment(row.ts)], ["ad", "text", (row) => row.ad_id], ["features", "values", (row) => features(row.features)]];
  if (attention) columns.push(["attention", "number", (row) => decimal(row.weight, 3)], ["", "bars", (row) => bar(Math.abs(row.weight ?? 0) / most, row.weight < 0)]);
  const title = `The newest ${count(rows.length)} of ${count(state.behaviours)} behaviours${attention ? ", with attention" : ""}`;
  return [about ? el("p", { className: "soft" }, about) : null, rows.length ? table(title, columns, rows) : el("p", { className: "soft" }, "No behaviours are stored.")].filter(Boolean);
}
