// The frame: which view is shown, the panel of one message, the dialog to say something, the keys.

import { ask, bus, callMe, forgetToken, names, send, speaks, start, takeToken, watch } from "./bus.js";
import { badge, clock, day, fill, h, many, plain, prose, shown } from "./dom.js";
import * as look from "./look.js";
import { forMessage, places, placeView } from "./place.js";
import * as talk from "./talk.js";
import * as views from "./views.js";

const $ = id => document.getElementById(id);
const VIEWS = [
  ["", "Now", "◉"], ["messages", "Messages", "≡"], ["agents", "Agents", "⁂"], ["work", "Work", "▤"],
  ...(places.length ? [["more", "More", "⋯"]] : []),
];
const SPOKEN = 8000; // ms between two sentences of the screen reader

let view = null, shownPath = null, spokenAt = 0, opener = null;

// The token of a link goes into this tab and out of the address before anything is asked.
const given = /^#token=([!-~]{8,300})$/.exec(location.hash);
if (given) {
  takeToken(given[1]);
  history.replaceState(null, "", `${location.pathname}#/`);
}

function spoken(text) {
  if (Date.now() - spokenAt < SPOKEN) return;
  spokenAt = Date.now();
  $("spoken").textContent = text;
}

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
  ["", () => views.nowView(tools)],
  ["messages", (one, other) => (isName(one) && isName(other) ? talk.conversationView(tools, one, other)
    : views.messagesView(tools))],
  ["agents", name => (isName(name) ? views.agentView(tools, name) : views.agentsView())],
  ["work", () => views.workView()],
  ["mail", () => talk.mailView(tools)],
  ["more", name => (places.length ? placeView(name) : views.nowView(tools))],
]);

function go() {
  if (bus.phase === "token") return login();
  if (bus.phase === "start") return;
  const { parts, id } = place(), [first = "", ...rest] = parts, path = parts.join("/");
  if (path !== shownPath || !view) {
    view?.leave?.();
    view = (ROUTES.get(first) ?? ROUTES.get(""))(...rest);
    shownPath = path;
    fill($("main"), note(views.noteOfRights()), note(!isSecureContext && PLAIN), note(bus.notice), view.node);
  }
  isId(id) ? openMessage(id) : closePanel();
  frame();
}

const PLAIN = "This connection is not encrypted: whoever is on the way can read everything, the token too.";
const note = text => text && h("p", { class: "note" }, text);

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
  const live = bus.phase === "live";
  $("live").textContent = live ? "● live" : bus.phase === "away" ? "○ out of reach" : "";
  $("live").className = live ? "good" : "";
  $("say").hidden = !live;
  document.body.classList.toggle("away", bus.phase === "away");
}

function banner() {
  const away = bus.phase === "away";
  $("banner").hidden = !away;
  if (!away) return;
  const left = Math.max(0, Math.ceil((bus.away.until - Date.now()) / 1000));
  fill($("banner"),
    `${bus.away.why || "The bus is out of reach."} What you see is what was last known. Next try in ${left} s. `,
    h("button", { type: "button", onclick: () => start() }, "Try now"));
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
    h("code", { tabindex: 0 }, "agent-bus invite YOURNAME --operator --page --for 12h"));
  view?.leave?.();
  view = null;
  if ($("dialog").open) $("dialog").close();
  closePanel();
  fill($("main"), form);
  field.focus();
  frame();
}

// One message, beside any view; where there is no room for both, it is all of the page

const narrow = matchMedia("(max-width: 1000px)");
const setRole = () => $("panel").setAttribute("role", narrow.matches ? "main" : "complementary");
narrow.addEventListener("change", setRole);
setRole();

