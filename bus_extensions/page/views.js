// The views: each is {node, update(what)}. They read `bus`, and change nothing but their own nodes.

import { MOST, ask, bus, now, older, speaks } from "./bus.js";
import { badge, clock, fill, h, many, plain, shown, span } from "./dom.js";
import { bars, pairsTable, ring } from "./draw.js";
import { List } from "./list.js";
import * as look from "./look.js";

const phone = matchMedia("(max-width: 700px)");
const high = () => (phone.matches ? 68 : 46);
export const words = error => error.message || "the bus is out of reach";

export const link = (path, ...children) => h("a", { href: `#/${path}` }, children);
const mark = kind => h("span", { class: `mark ${kind}`, "aria-hidden": "true" }, look.WORDS[kind]?.sign ?? "✉");
export const card = (title, aside, ...children) => h("section", { class: "card" },
  h("header", {}, h("h2", {}, title), h("p", { class: "dim" }, aside)), children);

// A button that asks the bus to do something with a row or a message. `told` gets what came of it, as a sentence; `then`
// is called when it was done. An action is {title, sure, ask, done}, as place.js describes it.
export function doing(action, row, told, then = () => {}) {
  const { title, sure, done = () => `${title}: done.` } = action;
  let warned = !sure;
  const button = h("button", { type: "button", onclick: press }, title);
  async function press() {
    if (!warned) {
      warned = true;
      return told(`${sure} Press ${title} again to do it.`);
    }
    button.disabled = true;
    try {
      told(done(row, await ask(...action.ask(row, speaks()))));
      then();
    } catch (error) {
      told(words(error));
    }
    button.disabled = false;
  }
  return button;
}

export const noteOfRights = () => {
  if (bus.me.send_only) return "This token may only send: you see what you sent yourself.";
  const reads = bus.me.reads.join(", ") || "nobody";
  const says = `You see who is there, and the mail of ${reads}. An operator's token shows everything.`;
  return bus.me.operator ? "" : says;
};

// Now

