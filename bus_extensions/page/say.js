// The dialog to say something.

import { bus, names } from "./bus.js";
import { button, fill, h, many } from "./dom.js";
import { deliver, nameField, remember } from "./views.js";

const several = text => text.split(",").map(name => name.trim()).filter(Boolean);
const oneOrMore = text => (several(text).length > 1 ? several(text) : several(text)[0] ?? text.trim());
const dialog = document.getElementById("dialog");

export function say({ to = "", reply_to = null, text: begun = "" } = {}) {
  const known = names(), as = nameField("say-as");
  const receiver = h("input", { id: "say-to", value: to, required: true, list: "say-names", autocomplete: "off",
    oninput: warn });
  const subject = h("input", { id: "say-subject", autocomplete: "off" });
  const text = h("textarea", { id: "say-text", rows: 6, required: true }, begun);
  const warning = h("p", { class: "note", role: "status", hidden: true }), result = h("p", { role: "status" });
  const sends = h("button", { class: "main" }, "Send");
  const field = (label, input) => h("p", {}, h("label", { for: input.id }, label), input);
  const form = h("form", { method: "dialog", onsubmit: submit },
    h("h2", { id: "dialog-title" }, reply_to ? "Answer" : "Say something"),
    field(bus.me.name ? "As (your token's name)" : "As", as), field("To", receiver),
    h("datalist", { id: "say-names" }, [...known, "all"].map(name => h("option", { value: name }))),
    warning, field("Subject (may be empty)", subject), field("Text", text), result,
    h("p", { class: "buttons" }, sends, button("Close", () => dialog.close())));
  function warn() {
    const name = receiver.value.trim();
    const all = bus.agents.filter(agent => agent.listens && agent.channel === "default").length;
    const strangers = several(name).filter(each => each !== "all" && !known.includes(each));
    const nobody = strangers.length ? `Nobody has ever listened as ${strangers.join(", ")}.` : "";
    warning.textContent = name === "all" ? `This reaches ${many(all, "name")}.` : nobody;
    warning.hidden = !warning.textContent;
  }
  async function submit(event) {
    event.preventDefault();
    sends.disabled = true;
    remember(as);
    const message = { from: as.value.trim(), to: oneOrMore(receiver.value), msg: text.value };
    if (subject.value) message.subject = subject.value;
    if (reply_to) message.reply_to = reply_to;
    if (await deliver(message, result)) text.value = "";
    sends.disabled = false;
  }
  fill(dialog, form);
  warn();
  dialog.showModal();
  (!as.value ? as : to ? text : receiver).focus();
}
