// The view Now: what needs a look, who is there, who talks to whom, and what was said last.

import { agentRow } from "./agents.js";
import { now } from "./ask.js";
import { bus } from "./bus.js";
import { button, clock, fill, h, many, plain, sum } from "./dom.js";
import { bars, pairsTable, ring } from "./draw.js";
import * as look from "./look.js";
import { messageRow } from "./messages.js";
import { say } from "./say.js";
import { busUrl, card, command, link, mark } from "./views.js";

export function nowView() {
  const node = h("div"), parts = {};
  let drawn = 0, timer = 0;
  const hovered = () => parts.ring?.matches(":hover, :focus-within");
  function draw() {
    drawn = Date.now();
    const rows = look.agents();
    if (!bus.messages.length && !rows.length) {
      const unknown = h("p", { class: "quiet" }, "Nothing is known yet: the bus has not answered.");
      return fill(node, h("h1", { class: "only-spoken" }, "Now"), bus.phase === "live" ? empty() : unknown);
    }
    const pairs = look.pairs(30).filter(pair => !look.isDead(pair.to));
    const troubled = new Set(look.inTrouble(rows).map(row => row.name));
    if (!parts.trouble) {
      for (const part of ["trouble", "agents", "minutes", "ring", "said"]) parts[part] = h("div", { class: part });
      const pictures = h("div", {}, bus.me.operator && [parts.minutes, parts.ring]);
      const two = h("div", { class: "two" }, parts.agents, pictures);
      fill(node, h("h1", { class: "only-spoken" }, "Now"), parts.trouble, two, parts.said);
    }
    if (!parts.trouble.contains(document.activeElement)) fill(parts.trouble, troubleCards(look.troubles(rows)));
    if (!parts.agents.contains(document.activeElement)) fill(parts.agents, agentsCard(rows));
    if (bus.me.operator) {
      fill(parts.minutes, bus.minutes.length ? minutesCard() : []);
      const who = () => card("Who talks to whom", loaded(30), ring(pairs, troubled), pairsTable(pairs));
      if (!hovered()) fill(parts.ring, pairs.length ? who() : []);
    }
    if (!parts.said.contains(document.activeElement)) fill(parts.said, lastSaid());
  }
  function update(what) {
    if (what === "older") return;
    clearTimeout(timer);
    timer = setTimeout(draw, Math.max(0, 1000 - (Date.now() - drawn))); // at most once a second
  }
  draw();
  return { node, update, leave: () => clearTimeout(timer) };
}

function troubleCards(found) {
  if (!found.length) return h("p", { class: "quiet" }, mark("listening"), " Nothing is stuck.");
  const one = ({ kind, title, words: why, to }) => h("li", { class: `card trouble-card ${kind}` }, mark(kind),
    h("div", {}, h("h2", {}, title), h("p", { class: "dim" }, why)),
    h("a", { href: to, "aria-label": `look: ${title}` }, "look"));
  return h("ul", { class: "cards" }, found.map(one));
}

const CELLS = 12; // names, from which on a field of cells comes first

function agentsCard(rows) {
  const counts = new Map();
  for (const row of rows) counts.set(row.state.kind, (counts.get(row.state.kind) || 0) + 1);
  const legend = [...counts].map(([kind, number]) => h("span", {}, mark(kind),
    ` ${number} ${look.WORDS[kind][number === 1 ? "one" : "more"]}`));
  const worst = rows.length > CELLS ? rows.slice(0, 8) : rows, said = look.minutesByName(15);
  const cell = ({ name, label, state }) => {
    const title = plain(`${label}: ${state.words}`);
    return h("li", {}, h("a", { href: `#/agents/${name}`, class: `cell ${state.kind}`, title, "aria-label": title }));
  };
  const cells = rows.length > CELLS && h("ul", { class: "cells" }, rows.slice(0, 600).map(cell));
  const all = rows.length > CELLS && h("p", {}, link("agents", `all ${rows.length}`));
  return card(many(rows.length, "agent"), legend, cells,
    h("ul", { class: "agent-rows" }, worst.map(row => h("li", {}, agentRow(row, said.get(row.name))))), all);
}

// Of which time messages are loaded, of so many minutes.
function loaded(minutes) {
  const oldest = bus.messages.at(-1)?.ts;
  const all = bus.next == null || !oldest || now() - oldest > minutes * 60;
  return all ? `${minutes} minutes` : `since ${clock(oldest)}: what was loaded`;
}

function minutesCard() {
  const last = bus.minutes.slice(-30), values = last.map(minute => minute.messages);
  const refused = sum(last.map(minute => minute.refused));
  const label = `Messages in each of the last ${last.length} minutes, now last: ${values.join(", ")}`;
  return card("Messages per minute", refused > 0 && `${many(refused, "request")} refused`,
    bars(values, { width: 520, height: 60, axis: true, label }), h("p", { class: "dim scale" },
      h("span", {}, `since ${clock(last[0].ts)}`), h("span", {}, `most: ${Math.max(...values)} a minute`),
      h("span", {}, "now")));
}

const toMessages = () => (location.hash = "#/messages");

function lastSaid() {
  const six = look.rows(bus.messages.slice(0, 200), new Set()).slice(0, 6);
  return six.length ? card("Last said", link("messages", "all messages"),
    h("div", { class: "plain-rows" }, six.map(row => h("div", { class: "row" }, messageRow(row, toMessages))))) : [];
}

function empty() {
  const url = busUrl();
  const lines = [
    ["Say something from a shell", `curl -s '${url}/send?from=me&to=bob' --data-binary 'hello'`],
    ["Listen as bob", `curl -s '${url}/recv?to=bob&since=0&block=true'`],
    ["Or get the client, which reconnects and remembers",
      `curl -sO ${url}/bus_recv.py; AGENT_BUS_URL=${url} python3 bus_recv.py bob`],
  ];
  const who = bus.me.open ? "This bus has no tokens: whoever reaches this address may read and write everything."
    : "This bus has tokens: each program needs one of its own.";
  return card("Nothing was said yet", who, lines.map(([title, line]) => [h("h3", {}, title), command(line)]),
    h("p", {}, button("Say something here", () => say(), { class: "main" })));
}
