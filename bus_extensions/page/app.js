// The frame: which view is shown, the bar with its tabs, the login, the keys.

import { agentView, agentsView } from "./agents.js";
import { isMine, takeToken } from "./ask.js";
import { bus, watch } from "./bus.js";
import { button, fill, h } from "./dom.js";
import { forgetToken, start } from "./follow.js";
import { workView } from "./jobs.js";
import * as look from "./look.js";
import { messagesView } from "./messages.js";
import { nowView } from "./now.js";
import * as panel from "./panel.js";
import { places, placeView } from "./place.js";
import { say } from "./say.js";
import { conversationView, mailView } from "./talk.js";

const $ = id => document.getElementById(id);
const VIEWS = [
  ["", "Now", "◉"], ["messages", "Messages", "≡"], ["agents", "Agents", "⁂"], ["work", "Work", "▤"],
  ...(places.length ? [["more", "More", "⋯"]] : []),
];

let view = null, shownPath = null;

const ANOTHER = "This link has another token than this tab. Use it, and speak and read as its name?";

// The token of a link goes into this tab and out of the address, before anything is asked. Returns whether there was one.
function takeLink() {
  const [, given] = /^#token=([!-~]{8,300})$/.exec(location.hash) ?? [];
  if (!given) return false;
  history.replaceState(null, "", `${location.pathname}#/`);
  if (isMine(given) || confirm(ANOTHER)) takeToken(given);
  return true;
}
takeLink();

// Where the address leads: {parts, id}. What cannot be read leads to Now.
function place() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  try {
    return { parts: path.split("/").filter(Boolean).map(decodeURIComponent), id: new URLSearchParams(query).get("id") };
  } catch {
    return { parts: [], id: null };
  }
}

const isName = text => text !== undefined && /^[A-Za-z0-9._:@-]{1,64}$/.test(text);
const isId = text => text !== null && /^[0-9a-f]{1,14}$/.test(text);

const ROUTES = new Map([
  ["", nowView],
  ["messages", (one, other) => (isName(one) && isName(other) ? conversationView(one, other) : messagesView())],
  ["agents", name => (isName(name) ? agentView(name) : agentsView())],
  ["work", workView],
  ["mail", mailView],
  ...(places.length ? [["more", placeView]] : []),
]);

function go() {
  if (bus.phase === "token") return login();
  if (bus.phase === "start") return;
  const { parts, id } = place(), [first = "", ...rest] = parts, path = parts.join("/");
  if (path !== shownPath || !view) {
    view?.leave?.();
    view = (ROUTES.get(first) ?? ROUTES.get(""))(...rest);
    shownPath = path;
    fill($("main"), view.node);
  }
  isId(id) ? panel.openMessage(id) : panel.closePanel();
  frame();
}

const PLAIN = "This connection is not encrypted: whoever is on the way can read everything, the token too.";
const note = text => text && h("p", { class: "note" }, text);

function noteOfRights() {
  if (bus.me.send_only) return "This token may only send: you see what you sent yourself.";
  const reads = bus.me.reads.join(", ") || "nobody";
  const says = `You see who is there, and the mail of ${reads}. An operator's token shows everything.`;
  return bus.me.operator ? "" : says;
}

let noted = "";
// What the person should know in each view. Drawn only when it changes: else it would be read aloud each second.
function drawNotes() {
  const some = [noteOfRights(), !isSecureContext && PLAIN, bus.notice].filter(Boolean);
  const says = bus.phase === "token" ? [] : some;
  if (says.join("\n") !== noted) fill($("notes"), says.map(note));
  noted = says.join("\n");
}

let tabs = ""; // what they show
// The bar above, or the tabs below, with what needs a look
function frame() {
  const { parts } = place(), troubled = look.inTrouble(look.agents()).length, failed = look.failedJobs();
  const counts = { agents: troubled, work: failed };
  const tab = ([path, title, sign]) => {
    const current = (parts[0] ?? "") === path ? "page" : null, count = counts[path];
    const alarm = count && h("span", { class: "alarm", "aria-label": `${count} need a look` }, count);
    return h("a", { href: `#/${path}`, "aria-current": current },
      h("span", { class: "sign", "aria-hidden": "true" }, sign), title, alarm || null);
  };
  const drawn = JSON.stringify([counts, parts[0]]);
  if (drawn !== tabs) { // else a tab that has the focus would lose it each second
    const focused = $("views").contains(document.activeElement) && document.activeElement.getAttribute("href");
    fill($("views"), VIEWS.map(tab));
    if (focused) $("views").querySelector(`[href="${focused}"]`)?.focus();
    tabs = drawn;
  }
  drawNotes();
  const live = bus.phase === "live";
  $("live").textContent = live ? "● live" : bus.phase === "away" ? "○ out of reach" : "";
  $("live").className = live ? "good" : "";
  $("say").hidden = !live;
  $("views").hidden = bus.phase === "token"; // they would lead nowhere
  document.body.classList.toggle("away", bus.phase === "away");
}

