// What follows from what the bus said: who is in trouble, which messages are one row, how much was said. No nodes here.

import { now } from "./ask.js";
import { bus, speaks } from "./bus.js";
import { many, shown, span } from "./dom.js";

const SLOW = 120; // s that mail may wait for somebody who listens
const STORM = 60, STORM_SECONDS = 30; // messages of one pair
const FOLD = 20; // messages of one pair in one minute, from which on they are one row

export const isDead = name => name.endsWith(".dead");

// The state of an agent: `kind` (one of WORDS), its words, and its rank: trouble first.
function stateOf(agent) {
  const { unread = 0, online, listens, oldest } = agent;
  const waits = oldest ? `, the oldest ${span(now() - oldest)}` : "";
  if (agent.work) {
    const { in_hand, workers } = agent.work;
    return { kind: "queue", rank: 4,
      words: `a queue: ${in_hand} in hand, ${workers ? many(workers, "worker") : "no worker"}` };
  }
  if (agent.name === speaks() && unread) { // the person's own mail is no trouble of an agent
    return { kind: "mail", rank: 2, words: `${many(unread, "message")} for you${waits}` };
  }
  if (!online && unread && !isDead(agent.name)) {
    const last = agent.last_seen ? `last here ${span(now() - agent.last_seen)} ago` : "it never listened";
    return { kind: "deaf", rank: 0,
      words: `${many(unread, "message")} ${unread === 1 ? "waits" : "wait"}${waits}; ${last}` };
  }
  if (online && unread && oldest && now() - oldest > SLOW) {
    return { kind: "slow", rank: 1, words: `listens, but the oldest of ${unread} waits for ${span(now() - oldest)}` };
  }
  if (online) return { kind: "listening", rank: 2, words: `listening for ${span(now() - agent.since)}${said(agent)}` };
  if (!listens && agent.sent) return { kind: "sends", rank: 3,
    words: `sent ${span(now() - agent.sent)} ago, never listened` };
  return { kind: "away", rank: 5, words: agent.last_seen ? `last here ${span(now() - agent.last_seen)} ago`
    : "never here" };
}

// What an agent says of itself, if the bus knows it.
const said = agent => (agent.status?.text ? `; says: ${agent.status.text}` : "");

export const WORDS = { // for one agent, for more, and a sign
  listening: { one: "listens", more: "listen", sign: "●" },
  slow: { one: "hears, does not read", more: "hear, do not read", sign: "◐" },
  deaf: { one: "does not hear", more: "do not hear", sign: "▲" },
  sends: { one: "only sends", more: "only send", sign: "►" },
  away: { one: "is away", more: "are away", sign: "○" },
  queue: { one: "queue", more: "queues", sign: "▤" },
  mail: { one: "with mail for you", more: "with mail for you", sign: "✉" },
};

// A name as people see it. It may be on several channels, where different agents may have it.
const labelOf = ({ channel, name }) => (channel === "default" ? name : `${channel}/${name}`);

// One row for each name and channel, trouble first, then by name: rows must not move while somebody aims at one.
export function agents() {
  const rows = bus.agents.filter(agent => !isDead(agent.name))
    .map(agent => ({ ...agent, state: stateOf(agent), label: labelOf(agent) }));
  return rows.sort((a, b) => a.state.rank - b.state.rank || (a.label < b.label ? -1 : a.label > b.label ? 1 : 0));
}

export const inTrouble = rows => rows.filter(row => row.state.rank < 2);

export const failedJobs = () => bus.agents.reduce((sum, agent) => sum + (agent.work?.dead || 0), 0);

// What needs a look, in the order of urgency: {kind, title, words, to} each.
export function troubles(rows) {
  const found = [];
  const mine = rows.find(row => row.state.kind === "mail");
  if (mine) found.push({ kind: "mail", title: `${many(mine.unread, "message")} for you`,
    words: `sent to ${mine.name}, and not read yet`, to: "#/mail" });
  for (const [pair, number] of storms()) {
    const [from, to] = pair.split(" ");
    found.push({ kind: "deaf", title: `${from} floods ${to}`, words: `${number} messages in ${STORM_SECONDS} s`,
      to: `#/messages/${from}/${to}` });
  }
  found.push(...some(rows, "deaf", "does not hear", "do not hear"));
  found.push(...some(rows, "slow", "does not read", "do not read"));
  for (const row of rows) {
    if (row.work && row.unread && !row.work.workers && !row.online) {
      found.push({ kind: "deaf", title: `${row.label} has no worker`,
        words: `${many(row.unread, "job")} ${row.unread === 1 ? "waits" : "wait"} for one`, to: "#/work" });
    }
    if (row.work?.dead) {
      found.push({ kind: "deaf", title: `${many(row.work.dead, "job")} of ${row.label} failed`,
        words: "given up after all attempts", to: "#/work" });
    }
  }
  return found;
}

