// The view Messages: all that was said, the newest first.

import { asTheyAre, bus } from "./bus.js";
import { badge, button, clock, h, many, plain, sender, shown } from "./dom.js";
import { older } from "./follow.js";
import { List } from "./list.js";
import * as look from "./look.js";
import { opens, speak } from "./views.js";

const phone = matchMedia("(max-width: 700px)");
const high = () => (phone.matches ? 68 : 46);

export function messageRow(row, unfold) {
  const { message } = row;
  const who = [badge(message.from), sender(message), " → ",
    h("span", { class: "dim" }, plain(row.to.join(", "), 60))];
  if (row.fold) {
    const number = h("span", { class: "line" }, `${row.number} messages in this minute - show`);
    return button([h("time", {}, clock(message.ts)), h("span", { class: "who" }, who), number],
      () => unfold(row.fold), { class: "message-row" });
  }
  const subject = message.subject ? h("b", {}, plain(shown(message.subject), 80), " ") : null;
  return h("a", { class: "message-row", ...opens(message.id) },
    h("time", {}, clock(message.ts)), h("span", { class: "who" }, who),
    h("span", { class: "line" }, message.priority === "high" && h("span", { class: "count" }, "high"), subject,
      plain(shown(message.msg), 300)));
}

export function messagesView() {
  const unfolded = new Set();
  let paused = false, frozen = null;
  const filter = h("input", { type: "search", id: "filter", placeholder: "Filter: words, from:alice, to:bob, #channel",
    "aria-label": "Filter", oninput: () => live() });
  const pause = button("Pause", () => setPaused(!paused), { "aria-pressed": "false" });
  const toTop = () => {
    setPaused(false);
    list.node.scrollTop = 0;
    live();
  };
  const pill = button("", toTop, { class: "pill", hidden: true });
  const foot = h("p", { class: "dim foot" });
  const list = new List({ label: "Messages, the newest first", draw: row => messageRow(row, unfold), height: high,
    end: older });
  list.node.addEventListener("scroll", () => {
    if (frozen && list.isAtTop && !paused) live();
    else if (!frozen && !list.isAtTop) freeze();
  });
  const node = h("div", { class: "messages" }, h("h1", { class: "only-spoken" }, "Messages"),
    h("div", { class: "tools" }, filter, pause), pill, list.node, foot);

  function unfold(key) {
    unfolded.add(key);
    frozen ? draw(frozen) : live();
  }
  function freeze() {
    frozen = bus.messages;
  }
  function setPaused(on) {
    paused = on;
    pause.setAttribute("aria-pressed", String(on));
    pause.textContent = on ? "Go on" : "Pause";
    on ? freeze() : list.isAtTop && live();
  }
  function live() {
    frozen = paused ? frozen : null;
    draw(frozen ?? bus.messages);
  }
  function draw(messages) {
    const test = look.wanted(filter.value), some = filter.value ? messages.filter(test) : messages;
    list.set(look.rows(some, unfolded).map(row => ({ ...row, mark: `${row.to}|${row.number ?? ""}` })));
    count();
    if (!some.length && filter.value) older();
  }
  function count() {
    const at = frozen ? bus.messages.findIndex(message => message.id === frozen[0]?.id) : 0;
    const fresh = at < 0 ? bus.messages.length : at; // so many at least
    pill.hidden = fresh < 1;
    pill.textContent = many(fresh, "new message");
    if (fresh > 0) speak(many(fresh, "new message"));
    const far = bus.capped ? "; no more are kept here, search further back with agent-bus log"
      : bus.next != null ? "; older ones come as you scroll" : ", from the first on";
    const some = filter.value ? `${many(list.items.length, "row")} of ` : "";
    if (bus.phase !== "live" && !bus.messages.length) foot.textContent = "nothing is loaded yet";
    else foot.textContent = `${some}${many(bus.messages.length, "message")} loaded${far}`;
  }
  function update(what) {
    if (what === "changed") {
      frozen = frozen && asTheyAre(frozen);
      list.forget();
    }
    if (what === "older" && frozen) {
      const last = bus.messages.findIndex(message => message.id === frozen.at(-1)?.id);
      if (last >= 0) frozen = [...frozen, ...bus.messages.slice(last + 1)];
    }
    if (what === "older" || what === "changed" || !frozen) draw(frozen ?? bus.messages);
    else if (what === "messages") count();
  }
  function move(by) {
    const top = each => each.getBoundingClientRect().top, opened = location.hash.split("?id=")[1];
    const all = [...list.node.querySelectorAll(".message-row")];
    let at = all.indexOf(document.activeElement);
    if (at < 0 && opened) at = all.findIndex(row => row.dataset.id === opened); // the focus is in the panel
    const next = at < 0 ? all.find(each => top(each) >= top(list.node)) : all[at + by];
    next?.focus();
  }
  live();
  return { node, update, move, focus: () => filter.focus(), pause: () => setPaused(!paused) };
}
