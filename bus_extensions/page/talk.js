// Two views of whole messages, the oldest above: what two say to each other, and the person's own mail.

import { asTheyAre, bus, fitting, speaks } from "./bus.js";
import { arrange, badge, button, clock, cut, day, fill, h, plain, prose, sender, shown } from "./dom.js";
import { newestOf } from "./follow.js";
import { isNew, readMail, readsMail, sawMail } from "./mail.js";
import { say } from "./say.js";
import { deliver, link, nameField, opens, remember } from "./views.js";

const LINES = 12, LETTERS = 1500; // of a text, before it is cut to "show all"
const MOST = 500; // messages in one view

function bubble(message, right) {
  const text = shown(message.msg), begin = cut(text.split("\n").slice(0, LINES).join("\n"), LETTERS);
  const body = h("div", { class: "body", dir: "auto" }, prose(begin));
  const showAll = () => {
    fill(body, prose(text));
    all.remove();
  };
  const all = begin !== text && button("show all", showAll);
  const when = `${day(message.ts)} ${clock(message.ts)}`;
  const head = h("p", {}, sender(message), " ",
    h("a", { class: "time", ...opens(message.id) }, when));
  const subject = message.subject && h("p", {}, h("b", {}, plain(shown(message.subject), 200)));
  return h("article", { class: right ? "bubble right" : "bubble" }, head, subject, body, all);
}

export function conversationView(one, other) {
  const me = speaks(), back = me === one ? other : one;
  const box = h("div", { class: "talk", tabindex: 0, role: "group", "aria-label": `What ${one} and ${other} say` });
  const text = h("textarea", { rows: 2, placeholder: me ? `To ${back}, as ${me}` : `To ${back}`,
    "aria-label": `To ${back}` });
  const result = h("p", { class: "dim", role: "status" });
  const form = h("form", { class: "answer", onsubmit: submit }, text, h("button", { class: "main" }, "Send"), result);
  const linked = name => [badge(name), " ", link(`agents/${name}`, name)];
  const node = h("div", { class: "conversation" },
    h("h1", {}, h("a", { href: "#/messages", "aria-label": "all messages" }, "←"), " ", linked(one), " ⇄ ",
      linked(other)), box, form);
  let found = [], drawn = new Map(), atEnd = true; // drawn: the node of each message, by its id
  const toEnd = () => atEnd && (box.scrollTop = box.scrollHeight);
  box.addEventListener("scroll", () => (atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40));
  new ResizeObserver(toEnd).observe(box); // on a phone, a keyboard takes half of it
  async function submit(event) {
    event.preventDefault();
    if (!speaks()) return say({ to: back, text: text.value });
    const msg = text.value;
    if (msg.trim() && await deliver({ from: speaks(), to: back, msg }, result)) text.value = "";
  }
  const near = ({ from, to }) => (from === one && to === other) || (from === other && to === one);
  function update(what) {
    if (what === "agents") return;
    if (what === "changed") {
      found = asTheyAre(found);
      drawn.clear();
    }
    const known = new Set(found.map(message => message.id));
    const fresh = bus.messages.filter(message => near(message) && !known.has(message.id));
    found = fitting([...found, ...fresh].sort((a, b) => b.ts - a.ts), MOST).reverse();
    const nodeOf = message => drawn.get(message.id) ?? bubble(message, message.from !== back);
    drawn = new Map(found.map(message => [message.id, nodeOf(message)]));
    arrange(box, drawn.size ? [...drawn.values()] : [h("p", { class: "dim" }, "Nothing yet.")]);
    toEnd();
  }
  const first = newestOf(`with=${one},${other}`, 300);
  first.then(messages => {
    found = messages;
    update("messages");
  }, error => box.before(h("p", { class: "problem", role: "alert" }, error.message)));
  update();
  return { node, update };
}

export function mailView() {
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
    if (what === "changed") {
      drawn.clear();
      eyes.disconnect();
    }
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