async function openMessage(id) {
  const panel = $("panel");
  if (panel.hidden) opener = document.activeElement;
  const known = bus.messages.find(message => message.id === id);
  panel.hidden = false;
  document.body.classList.add("with-panel");
  if (panel.dataset.id === id) return;
  panel.dataset.id = id;
  draw(known, "", [], known ? "" : "Looking…");
  const asked = ask(`message/${id}`).catch(error => ({ error }));
  const thread = await ask(`thread/${id}`).catch(() => ({ messages: [] })), answer = await asked;
  if (panel.dataset.id !== id) return;
  draw(answer.message ?? known, answer.error ? "" : receipt(answer), thread.messages, answer.error?.message ?? "");
  function draw(message, state, others, problem) {
    const head = h("div", { class: "head" }, h("h1", { tabindex: -1 }, "Message"),
      h("button", { type: "button", "aria-label": "Close", onclick: leavePanel }, "✕"));
    fill(panel, head, problem && h("p", { class: "problem" }, problem), message && whole(message, state),
      others.length > 1 && threadOf(others, id));
    head.querySelector("h1").focus({ preventScroll: true });
  }
}

const UNREAD = "nobody has fetched it";

function receipt({ state, by, at, message }) {
  const when = at && at - message.ts > 2 ? ` after ${Math.round(at - message.ts)} s` : "";
  const who = by ?? message.to;
  const sentences = {
    acknowledged: `read by ${who}${when}`, fetched: `fetched by ${who}${when}`, queued: UNREAD, recalled: "taken back",
    expired: "expired: nobody fetched it in time", dead: "given up after all attempts", sent: "to everybody",
  };
  return sentences[state] ?? state;
}

const HEAD = new Set(["ts", "id", "from", "to", "msg", "subject", "bus"]);

function whole(message, state) {
  const { from, to, ts, id, subject, msg } = message;
  const button = (title, onclick, kind) => h("button", { type: "button", class: kind, onclick }, title);
  const members = Object.entries(message).filter(([name]) => !HEAD.has(name));
  const status = h("span", { class: "state", role: "status" }, state);
  const told = text => (status.textContent = text);
  return [
    h("h2", {}, badge(from), " ", views.link(`agents/${from}`, from), " → ", views.link(`agents/${to}`, to)),
    h("p", { class: "dim" }, `${day(ts)} ${clock(ts)} `, status),
    subject && h("p", {}, h("b", {}, plain(shown(subject), 300))),
    h("div", { class: "body", dir: "auto" }, prose(shown(msg))),
    h("p", { class: "buttons" }, button("Answer", () => say({ to: from, reply_to: id }), "main"),
      h("a", { class: "button", href: `#/messages/${from}/${to}` }, "Conversation"),
      navigator.clipboard && button("Copy", () => navigator.clipboard.writeText(shown(msg))),
      from === speaks() && state === UNREAD && views.doing(TAKE_BACK, message, told), forMessage(message, told)),
    h("dl", {}, [...members, ["id", id]].map(([name, value]) =>
      [h("dt", {}, plain(name, 60)), h("dd", {}, plain(shown(value), 500))])),
  ];
}

const TAKE_BACK = {
  title: "Take back", ask: ({ id, from }) => ["recall", { id, from }], done: () => "taken back",
};

function threadOf(messages, here) {
  const one = ({ id, from, to, ts, msg = "" }) =>
    h("li", {}, h("a", { href: `#/messages?id=${id}`, "aria-current": id === here ? "true" : null },
      h("span", {}, badge(from), " ", h("b", {}, from), ` → ${to} `, h("time", {}, clock(ts))),
      h("span", { class: "line dim" }, plain(shown(msg), 200))));
  return [h("h2", {}, `Thread of ${messages.length}`), h("ol", { class: "thread" }, messages.map(one))];
}

function closePanel() {
  if ($("panel").hidden) return;
  $("panel").hidden = true;
  $("panel").dataset.id = "";
  document.body.classList.remove("with-panel");
  (opener?.isConnected ? opener : $("main")).focus({ preventScroll: true });
}

// The address without the message: its view stays as it is.
function leavePanel() {
  location.hash = `#/${place().parts.map(encodeURIComponent).join("/")}`;
}

// Say something

const LOST = "The bus is out of reach: nothing is known of this message. Send it again when it is back.";

