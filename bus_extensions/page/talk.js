// Two views of whole messages, the oldest above: what two say to each other, and the person's own mail.

import { ask, bus, isNew, readMail, readsMail, sawMail, send, speaks } from "./bus.js";
import { badge, button, clock, day, fill, h, plain, prose, shown } from "./dom.js";
import { told } from "./look.js";
import { link, nameField, remember } from "./views.js";

const LINES = 12, LETTERS = 1500; // of a text, before it is cut to "show all"
const MOST = 500; // messages in one view

function bubble(message, right) {
  const text = shown(message.msg), long = text.split("\n").length > LINES || text.length > LETTERS;
  const body = h("div", { class: long ? "body clipped" : "body", dir: "auto" }, prose(text));
  const unclip = () => {
    body.classList.remove("clipped");
    all.remove();
  };
  const all = long && button("show all", unclip);
  const when = `${day(message.ts)} ${clock(message.ts)}`;
  const head = h("p", {}, h("b", {}, message.from), " ",
    h("a", { class: "time", href: `#/messages?id=${message.id}` }, when));
  const subject = message.subject && h("p", {}, h("b", {}, plain(shown(message.subject), 200)));
  return h("article", { class: right ? "bubble right" : "bubble" }, head, subject, body, all);
}

export function conversationView({ say }, one, other) {
  const me = speaks(), back = me === one ? other : one, drawn = new Map();
  const box = h("div", { class: "talk", tabindex: 0, role: "group", "aria-label": `What ${one} and ${other} say` });
  const text = h("textarea", { rows: 2, placeholder: me ? `To ${back}, as ${me}` : `To ${back}`,
    "aria-label": `To ${back}` });
  const result = h("p", { class: "dim", role: "status" });
  const form = h("form", { class: "answer", onsubmit: submit }, text, h("button", { class: "main" }, "Send"), result);
  const linked = name => [badge(name), " ", link(`agents/${name}`, name)];
  const node = h("div", { class: "conversation" },
    h("h1", {}, h("a", { href: "#/messages", "aria-label": "all messages" }, "←"), " ", linked(one), " ⇄ ",
      linked(other)), box, form);
  let found = [], problem = "";
  async function submit(event) {
    event.preventDefault();
    if (!speaks()) return say({ to: back, text: text.value });
    if (!text.value.trim()) return;
    try {
      result.textContent = told((await send({ from: speaks(), to: back, msg: text.value })).receiver, back);
      text.value = "";
    } catch (error) {
      result.textContent = error.message;
    }
  }
  const near = ({ from, to }) => (from === one && to === other) || (from === other && to === one);
  function update(what) {
    if (what === "agents") return;
    const known = new Set(found.map(message => message.id));
    const fresh = bus.messages.filter(message => near(message) && !known.has(message.id));
    found = [...found, ...fresh].sort((a, b) => a.ts - b.ts).slice(-MOST);
    const atEnd = !drawn.size || box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    for (const message of found) {
      if (!drawn.has(message.id)) drawn.set(message.id, bubble(message, message.from !== back));
    }
    const nothing = !found.length && h("p", { class: "dim" }, "Nothing yet.");
    fill(box, problem && h("p", { class: "problem" }, problem), nothing, found.map(message => drawn.get(message.id)));
    if (atEnd) box.scrollTop = box.scrollHeight;
  }
  const first = ask(`log?before=now&with=${one},${other}&max=300`);
  first.then(answer => (found = answer.messages), error => (problem = error.message)).then(update);
  update();
  requestAnimationFrame(() => (box.scrollTop = box.scrollHeight));
  return { node, update };
}

export function mailView({ say }) {
  const box = h("div", { class: "talk", tabindex: 0, role: "group", "aria-label": "Your mail" });
  const node = h("div", { class: "conversation" }), drawn = new Map();
  // Half of a message on the screen, or half of the screen full of it, counts as seen.
  const eyes = new IntersectionObserver(entries => entries.forEach(entry => {
    const { isIntersecting, target, intersectionRatio, intersectionRect } = entry;
    if (isIntersecting && (intersectionRatio >= 0.5
      || intersectionRect.height > innerHeight / 2)) sawMail(drawn.get(target));
  }), { threshold: [0, 0.1, 0.25, 0.5, 1] });
  function letter(message) {
    const answer = () => say({ to: message.from, reply_to: message.id });
    const made = bubble(message, false);
    made.append(h("p", { class: "buttons" }, button("Answer", answer)));
    drawn.set(made, message);
    return made;
  }
  function update(what) {
    if (what === "messages" || what === "older") return;
    if (!readsMail()) return what || fill(node, readHere(update));
    if (box.parentNode !== node) fill(node, h("h1", {}, "Mail for ", badge(speaks()), " ", speaks()), box);
    const known = new Set([...drawn.values()].map(message => message.id));
    const fresh = bus.mail.filter(message => !known.has(message.id));
    if (!drawn.size) fill(box, fresh.length ? [] : h("p", { class: "quiet" }, "Nothing waits for you."));
    box.append(...fresh.map(letter));
    for (const [made, message] of drawn) {
      made.classList.toggle("new", isNew(message));
      eyes.unobserve(made); // it tells anew what is on the screen: the tab may have been hidden when it last did
      if (isNew(message)) eyes.observe(made);
    }
  }
  update();
  return { node, update, leave: () => eyes.disconnect() };
}

const READ_HERE = "While this tab is open you are listening, and what was on your screen is read. " +
  "If a program reads the mail of this name, it does not get what you have read here.";

function readHere(update) {
  const name = nameField("mail-name");
  const problem = h("p", { class: "problem", role: "alert" });
  function submit(event) {
    event.preventDefault();
    remember(name);
    readMail().then(() => update(), error => fill(problem, error.message));
  }
  return h("form", { class: "card login", onsubmit: submit }, h("h1", {}, "Your mail"),
    h("label", { for: "mail-name" }, bus.me.name ? "Your token's name" : "Your name"), name,
    h("p", { class: "dim" }, READ_HERE), h("button", { class: "main" }, "Read my mail here"), problem);
}
