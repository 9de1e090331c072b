// The view Agents, and that of one agent.

import { ask, now } from "./ask.js";
import { bus } from "./bus.js";
import { badge, button, fill, h, many, plain, shown, span, sum } from "./dom.js";
import { bars, presence } from "./draw.js";
import { List } from "./list.js";
import * as look from "./look.js";
import { say } from "./say.js";
import { busUrl, card, command, link, mark } from "./views.js";

export function agentRow(row, said) {
  return h("a", { class: "agent-row", href: `#/agents/${row.name}` }, badge(row.name),
    h("span", { class: "who" }, h("b", {}, row.label),
      h("span", { class: "dim line" }, mark(row.state.kind), " ", plain(row.state.words, 200))),
    said && bars(said, { width: 75, height: 22, label: `${many(sum(said), "message")} in 15 minutes` }),
    row.unread ? h("span", { class: "count" }, row.unread) : null);
}

export function agentsView() {
  const filter = h("input", { type: "search", id: "filter", placeholder: "Filter by name, channel or state: dell, deaf",
    "aria-label": "Filter", oninput: () => update() });
  const list = new List({ label: "Agents, those in trouble first", draw: row => agentRow(row, null),
    height: () => 60 });
  const node = h("div", { class: "messages" }, h("h1", { class: "only-spoken" }, "Agents"),
    h("div", { class: "tools" }, filter), list.node);
  function update(what) {
    if (what === "messages" || what === "older") return;
    const text = filter.value.trim().toLowerCase();
    const rows = look.agents().filter(row => !text
      || `${row.label} ${row.state.kind} ${row.state.words}`.toLowerCase().includes(text));
    list.set(rows.map(row => ({ ...row, key: `${row.channel} ${row.name}`,
      mark: `${row.state.kind} ${row.state.words} ${row.unread}` })));
  }
  update();
  return { node, update, focus: () => filter.focus() };
}

export function agentView(name) {
  const node = h("div", { class: "agent" }), digits = new Map(); // of each channel
  let asked = 0;
  async function fetchPresence(rows) {
    asked = Date.now();
    for (const { channel } of rows) {
      const answer = await ask(`activity?name=${name}&channel=${channel}`).catch(() => null);
      digits.set(channel, answer?.presence[name]);
    }
    update("agents");
  }
  function update(what) {
    if (what === "older" || (what && node.contains(document.activeElement))) return;
    const rows = look.agents().filter(row => row.name === name);
    if (bus.me.operator && Date.now() - asked > 10000) fetchPresence(rows);
    const talked = look.pairs(24 * 60).filter(pair => pair.from === name || pair.to === name).slice(0, 12);
    const stateCard = row => card(row.channel === "default" ? "State" : `On channel ${row.channel}`,
      [mark(row.state.kind), " ", plain(row.state.words, 600)], details(row),
      row.listens && digits.get(row.channel) && presence(digits.get(row.channel)), help(row));
    const nobody = () => card("State", "", h("p", {}, `Nobody has listened as ${name} or sent as ${name}.`));
    const line = ({ from, to, n }) =>
      h("li", {}, link(`messages/${from}/${to}`, `${from} → ${to}`), ` ${many(n, "message")}`);
    fill(node, h("h1", {}, badge(name), " ", name),
      h("p", {}, button(`Say something to ${name}`, () => say({ to: name }), { class: "main" })),
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
    command(`AGENT_BUS_URL=${busUrl()} python3 bus_recv.py ${row.name}`)];
}
