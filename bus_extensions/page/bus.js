// What the page knows of the bus: it asks, keeps the answers, and tells who wants to know. It draws nothing.

export const MOST = 10000; // messages in memory
const PAGE = 500, OLDER = 300; // messages of the first look, and of each look further back
const GAP = 250, HIDDEN_GAP = 2000; // ms between two answers of the log
const LOOK = 3000, HIDDEN_LOOK = 30000; // ms between two looks at who is there
const HOLD = 25, PATIENCE = 40000; // s that the bus may hold an answer; ms after which it counts as away
const KEY = "agent-bus token", NAME = "agent-bus name", MAIL = "agent-bus mail of", HIDE = "the tab is hidden";

export const bus = {
  phase: "start", // start, live, away, token
  me: { name: null, operator: true, send_only: false, open: true, reads: [] },
  messages: [], // newest first
  next: null, // below which ts the older ones begin; null: there are none
  capped: false, // older messages were dropped from memory
  agents: [], // as /agents has them, with those that only have mail
  skew: 0, // s that the clock of the bus is ahead of this one
  notice: "", // what the person should know of this session: messages are gone, another database
  away: { until: 0, why: "" },
  refused: "", // why the token was refused
  mail: [], // the person's own, the oldest first: what is unread, and what was read here
};

const listeners = new Set();
export const watch = listener => listeners.add(listener);
const tell = what => listeners.forEach(listener => listener(what));

let token = sessionStorage.getItem(KEY) || "", id = null, since = null, session = 0, held = null;

export const now = () => Date.now() / 1000 + bus.skew;
export const speaks = () => bus.me.name || sessionStorage.getItem(NAME) || "";
export const callMe = name => sessionStorage.setItem(NAME, name);
export const names = () => [...new Set(bus.agents.map(agent => agent.name))].sort();

export class Refused extends Error {
  constructor(status, sentence) {
    super(sentence);
    this.status = status;
  }
}

// One request. Throws Refused with the sentence of the bus, or TypeError if the bus is out of reach.
export async function ask(path, body, signal) {
  const headers = { "X-Agent-Page": "1", ...(token && { Authorization: `Bearer ${token}` }) }; // no page elsewhere can say so
  const options = { headers, signal, credentials: "omit", redirect: "error", cache: "no-store",
    referrerPolicy: "no-referrer" };
  if (body) Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  const answer = await fetch(`../${path}`, options);
  const date = Date.parse(answer.headers.get("Date"));
  if (date && Math.abs(date / 1000 - now()) > 2) bus.skew = date / 1000 - Date.now() / 1000;
  const found = await answer.json().catch(() => ({}));
  if (answer.ok) return found;
  throw new Refused(answer.status, found.error || `the bus answered ${answer.status}`);
}

export function takeToken(given) {
  token = given;
  sessionStorage.setItem(KEY, given);
}

export function forgetToken(why) {
  sessionStorage.removeItem(KEY);
  sessionStorage.removeItem(MAIL);
  token = "";
  Object.assign(bus, { phase: "token", refused: why, messages: [], agents: [], mail: [], next: null });
  stop();
  tell("phase");
}

function stop() {
  session += 1;
  held?.abort();
}

// Begin, or begin again: who am I, what was said last, who is there. Then both loops.
export async function start() {
  stop();
  const mine = session;
  try {
    bus.me = await ask("whoami").catch(no => {
      if (no.status === 404) return { ...bus.me, operator: true, open: true };
      throw no;
    });
    const [log] = await Promise.all([ask(`log?before=now&max=${PAGE}`), look()]);
    if (mine !== session) return;
    const kept = bus.messages.filter(message => message.bus === log.bus);
    if (id && id !== log.bus) {
      bus.notice = "This is another bus, or its database was replaced: all is shown anew.";
      Object.assign(bus, { mail: [] });
      seen = null;
    }
    const anew = !kept.length || kept[0].ts < (log.messages.at(-1)?.ts ?? 0);
    id = log.bus;
    bus.messages = anew ? [] : bus.messages;
    if (anew) bus.next = log.next ?? null;
    add(log.messages, log.bus);
    since = log.now;
    bus.phase = "live";
    bus.away.tries = 0;
    tell("phase");
    followLog(mine);
    followAgents(mine);
  } catch (error) {
    if (mine === session) failed(error, mine);
  }
}

function failed(error, mine) {
  if (error.status === 401) return forgetToken(token ? "The bus does not know this token." : "");
  const tries = (bus.away.tries || 0) + 1;
  const patience = Math.min(30, 2 ** (tries - 1));
  bus.away = { tries, until: Date.now() + patience * 1000, why: error instanceof Refused ? error.message : "" };
  bus.phase = "away";
  stop();
  tell("phase");
  const again = session;
  setTimeout(() => again === session && start(), patience * 1000);
}

