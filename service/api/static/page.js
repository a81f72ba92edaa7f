// What all pages share: elements, the API, and how numbers are written. Whatever comes from the service becomes text, never markup.

export function el(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const KEY = "adrank-token";
let asking = null;

/** The answer of a route as JSON, or as text; asks for a token where the service does. */
export async function api(path, { body, text = false, also = [] } = {}) {
  const token = sessionStorage.getItem(KEY);
  const headers = { ...(token && { authorization: `Bearer ${token}` }), ...(body && { "content-type": "application/json" }) };
  const answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  if (answer.status === 401) {
    if (sessionStorage.getItem(KEY) === token) await ask(token !== null);
    return api(path, { body, text, also });
  }
  if (answer.ok || also.includes(answer.status)) return text ? answer.text() : answer.json();
  const problem = await answer.json().catch(() => ({ detail: answer.statusText }));
  const where = (problem.errors || []).map((each) => `${each.pointer}: ${each.detail}`);
  throw new Error([problem.detail, ...where].join("; "));
}

export const hasToken = () => sessionStorage.getItem(KEY) !== null;

function ask(again) {
  asking ??= new Promise((done) => {
    const dialog = document.getElementById("token");
    sessionStorage.removeItem(KEY);
    document.getElementById("token-error").textContent = again ? "That token is none of this service's." : "";
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    dialog.onclose = () => {
      const field = dialog.querySelector("input");
      sessionStorage.setItem(KEY, field.value.trim());
      field.value = "";
      asking = null;
      done();
    };
    dialog.showModal();
  });
  return asking;
}

export const count = (value) => (value === null || value === undefined ? "–" : Math.round(value).toLocaleString("en"));
export const decimal = (value, places = 4) => (Number.isFinite(value) ? value.toFixed(places) : "–");
const WHEN = new Intl.DateTimeFormat("en-GB", { day: "2-digit", month: "short", hour: "2-digit", minute: "2-digit", timeZone: "UTC" });
export const moment = (seconds) => (Number.isFinite(seconds) && Math.abs(seconds) < 8e12 ? WHEN.format(1000 * seconds).replace(",", "") : "–");
const written = (value) => (Array.isArray(value) ? value.slice(0, 6).join(", ") : String(value));
/** The values of features in a line; their names are in its title. */
export const features = (all, most = 5) =>
  el("span", { title: Object.entries(all).map(([name, value]) => `${name}: ${written(value)}`).join("\n") }, Object.values(all).slice(0, most).map(written).join(" · "));

/** A bar of a share of its place, beside whose number it stands. */
export function bar(share, minus = false) {
  const made = el("div", { className: minus ? "bar minus" : "bar", ariaHidden: "true" });
  made.style.width = `${100 * Math.max(0, Math.min(1, share))}%`;
  return made;
}

function place(className, content) {
  return el("td", { className, title: typeof content === "string" && className.startsWith("text") ? content : "" }, content);
}

/** A table; columns are [heading, class, cell of a row]. */
export function table(caption, columns, rows) {
  const head = el("tr", {}, ...columns.map(([title, kind]) => el("th", { scope: "col", className: kind || "" }, title)));
  const body = rows.map((row) => el("tr", {}, ...columns.map(([, kind, cell]) => place(kind || "", cell(row)))));
  return el("div", { className: "wide", tabIndex: 0, role: "region", ariaLabel: caption }, el("table", {}, el("caption", {}, caption), el("thead", {}, head), el("tbody", {}, ...body)));
}

/** A line to copy. */
export function copyable(line) {
  const button = el("button", { type: "button" }, "Copy");
  button.onclick = async () => {
    await navigator.clipboard.writeText(line);
    button.textContent = "Copied";
  };
  return el("div", { className: "copy" }, el("pre", { tabIndex: 0 }, line), navigator.clipboard ? button : null);
}