export function nowView({ say }) {
  const node = h("div", { class: "now" }), parts = {};
  let drawn = 0, timer = 0;
  const hovered = () => parts.ring?.matches(":hover, :focus-within");
  function draw() {
    drawn = Date.now();
    const rows = look.agents(), me = speaks();
    if (!bus.messages.length && !rows.length) {
      const unknown = h("p", { class: "quiet" }, "Nothing is known yet: the bus has not answered.");
      return fill(node, h("h1", { class: "only-spoken" }, "Now"), bus.phase === "live" ? empty(say) : unknown);
    }
    const pairs = look.pairs(30).filter(pair => !look.isDead(pair.to));
    const troubled = new Set(look.inTrouble(rows).map(row => row.name));
    if (!parts.trouble) {
      for (const part of ["trouble", "agents", "minutes", "ring", "said"]) parts[part] = h("div", { class: part });
      const pictures = h("div", {}, bus.me.operator && [parts.minutes, parts.ring]);
      const two = h("div", { class: "two" }, parts.agents, pictures);
      fill(node, h("h1", { class: "only-spoken" }, "Now"), parts.trouble, two, parts.said);
    }
    if (!parts.trouble.contains(document.activeElement)) fill(parts.trouble, troubleCards(look.troubles(rows, me)));
    if (!parts.agents.contains(document.activeElement)) fill(parts.agents, agentsCard(rows));
    if (bus.me.operator) {
      fill(parts.minutes, minutesCard());
      const who = () => card("Who talks to whom", "30 minutes", ring(pairs, troubled), pairsTable(pairs));
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
  const cell = ({ name, state }) => {
    const title = `${name}: ${state.words}`;
    return h("li", {}, h("a", { href: `#/agents/${name}`, class: `cell ${state.kind}`, title, "aria-label": title }));
  };
  const cells = rows.length > CELLS && h("ul", { class: "cells" }, rows.slice(0, 600).map(cell));
  const all = rows.length > CELLS && h("p", {}, link("agents", `all ${rows.length}`));
  return card(many(rows.length, "agent"), legend, cells,
    h("ul", { class: "agent-rows" }, worst.map(row => h("li", {}, agentRow(row, said.get(row.name))))), all);
}

const sum = numbers => numbers.reduce((a, b) => a + b, 0);

function agentRow(row, said) {
  return h("a", { class: "agent-row", href: `#/agents/${row.name}` }, badge(row.name),
    h("span", { class: "who" }, h("b", {}, row.name),
      h("span", { class: "dim line" }, mark(row.state.kind), " ", plain(row.state.words, 200))),
    said && bars(said, { width: 75, height: 22, label: `${many(sum(said), "message")} in 15 minutes` }),
    row.unread ? h("span", { class: "count" }, row.unread) : null);
}

function minutesCard() {
  const values = look.minutes(30), oldest = bus.messages.at(-1)?.ts;
  const since = bus.next != null && oldest && now() - oldest < 1800 ? `since ${clock(oldest)}: what was loaded`
    : "30 minutes";
  const label = `Messages in each of the last 30 minutes, now last: ${values.join(", ")}`;
  return card("Messages per minute", since, bars(values, { width: 520, height: 60, axis: true, label }),
    h("p", { class: "dim scale" }, h("span", {}, "30 min ago"), h("span", {}, `most: ${Math.max(...values)} a minute`),
      h("span", {}, "now")));
}

const toMessages = () => (location.hash = "#/messages");

function lastSaid() {
  const six = look.rows(bus.messages.slice(0, 200), new Set()).slice(0, 6);
  return six.length ? card("Last said", link("messages", "all messages"),
    h("div", { class: "plain-rows" }, six.map(row => h("div", { class: "row" }, messageRow(row, toMessages))))) : [];
}

const here = () => location.href.replace(/\/ui\/.*$/, ""); // the URL of the bus

function empty(say) {
  const url = here();
  const lines = [
    ["Say something from a shell", `curl -s '${url}/send?from=me&to=bob' --data-binary 'hello'`],
    ["Listen as bob", `curl -s '${url}/recv?to=bob&since=0&block=true'`],
    ["Or get the client, which reconnects and remembers",
      `curl -sO ${url}/bus_recv.py; AGENT_BUS_URL=${url} python3 bus_recv.py bob`],
  ];
  const who = bus.me.open ? "This bus has no tokens: whoever reaches this address may read and write everything."
    : "This bus has tokens: each program needs one of its own.";
  return card("Nothing was said yet", who, lines.map(([title, line]) => [h("h3", {}, title), command(line)]),
    h("p", {}, h("button", { class: "main", onclick: () => say() }, "Say something here")));
}

function command(line) {
  const copy = navigator.clipboard && h("button", { type: "button",
    onclick: () => navigator.clipboard.writeText(line) }, "Copy");
  return h("div", { class: "command" }, h("code", { tabindex: 0 }, line), copy);
}

// Messages

export function messageRow(row, unfold) {
  const { message } = row;
  const who = [badge(message.from), h("b", {}, message.from), " → ",
    h("span", { class: "dim" }, plain(row.to.join(", "), 60))];
  if (row.fold) {
    return h("button", { type: "button", class: "message-row", onclick: () => unfold?.(row.fold) },
      h("time", {}, clock(message.ts)), h("span", { class: "who" }, who),
      h("span", { class: "line" }, `${row.number} messages in this minute - show`));
  }
  const subject = message.subject ? h("b", {}, plain(shown(message.subject), 80), " ") : null;
  return h("a", { class: "message-row", href: `#/messages?id=${message.id}`, "data-id": message.id },
    h("time", {}, clock(message.ts)), h("span", { class: "who" }, who),
    h("span", { class: "line" }, message.priority === "high" && h("span", { class: "count" }, "high"), subject,
      plain(shown(message.msg), 300)));
}

export function messagesView({ spoken }) {
  const unfolded = new Set();
  let paused = false, frozen = null;
  const filter = h("input", { type: "search", id: "filter", placeholder: "Filter: words, from:alice, to:bob, #channel",
    "aria-label": "Filter", oninput: () => live() });
  const pause = h("button", { type: "button", "aria-pressed": "false", onclick: () => setPaused(!paused) }, "Pause");
  const toTop = () => {
    setPaused(false);
    list.node.scrollTop = 0;
    live();
  };
  const pill = h("button", { type: "button", class: "pill", hidden: true, onclick: toTop });
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
    const fresh = frozen ? bus.messages.findIndex(message => message.id === frozen[0]?.id) : 0;
    pill.hidden = fresh < 1;
    pill.textContent = many(fresh, "new message");
    if (fresh > 0) spoken(many(fresh, "new message"));
    const far = bus.capped ? `; ${MOST.toLocaleString("en")} are kept here, search further back with agent-bus log`
      : bus.next != null ? "; older ones come as you scroll" : ", from the first on";
    const some = filter.value ? `${many(list.items.length, "row")} of ` : "";
    if (bus.phase !== "live" && !bus.messages.length) foot.textContent = "nothing is loaded yet";
    else foot.textContent = `${some}${many(bus.messages.length, "message")} loaded${far}`;
  }
  function update(what) {
    if (what === "older" && frozen) {
      const last = bus.messages.findIndex(message => message.id === frozen.at(-1)?.id);
      frozen = [...frozen, ...bus.messages.slice(last + 1)];
    }
    if (what === "older" || !frozen) draw(frozen ?? bus.messages);
    else if (what === "messages") count();
  }
  function move(by) {
    const top = each => each.getBoundingClientRect().top;
    const all = [...list.node.querySelectorAll(".message-row")].sort((a, b) => top(a) - top(b));
    const at = all.indexOf(document.activeElement);
    const next = at < 0 ? all.find(each => top(each) >= top(list.node)) : all[at + by];
    next?.focus();
  }
  live();
  return { node, update, move, focus: () => filter.focus(), pause: () => setPaused(!paused) };
}

// Agents

export function agentsView() {
  const filter = h("input", { type: "search", id: "filter", placeholder: "Filter by name or state: dell, deaf, away",
    "aria-label": "Filter", oninput: () => update() });
  const list = new List({ label: "Agents, those in trouble first", draw: row => agentRow(row, null),
    height: () => 60 });
  const node = h("div", { class: "messages" }, h("h1", { class: "only-spoken" }, "Agents"),
    h("div", { class: "tools" }, filter), list.node);
  function update(what) {
    if (what === "messages" || what === "older") return;
    const text = filter.value.trim().toLowerCase();
    const rows = look.agents().filter(row => !text
      || `${row.name} ${row.state.kind} ${row.state.words}`.toLowerCase().includes(text));
    list.set(rows.map(row => ({ ...row, key: `${row.channel} ${row.name}`,
      mark: `${row.state.kind} ${row.state.words} ${row.unread}` })));
  }
  update();
  return { node, update, focus: () => filter.focus() };
}

export function agentView({ say }, name) {
  const node = h("div", { class: "agent" });
  function update(what) {
    if (what === "older" || (what && node.contains(document.activeElement))) return;
    const rows = look.agents().filter(row => row.name === name);
    const talked = look.pairs(24 * 60).filter(pair => pair.from === name || pair.to === name).slice(0, 12);
    const stateCard = row => card(row.channel === "default" ? "State" : `On channel ${row.channel}`,
      [mark(row.state.kind), " ", plain(row.state.words, 600)], details(row), help(row));
    const nobody = () => card("State", "", h("p", {}, `Nobody has listened as ${name} or sent as ${name}.`));
    const line = ({ from, to, n }) =>
      h("li", {}, link(`messages/${from}/${to}`, `${from} → ${to}`), ` ${many(n, "message")}`);
    fill(node, h("h1", {}, badge(name), " ", name),
      h("p", {}, h("button", { class: "main", onclick: () => say({ to: name }) }, `Say something to ${name}`)),
      rows.length ? rows.map(stateCard) : nobody(),
      talked.length ? card("Whom it talks with", "what was loaded", h("ul", {}, talked.map(line))) : null);
  }
  update();
  return { node, update };
}

function details(row) {
  const rows = [
    ["unread", row.unread],
    ["address", row.address],
    ["programs that read it", row.readers > 1 && `${row.readers}: they take each other's mail`],
    ["folder", row.status?.cwd],
    ["branch", row.status?.branch],
    ["last sent", row.sent && `${span(now() - row.sent)} ago`],
  ].filter(([, value]) => value);
  return h("dl", {}, rows.map(([title, value]) => [h("dt", {}, title), h("dd", {}, plain(shown(value), 300))]));
}

function help(row) {
  if (row.state.kind !== "deaf") return null;
  return [h("h3", {}, "What may help"), h("p", {},
    `Nobody listens as ${row.name}. On its machine, this reads its mail:`),
    command(`AGENT_BUS_URL=${here()} python3 bus_recv.py ${row.name}`)];
}

// Work

export function workView() {
  const node = h("div", { class: "work" }), result = h("p", { class: "dim", role: "status" });
  let asked = 0, failed = [];
  async function fetchLetters() {
    const found = [];
    for (const { name, channel } of look.agents().filter(row => row.work?.dead)) {
      const answer = await ask(`log?before=now&to=${name}.dead&channel=${channel}&max=50`).catch(() => null);
      found.push(...(answer?.messages ?? []));
    }
    failed = found;
    draw();
  }
  const told = text => (result.textContent = text);
  function draw() {
    const queues = look.agents().filter(row => row.work);
    fill(node, h("h1", { class: "only-spoken" }, "Work"),
      queues.length ? h("ul", { class: "cards" }, queues.map(queueCard)) : h("p", { class: "quiet" }, NO_QUEUE),
      failed.length ? card(many(failed.length, "failed job"), GIVEN_UP, failed.map(letterOf)) : null, result);
  }
  function letterOf(letter) {
    const { from, attempts, ts, msg, id, reason = "no reason was given" } = letter;
    return h("article", { class: "letter" },
      h("p", {}, badge(from), " ", h("b", {}, queueOf(letter)),
        h("span", { class: "dim" }, ` from ${from} · ${many(attempts, "attempt")} · ${clock(ts)}`)),
      h("p", { class: "problem" }, plain(shown(reason), 500)), h("p", {}, plain(shown(msg), 500)),
      h("p", {}, doing(AGAIN, letter, told, fetchLetters), " ",
        h("a", { href: `#/messages?id=${id}` }, "details")));
  }
  function update(what) {
    if (what === "messages" || what === "older" || node.contains(document.activeElement)) return;
    draw();
    if (Date.now() - asked > 2500) {
      asked = Date.now();
      fetchLetters();
    }
  }
  update();
  return { node, update };
}

const NO_QUEUE = "No queue has jobs. A worker makes one: agent-bus work NAME --exec COMMAND";
const GIVEN_UP = "given up after all attempts; they wait for you";
const queueOf = letter => letter.to.replace(/\.dead$/, "");
const AGAIN = {
  title: "Send again", ask: ({ id }) => ["again", { id }],
  done: letter => `Sent again: it waits for a worker of ${queueOf(letter)}.`,
};

function queueCard(row) {
  const { in_hand, dead, workers } = row.work, waiting = row.unread || 0;
  const numbers = [["waiting", waiting], ["in hand", in_hand], ["failed", dead]];
  const bar = h("div", { class: "bar-of-three", "aria-hidden": "true" }, numbers.map(([title, number]) => {
    const part = h("span", { class: title.replace(" ", "-") });
    part.style.flexGrow = number;
    return number ? part : null;
  }));
  const one = ([title, number]) =>
    h("div", { class: title.replace(" ", "-") }, h("dt", {}, title), h("dd", {}, number));
  const who = [mark(workers ? "listening" : "away"), ` ${workers ? many(workers, "worker") : "no worker"}`];
  return h("li", { class: "card" }, h("header", {}, h("h2", {}, row.name), h("p", { class: "dim" }, who)), bar,
    h("dl", { class: "numbers" }, numbers.map(one)));
}
