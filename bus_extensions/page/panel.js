// One message, beside any view; where there is no room for both, it is all of the page.

import { ask } from "./ask.js";
import { bus, speaks } from "./bus.js";
import { badge, button, clock, copyButton, day, fill, h, plain, prose, sender, shown } from "./dom.js";
import { isDead } from "./look.js";
import { forMessage } from "./place.js";
import { say } from "./say.js";
import { doingWith, link, opens } from "./views.js";

const panel = document.getElementById("panel");
const narrow = matchMedia("(max-width: 1000px)");
const setRole = () => panel.setAttribute("role", narrow.matches ? "main" : "complementary");
narrow.addEventListener("change", setRole);
setRole();

const title = h("h1", { tabindex: -1 }, "Message"), content = h("div");
const outcome = h("p", { class: "dim", role: "status" }); // of what was done with the message
panel.append(h("div", { class: "head" }, title, button("✕", leavePanel, { "aria-label": "Close" })), content, outcome);

let shownId = null, opener = null, looks = 0; // opener: what had the focus before

export function openMessage(id) {
  if (panel.hidden) opener = document.activeElement;
  panel.hidden = false;
  document.body.classList.add("with-panel");
  if (shownId === id) return;
  shownId = id;
  const known = bus.messages.find(message => message.id === id);
  outcome.textContent = "";
  draw(known, null, [], known ? "" : "Looking…");
  title.focus({ preventScroll: true });
  look();
}

export function closePanel() {
  if (panel.hidden) return;
  const row = document.querySelector(`main [data-id="${shownId}"]`); // it may have been drawn anew
  panel.hidden = true;
  fill(content);
  shownId = null;
  looks += 1;
  document.body.classList.remove("with-panel");
  (opener?.isConnected ? opener : row ?? document.getElementById("main")).focus({ preventScroll: true });
}

// The address without the message: its view stays as it is.
export function leavePanel() {
  location.hash = location.hash.split("?")[0];
}

export function update(what) {
  if (what === "changed" && shownId) look();
}

// Ask for the message, for how far it came, and for its thread.
async function look() {
  const mine = (looks += 1), id = shownId, known = bus.messages.find(message => message.id === id);
  const asked = ask(`message/${id}`).catch(error => ({ error }));
  const thread = await ask(`thread/${id}`).catch(() => ({ messages: [] })), answer = await asked;
  if (mine !== looks) return;
  draw(answer.message ?? known, answer, thread.messages, answer.error?.message ?? "");
}

function draw(message, answer, others, problem) {
  const focused = content.contains(document.activeElement);
  fill(content, problem && h("p", { class: "problem" }, problem), message && whole(message, answer),
    others.length > 1 && threadOf(others));
  if (focused) title.focus({ preventScroll: true });
}

// In words, how far a message came. `answer` is that of /message.
function receipt({ state, by, at, message }) {
  const when = at && at - message.ts > 2 ? ` after ${Math.round(at - message.ts)} s` : "";
  const who = by ?? message.to;
  const sentences = {
    acknowledged: `read by ${who}${when}`, fetched: `fetched by ${who}${when}`, queued: "nobody has fetched it",
    recalled: isDead(message.to) ? "sent again" : "taken back", expired: "expired: nobody fetched it in time",
    dead: "given up after all attempts", sent: "to everybody",
  };
  return sentences[state] ?? state;
}

const HEAD = new Set(["ts", "id", "from", "to", "msg", "subject"]);
const MEMBERS = 100; // of the others, so many are shown: a message may have 20,000

function whole(message, answer) {
  const { from, to, ts, id, subject, msg } = message, isThere = msg !== undefined; // its text may be gone
  const all = Object.entries(message).filter(([name]) => !HEAD.has(name)), members = all.slice(0, MEMBERS);
  if (all.length > MEMBERS) members.push(["…", `and ${all.length - MEMBERS} more`]);
  const told = text => shownId === id && (outcome.textContent = text);
  return [
    h("h2", {}, badge(from), " ", link(`agents/${from}`, from), " → ", link(`agents/${to}`, to)),
    h("p", { class: "dim" }, `${day(ts)} ${clock(ts)} `, answer?.state && h("span", { class: "state" }, receipt(answer))),
    subject && h("p", {}, h("b", {}, plain(shown(subject), 300))),
    isThere && h("div", { class: "body", dir: "auto" }, prose(shown(msg))),
    h("p", { class: "buttons" }, button("Answer", () => say({ to: from, reply_to: id }), { class: "main" }),
      h("a", { class: "button", href: `#/messages/${from}/${to}` }, "Conversation"),
      isThere && copyButton(shown(msg)),
      from === speaks() && answer?.state === "queued" && doingWith(TAKE_BACK, message, told),
      isThere && forMessage(message, told)),
    h("dl", {}, [...members, ["id", id]].map(([name, value]) =>
      [h("dt", {}, plain(name, 60)), h("dd", {}, plain(shown(value), 500))])),
  ];
}

const TAKE_BACK = {
  title: "Take back", ask: ({ id, from }) => ["recall", { id, from }], done: () => "Taken back: nobody gets it.",
};

function threadOf(messages) {
  const one = ({ id, to, ts, msg = "", ...rest }) =>
    h("li", {}, h("a", { ...opens(id), "aria-current": id === shownId ? "true" : null },
      h("span", {}, badge(rest.from), " ", sender(rest), ` → ${to} `, h("time", {}, clock(ts))),
      h("span", { class: "line dim" }, plain(shown(msg), 200))));
  return [h("h2", {}, `Thread of ${messages.length}`), h("ol", { class: "thread" }, messages.map(one))];
}