async function followLog(mine) {
  while (mine === session) {
    const hidden = document.hidden, began = Date.now();
    held = new AbortController();
    const patience = setTimeout(() => held.abort(), PATIENCE);
    try {
      const wait = hidden ? "wait=0" : `block=true&wait=${HOLD}`;
      const answer = await ask(`log?since=${since}&max=1000&${wait}`, null, held.signal);
      if (mine !== session) return;
      if (answer.bus !== id) return start();
      if (answer.gap) bus.notice = "Some messages were removed before this page had seen them.";
      since = answer.now;
      if (answer.messages.length) {
        add(answer.messages.reverse(), answer.bus);
        tell("messages");
      }
    } catch (error) {
      if (mine === session && held.signal.reason === HIDE) continue;
      if (mine === session) failed(error, mine);
      return;
    } finally {
      clearTimeout(patience);
    }
    await pause(Math.max(0, (hidden ? HIDDEN_GAP : GAP) - (Date.now() - began)));
  }
}

async function followAgents(mine) {
  for (let turn = 0; mine === session; turn += 1) {
    await pause(document.hidden ? HIDDEN_LOOK : LOOK);
    if (mine !== session) return;
    try {
      await Promise.all([look(), fetchMail()]);
      tell("agents");
    } catch (error) {
      if (error.status === 401 && mine === session) failed(error, mine); // else the log's loop finds out
    }
  }
}

const pause = ms => new Promise(done => setTimeout(done, ms));

async function pages(path) {
  const answers = [];
  for (let after = ""; after != null;) {
    const answer = await ask(`${path}?max=1000${after && `&after=${encodeURIComponent(after)}`}`);
    answers.push(answer);
    after = answer.more ? answer.next : null;
  }
  return answers;
}

// Who is there. Names that have mail and never came are only in /inbox.
async function look() {
  const [agents, inbox] = await Promise.all([pages("agents"), bus.me.send_only ? [] : pages("inbox")]);
  const rows = agents.flatMap(answer => answer.agents);
  const known = new Set(rows.map(row => `${row.channel} ${row.name}`));
  for (const [channel, its] of inbox.flatMap(answer => Object.entries(answer.recipients))) {
    for (const [name, unread] of Object.entries(its)) {
      if (unread && !known.has(`${channel} ${name}`)) rows.push({ name, channel, online: false, listens: false,
        unread });
    }
  }
  bus.agents = rows;
}

// The person's own mail. The page reads it only after the person asked for that: else it would take the mail of an
// agent with the same token. The cursor it presents moves when the mail was on a screen (`sawMail`): what has only
// arrived is fetched, and what was seen is acknowledged.
let seen = null; // ts; null: begin where the reader of this name has ended

export const readsMail = () => Boolean(speaks()) && sessionStorage.getItem(MAIL) === speaks();

export async function readMail() {
  sessionStorage.setItem(MAIL, speaks());
  await fetchMail();
  tell("agents");
}

async function fetchMail() {
  if (!readsMail() || bus.me.send_only || !id) return;
  const answer = await ask(`recv?to=${speaks()}&since=${seen ?? "last"}&bus=${id}&max=100&wait=0`);
  const known = new Set(bus.mail.map(message => message.id));
  bus.mail = [...bus.mail, ...answer.messages.filter(message => !known.has(message.id))].slice(-1000);
  if (!answer.messages.length) seen = answer.now;
}

// The mail up to this message was before the person's eyes.
export function sawMail(message) {
  if (document.hidden || message.ts <= (seen ?? 0)) return;
  seen = message.ts;
}

export const isNew = message => seen === null || message.ts > seen;

// Messages, newest first, into the list, which is in the same order.
function add(found, from) {
  const known = new Set(bus.messages.slice(0, 2000).map(message => message.id));
  const fresh = found.filter(message => !known.has(message.id));
  fresh.forEach(message => (message.bus = from));
  bus.messages = [...fresh, ...bus.messages].sort((one, other) => other.ts - one.ts);
  if (bus.messages.length > MOST) {
    bus.messages.length = MOST;
    bus.capped = true;
  }
}

let reaching = false;
// Further back. Does nothing while one such look is under way, at the beginning of the log, and when memory is full.
export async function older() {
  if (reaching || bus.next == null || bus.messages.length >= MOST || bus.phase !== "live") return;
  reaching = true;
  const mine = session;
  try {
    const answer = await ask(`log?before=${bus.next}&max=${OLDER}`);
    if (mine === session) {
      bus.next = answer.next;
      answer.messages.forEach(message => (message.bus = answer.bus));
      bus.messages = [...bus.messages, ...answer.messages].slice(0, MOST);
      bus.capped = bus.messages.length === MOST;
      tell("older");
    }
  } catch (error) {
    if (!(error instanceof Refused)) return;
    bus.next = null;
  } finally {
    reaching = false;
  }
}

// Send, and try again with the same key while it is not known whether the bus has it.
export async function send(message) {
  const key = Date.now().toString(16).padStart(12,
    "0") + [...crypto.getRandomValues(new Uint8Array(8))].map(n => n.toString(16).padStart(2, "0")).join("");
  for (let tries = 0; ; tries += 1) {
    try {
      return await ask("send", { ...message, key });
    } catch (error) {
      const lasting = error instanceof Refused && error.status < 500 && error.status !== 429;
      if (lasting || tries === 4) throw error;
      await pause(500 * 2 ** tries);
    }
  }
}

// A hidden tab holds no request: a browser gives all its tabs six connections to one bus.
document.addEventListener("visibilitychange", () => document.hidden && held?.abort(HIDE));