function banner() {
  const away = bus.phase === "away", why = away ? `${bus.away.why} What you see is what was last known.` : "";
  $("banner").hidden = !away;
  if ($("why").textContent !== why) $("why").textContent = why; // else it would be read aloud each second
  $("countdown").textContent = `Next try in ${Math.max(0, Math.ceil((bus.away.until - Date.now()) / 1000))} s.`;
}
setInterval(() => bus.phase === "away" && banner(), 1000);

function login() {
  const field = h("input", { type: "password", id: "token", autocomplete: "off", required: true });
  function submit(event) {
    event.preventDefault();
    takeToken(field.value.trim());
    bus.phase = "start";
    start();
  }
  const dim = text => h("p", { class: "dim" }, text);
  const form = h("form", { class: "card login", onsubmit: submit },
    h("h1", {}, "This bus wants a token"), bus.refused && h("p", { class: "problem", role: "alert" }, bus.refused),
    h("label", { for: "token" }, "Token"), field, dim("It stays in this tab, and is forgotten when you close it."),
    note(!isSecureContext && PLAIN), h("button", { class: "main" }, "Open"),
    dim("On the machine of the bus, this prints a link for a person who may read everything:"),
    h("code", { tabindex: 0 }, "agent-bus invite YOURNAME --operator --page --expires 12h"),
    dim("In a clone of agent-bus, type python3 tools/agent_bus.py for agent-bus."));
  view?.leave?.();
  view = null;
  if ($("dialog").open) $("dialog").close();
  panel.closePanel();
  fill($("main"), form);
  field.focus();
  frame();
}

// Keys

const KEYS_OFF = "agent-bus keys off";
const keysOff = () => localStorage.getItem(KEYS_OFF) === "1";

function help() {
  const numbers = VIEWS.map((_, at) => at + 1).join(" "), titles = VIEWS.map(([, title]) => title).join(", ");
  const rows = [[numbers, titles], ["/", "filter"], ["j k", "next and previous message"],
    ["Enter", "open it"], ["Esc", "close"], ["c", "say something"], ["p", "pause"], ["?", "this"]];
  const off = h("input", { type: "checkbox", id: "keys-off", checked: keysOff(),
    onchange: () => localStorage.setItem(KEYS_OFF, off.checked ? "1" : "0") });
  fill($("dialog"), h("h2", { id: "dialog-title" }, "Keys"),
    h("dl", {}, rows.map(([key, does]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, does)])),
    h("p", {}, off, " ", h("label", { for: "keys-off" }, "single keys do nothing")),
    h("p", { class: "buttons" }, !bus.me.open && button("Forget the token", () => forgetToken("")),
      button("Close", () => $("dialog").close())));
  $("dialog").showModal();
}

document.addEventListener("keydown", event => {
  if (event.key === "Escape" && !$("dialog").open && !$("panel").hidden) return panel.leavePanel();
  if (keysOff() || event.ctrlKey || event.metaKey || event.altKey || $("dialog").open
    || event.target.closest("input, textarea, select")) return;
  const wanted = VIEWS[Number(event.key) - 1];
  const actions = {
    "/": () => view?.focus?.(), j: () => view?.move?.(1), k: () => view?.move?.(-1), p: () => view?.pause?.(),
    c: () => bus.phase === "live" && say(), "?": help,
  };
  if (wanted) location.hash = `#/${wanted[0]}`;
  else if (Object.hasOwn(actions, event.key)) actions[event.key]();
  else return;
  event.preventDefault();
});

const THEME = "agent-bus theme";
const paint = () => (document.documentElement.dataset.theme = localStorage.getItem(THEME) || "");
$("theme").addEventListener("click", () => {
  const dark = localStorage.getItem(THEME) ? localStorage.getItem(THEME) === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  localStorage.setItem(THEME, dark ? "light" : "dark");
  paint();
});
paint();
$("keys").addEventListener("click", help);
$("again").addEventListener("click", start);
$("say").addEventListener("click", () => say());
addEventListener("hashchange", () => (takeLink() ? location.reload() : go()));

let framed = 0;
watch(what => {
  if (what === "phase" || what === "another") {
    banner();
    if (what === "another") shownPath = null;
    go();
    return bus.phase === "live" && view?.update("messages");
  }
  if (bus.phase !== "live") return;
  view?.update(what);
  panel.update(what);
  if (Date.now() - framed > 1000 || what === "agents") {
    framed = Date.now();
    frame();
  }
});
frame();
start();
