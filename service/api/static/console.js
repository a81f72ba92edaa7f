// Which page is shown, and whether the service is well. A page is a function that fills an element, and may give back how to stop it.
import { api, el } from "./page.js";
import { live } from "./live.js";
import { events, quality, retrainings } from "./loop.js";
import { models } from "./models.js";
import { rank } from "./rank.js";

const PAGES = { rank, live, models, quality, events, retrainings };
const main = document.getElementById("main");
let stop = null;

async function show() {
  if (location.hash === "#main") return;
  const name = location.hash.slice(1) in PAGES ? location.hash.slice(1) : "rank";
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${name}`) {
      link.setAttribute("aria-current", "page");
      link.scrollIntoView({ block: "nearest", inline: "center" });
    } else link.removeAttribute("aria-current");
  }
  stop?.();
  stop = null;
  const page = el("div", {}, el("h1", {}, name[0].toUpperCase() + name.slice(1)));
  main.replaceChildren(page);
  document.title = `${name} · adrank console`;
  try {
    const stopper = await PAGES[name](page);
    if (page.isConnected) stop = stopper;
    else stopper?.();
  } catch (error) {
    page.append(el("p", { className: "bad", role: "alert" }, `This page cannot be shown: ${error.message}`));
  }
}

async function health() {
  const place = document.getElementById("health");
  try {
    const { status, reasons } = await api("readyz", { also: [503] });
    if (place.textContent !== status) place.textContent = status;
    Object.assign(place, { className: status, title: reasons.join("; ") });
  } catch {
    Object.assign(place, { className: "unready", textContent: "unreachable" });
  }
  setTimeout(health, 5000);
}

addEventListener("hashchange", show);
show();
health();
