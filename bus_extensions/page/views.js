// What several views share. A view is {node, update(what)}: it reads `bus`, and changes nothing but its own nodes.

import { ask } from "./ask.js";
import { bus, callMe, speaks } from "./bus.js";
import { button, copyButton, h } from "./dom.js";
import { renew, send } from "./follow.js";
import { WORDS, told } from "./look.js";

export const link = (path, ...children) => h("a", { href: `#/${path}` }, children);
// Properties of a link that opens a message beside the view that is shown
export const opens = id => ({ href: `${location.hash.split("?")[0] || "#/"}?id=${id}`, "data-id": id });

export const mark = kind => h("span", { class: `mark ${kind}`, "aria-hidden": "true" }, WORDS[kind].sign);
export const card = (title, aside, ...children) => h("section", { class: "card" },
  h("header", {}, h("h2", {}, title), h("p", { class: "dim" }, aside)), children);
export const command = line => h("div", { class: "command" }, h("code", { tabindex: 0 }, line), copyButton(line));
export const busUrl = () => location.href.replace(/\/ui\/.*$/, "");

// A button that asks the bus to do something with a row or a message. An action is {title, sure, ask, done}: place.js
// describes it. `told` gets what came of it, as a sentence; `then` is called with the answer when it was done.
let warnedOf = ""; // what the last press would do: its button may be drawn anew before the next press

export function doing(action, row, told, then = () => {}) {
  const { title, sure, done = () => `${title}: done.` } = action;
  let busy = false; // a button that is disabled would lose the focus
  async function press() {
    if (busy) return;
    const what = action.ask(row, speaks()), known = warnedOf === JSON.stringify(what);
    warnedOf = known ? "" : JSON.stringify(what);
    if (sure && !known) return told(`${sure} Press ${title} again to do it.`);
    busy = true;
    try {
      const answer = await ask(...what);
      told(done(row, answer));
      then(answer);
    } catch (error) {
      told(error.message);
    }
    busy = false;
  }
  return button(title, press);
}

// The same for a message. What the page keeps of it, and of others that the action changes, is asked for anew then.
export const doingWith = (action, message, told) =>
  doing(action, message, told, answer => renew(action.changes?.(answer) ?? [message.id]));

const LOST = "The bus is out of reach: nothing is known of this message. Send it again when it is back.";

// Send a message, and show in `result` what came of it. Returns whether the bus has it.
export async function deliver(message, result) {
  result.textContent = "Sending…";
  try {
    const { receiver } = await send(message);
    result.textContent = told(receiver, message.to);
    return true;
  } catch (error) {
    result.textContent = error.status ? error.message : LOST;
    return false;
  }
}

// The field for the name of the person, which a token decides.
export const nameField = id => h("input", { id, value: speaks(), required: true, pattern: "[A-Za-z0-9._:@\\-]{1,64}",
  readonly: Boolean(bus.me.name), autocomplete: "off" });

export const remember = field => bus.me.name || callMe(field.value.trim());

let spokenAt = 0;
const SPOKEN = 8000; // ms between two sentences of the screen reader

export function speak(text) {
  if (Date.now() - spokenAt < SPOKEN) return;
  spokenAt = Date.now();
  document.getElementById("spoken").textContent = text;
}
