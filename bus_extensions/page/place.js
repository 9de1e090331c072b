// The places of extensions. If bus_extensions/NAME.py is loaded, the default export of NAME.js is its place:
//   title      of its view
//   says       what the rows are, in one sentence
//   path       of the GET whose answer has the rows; asked every 3 s. Without it there is no view, only `onMessage`.
//   fields     {parameter: label}: the person fills in these parameters of the GET, and then it is asked once
//   rows       answer => an array
//   columns    {title: row => a text, a number or a node}
//   actions    of each row, and onMessage of each message beside a view: arrays of {title, may, sure, ask, done}
//     may      row => whether there is a button; without it: always
//     sure     a sentence that a first press shows; then a second press does it
//     ask      (row, me) => [path, the JSON to POST]; `me` is the name of the person
//     done     (row, answer) => a sentence; without it: "TITLE: done."
//     changes  of onMessage: answer => the ids of the messages that are others now; without it: that of the message

import { ask } from "./ask.js";
import { fill, h, plain, shown } from "./dom.js";
import { table } from "./draw.js";
import * as extensions from "./extensions.js";
import { card, doing, doingWith } from "./views.js";

export const places = Object.entries(extensions).filter(([, { path }]) => path);

const allowed = (actions, row) => actions.filter(({ may }) => !may || may(row));

export const forMessage = (message, told) => Object.values(extensions).map(({ onMessage = [] }) =>
  allowed(onMessage, message).map(action => doingWith(action, message, told)));

const content = value => (value instanceof Node ? value : plain(shown(value ?? ""), 300));

export function placeView(wanted) {
  const [own, place] = places.find(([name]) => name === wanted) ?? places[0];
  const { title, says, path, fields, columns, actions = [] } = place;
  const found = h("div", { class: "rows", tabindex: 0, role: "group", "aria-label": title });
  const result = h("p", { class: "dim", role: "status", tabindex: -1 });
  const form = fields && h("form", { class: "fields", onsubmit: submit }, Object.entries(fields).map(([name, label]) =>
    h("label", {}, label, h("input", { name, autocomplete: "off" }))), h("button", { class: "main" }, "Look"));
  const one = ([name, { title: its }]) =>
    h("a", { class: "button", href: `#/more/${name}`, "aria-current": name === own ? "page" : null }, its);
  const others = places.length > 1 && h("p", { class: "buttons" }, places.map(one));
  const node = h("div", {}, h("h1", { class: "only-spoken" }, "More"), others, card(title, says, form, found, result));
  const told = text => (result.textContent = text);
  async function look() {
    const query = form ? [...new FormData(form)].filter(([, value]) => value) : [];
    try {
      draw(place.rows(await ask(`${path}?${new URLSearchParams(query)}`)));
    } catch (error) {
      told(error.message);
    }
  }
  function draw(rows) {
    const last = actions.length ? ["what to do"] : [];
    const cells = row => [...Object.values(columns).map(column => content(column(row))),
      ...last.map(() => allowed(actions, row).map(action => [doing(action, row, told, done), " "]))];
    const none = h("p", { class: "quiet" }, "There are none.");
    fill(found, rows.length ? table([...Object.keys(columns), ...last], rows.map(cells)) : none);
  }
  function done() {
    result.focus(); // the button goes with its row
    look();
  }
  function submit(event) {
    event.preventDefault();
    told("");
    look();
  }
  function update(what) {
    if (what === "agents" && !form && !found.contains(document.activeElement)) look();
  }
  update("agents");
  return { node, update, focus: () => form?.querySelector("input").focus() };
}