function say({ to = "", reply_to = null, text: begun = "" } = {}) {
  const dialog = $("dialog"), known = names();
  const as = h("input", { id: "say-as", value: speaks(), required: true, pattern: "[A-Za-z0-9._:@\\-]{1,64}",
    readonly: Boolean(bus.me.name), autocomplete: "off" });
  const receiver = h("input", { id: "say-to", value: to, required: true, list: "say-names", autocomplete: "off",
    oninput: warn });
  const subject = h("input", { id: "say-subject", autocomplete: "off" });
  const text = h("textarea", { id: "say-text", rows: 6, required: true });
  text.value = begun;
  const warning = h("p", { class: "note", role: "status", hidden: true }), result = h("p", { role: "status" });
  const button = h("button", { class: "main" }, "Send");
  const field = (label, input) => h("p", {}, h("label", { for: input.id }, label), input);
  const form = h("form", { method: "dialog", onsubmit: submit },
    h("h2", { id: "dialog-title" }, reply_to ? "Answer" : "Say something"),
    field(bus.me.name ? "As (your token's name)" : "As", as), field("To", receiver),
      h("datalist", { id: "say-names" }, [...known, "all"].map(name => h("option", { value: name }))),
    warning, field("Subject (may be empty)", subject), field("Text", text), result,
    h("p", { class: "buttons" }, button, h("button", { type: "button", onclick: () => dialog.close() }, "Close")));
  function warn() {
    const name = receiver.value.trim();
    const all = bus.agents.filter(agent => agent.listens && agent.channel === "default").length;
    const nobody = name && !known.includes(name) ? `Nobody has ever listened as ${name}.` : "";
    const says = name === "all" ? `This reaches ${many(all, "name")}.` : nobody;
    warning.hidden = !says;
    warning.textContent = says;
  }
  async function submit(event) {
    event.preventDefault();
    button.disabled = true;
    result.textContent = "Sending…";
    if (!bus.me.name) callMe(as.value.trim());
    const message = { from: as.value.trim(), to: receiver.value.trim(), msg: text.value };
    if (subject.value) message.subject = subject.value;
    if (reply_to) message.reply_to = reply_to;
    try {
      const answer = await send(message);
      result.textContent = look.told(answer.receiver, message.to);
      text.value = "";
    } catch (error) {
      result.textContent = error.status ? error.message : LOST;
    }
    button.disabled = false;
  }
  fill(dialog, form);
  warn();
  dialog.showModal();
  (!as.value ? as : to ? text : receiver).focus();
}

// Keys

const KEYS_OFF = "agent-bus keys off";
const keysOff = () => localStorage.getItem(KEYS_OFF) === "1";

function help() {
  const rows = [[VIEWS.map((_, at) => at + 1).join(" "), VIEWS.map(([, title]) => title).join(", ")], ["/", "filter"], ["j k", "next and previous message"],
    ["Enter", "open it"], ["Esc", "close"], ["c", "say something"], ["p", "pause"], ["?", "this"]];
  const off = h("input", { type: "checkbox", id: "keys-off", checked: keysOff(),
    onchange: () => localStorage.setItem(KEYS_OFF, off.checked ? "1" : "0") });
  const button = (title, onclick) => h("button", { type: "button", onclick }, title);
  fill($("dialog"), h("h2", { id: "dialog-title" }, "Keys"),
    h("dl", { class: "keys" }, rows.map(([key, does]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, does)])),
    h("p", {}, off, " ", h("label", { for: "keys-off" }, "single keys do nothing")),
    h("p", { class: "buttons" }, !bus.me.open && button("Forget the token", () => forgetToken("")),
      button("Close", () => $("dialog").close())));
  $("dialog").showModal();
}

document.addEventListener("keydown", event => {
  if (event.key === "Escape" && !$("dialog").open && !$("panel").hidden) return leavePanel();
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
$("say").addEventListener("click", () => say());
addEventListener("hashchange", () => go());

const tools = { say, spoken };
let framed = 0;
watch(what => {
  if (what === "phase") {
    banner();
    if (bus.phase === "live") shownPath = bus.notice ? null : shownPath;
    go();
    return bus.phase === "live" && view?.update("messages");
  }
  if (bus.phase !== "live") return;
  view?.update(what);
  if (Date.now() - framed > 1000 || what === "agents") {
    framed = Date.now();
    frame();
  }
});
frame();
start();