function some(rows, kind, one, more) {
  const its = inTrouble(rows).filter(row => row.state.kind === kind), most = its.length > 4 ? 2 : 4;
  const cards = its.slice(0, most).map(row => ({ kind, title: `${row.label} ${one}`, words: row.state.words,
    to: `#/agents/${row.name}` }));
  const rest = its.slice(most);
  if (rest.length) cards.push({ kind, title: `and ${rest.length} more ${more}`,
    words: rest.slice(0, 4).map(row => row.label).join(", ") + " …", to: "#/agents" });
  return cards;
}

function storms() {
  const counts = new Map(), from = now() - STORM_SECONDS;
  for (const message of bus.messages) {
    if (message.ts < from) break;
    const pair = `${message.from} ${message.to}`;
    counts.set(pair, (counts.get(pair) || 0) + 1);
  }
  return [...counts].filter(([, number]) => number >= STORM);
}

// How many messages each name said in each of the last minutes, the oldest first, as far as they are loaded.
export function minutesByName(count) {
  const found = new Map(), end = now();
  for (const message of bus.messages) {
    const at = count - 1 - Math.floor((end - message.ts) / 60);
    if (at < 0) break;
    if (at >= count) continue;
    if (!found.has(message.from)) found.set(message.from, new Array(count).fill(0));
    found.get(message.from)[at] += 1;
  }
  return found;
}

// Who talked to whom in so many minutes: [{from, to, n}], the busiest first.
export function pairs(count) {
  const found = new Map(), from = now() - count * 60;
  for (const message of bus.messages) {
    if (message.ts < from) break;
    if (message.to === "all") continue;
    const key = `${message.from} ${message.to}`;
    const pair = found.get(key) || { from: message.from, to: message.to, n: 0 };
    pair.n += 1;
    found.set(key, pair);
  }
  return [...found.values()].sort((a, b) => b.n - a.n || (a.from + a.to < b.from + b.to ? -1 : 1));
}

// A filter as a person types it: words, from:NAME, to:NAME, #CHANNEL.
export function wanted(text) {
  const tests = text.trim().toLowerCase().split(/\s+/).filter(Boolean).map(word => {
    if (word.startsWith("from:")) return message => message.from.toLowerCase().startsWith(word.slice(5));
    if (word.startsWith("to:")) return message => message.to.toLowerCase().startsWith(word.slice(3));
    if (word.startsWith("#")) return message => message.channel.toLowerCase() === word.slice(1);
    return ({ from, to, subject = "", msg }) => `${from} ${to} ${shown(subject)} ${msg}`.toLowerCase().includes(word);
  });
  return message => tests.every(test => test(message));
}

// The rows of messages: a send to a list is one row, and many of one pair in one minute are one row, until `unfolded`
// has them.
export function rows(messages, unfolded) {
  const lists = [];
  for (const message of messages) {
    const last = lists.at(-1);
    if (last && isCopy(last.message, message, last.to.length)) last.to.unshift(message.to);
    else lists.push({ key: message.id, message, to: [message.to] });
  }
  const counts = new Map();
  const keyOf = row => `${row.message.from} ${row.to} ${Math.floor(row.message.ts / 60)}`;
  for (const row of lists) counts.set(keyOf(row), (counts.get(keyOf(row)) || 0) + 1);
  const folded = new Set();
  return lists.filter(row => {
    const key = keyOf(row), number = counts.get(key);
    if (number < FOLD || unfolded.has(key)) return true;
    if (folded.has(key)) return false;
    folded.add(key);
    Object.assign(row, { fold: key, number });
    return true;
  });
}

// The copies of a send to a list have ticks that follow each other: microseconds, which a float of today just holds.
const isCopy = (one, other, copies) =>
  one.from === other.from && one.msg === other.msg && one.subject === other.subject && one.to !== other.to &&
  Math.abs(one.ts - other.ts - copies * 0.000001) < 0.0000007;

// What became of a message, in words
export function told(receiver, to) {
  if (!receiver) return "Stored.";
  const { online, offline } = receiver;
  if (typeof online === "number") {
    const unknown = Object.keys(receiver.unknown ?? {}).map(name => ` Nobody has ever listened as ${name}.`).join("");
    return `Stored. ${online} listen now, ${offline} will see it later.${unknown}`;
  }
  if (online) return `Sent: ${to} is listening.`;
  const similar = receiver.similar?.length ? ` Did you mean ${receiver.similar.join(" or ")}?` : "";
  return receiver.known === false ? `Stored, but nobody has ever listened as ${to}.${similar}`
    : `Stored. ${to} does not listen now; ${many(receiver.unread, "message waits", "messages wait")}.`;
}
