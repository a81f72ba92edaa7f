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

const WIDE = 320, HIGH = 170, LEFT = 44, LOW = 20; // of a chart, and the margins of its numbers

function shape(name, attributes, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

/** A chart of lines, each {points: [[x, y], …], kind}, on axes from the least to the greatest number there is. */
export function chart(label, lines, places = [0, 3]) {
  const known = lines.map((line) => ({ ...line, points: line.points.filter((point) => point.every(Number.isFinite)) }));
  const svg = shape("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, class: "chart", role: "img", "aria-label": label });
  const ends = [0, 1].map((axis) => known.flatMap((line) => line.points.map((point) => point[axis]))).map((all) => [Math.min(...all), Math.max(...all)]);
  if (!ends.flat().every(Number.isFinite)) return null;
  const at = (value, axis) => (ends[axis][1] > ends[axis][0] ? (value - ends[axis][0]) / (ends[axis][1] - ends[axis][0]) : 0.5);
  const x = (value) => LEFT + (WIDE - LEFT - 12) * at(value, 0), y = (value) => HIGH - LOW - (HIGH - LOW - 10) * at(value, 1);
  for (const share of [0, 0.5, 1]) {
    const [across, up] = ends.map(([low, high], axis) => Number((low + share * (high - low)).toFixed(places[axis])));
    svg.append(shape("line", { x1: LEFT, x2: WIDE - 12, y1: y(up), y2: y(up) }));
    svg.append(shape("text", { x: LEFT - 5, y: y(up) + 3, class: "end" }, up.toFixed(places[1])), shape("text", { x: x(across), y: HIGH - 4, class: "middle" }, across.toFixed(places[0])));
  }
  for (const { points, kind } of known) {
    svg.append(shape("polyline", { class: kind, points: points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ") }));
    if (points.length === 1) svg.append(shape("circle", { class: kind, cx: x(points[0][0]).toFixed(1), cy: y(points[0][1]).toFixed(1), r: 2.5 })); // no line shows it
  }
  return svg;
}
