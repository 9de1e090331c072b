// What the page knows of the bus: it asks, keeps the answers, and tells who wants to know. It draws nothing.

export const MOST = 10000, LETTERS = 32e6; // messages in memory, and letters of them
const PAGE = 500, OLDER = 300; // messages of the first look, and of each look further back
const NAMES = 300; // of one answer: the bus takes some 2 ms for it
const GAP = 250, BEHIND = 1000, HIDDEN_GAP = 2000; // ms between two answers of the log
const LOOK = 3000, HIDDEN_LOOK = 30000; // ms between two looks at who is there
const SHARE = 30; // and at least so many times as long as the last look took: of very many names it takes a while
const HOLD = 25, PATIENCE = 40000; // s that the bus may hold an answer; ms after which it counts as away
const KEY = "agent-bus token", NAME = "agent-bus name", MAIL = "agent-bus mail of", HIDE = "the tab is hidden";

export const bus = {
  phase: "start", // start, live, away, token; the change is told as "phase", or as "another" if it is another bus
  me: { name: null, operator: true, send_only: false, open: true, reads: [] },
  messages: [], // newest first
  next: null, // below which ts the older ones begin; null: there are none
  capped: false, // older messages were dropped from memory
  agents: [], // as /agents has them
  minutes: [], // as /activity has them; none, if the token may not see them
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

class Refused extends Error {
  constructor(status, sentence) {
    super(sentence);
    this.status = status;
  }
}

// One request. Throws Refused with the sentence of the bus, or with the status 0 if there was no answer.
export async function ask(path, body, signal) {
  const headers = { "X-Agent-Page": "1", ...(token && { Authorization: `Bearer ${token}` }) }; // no page elsewhere can say so
  const options = { headers, signal, credentials: "omit", redirect: "error", cache: "no-store",
    referrerPolicy: "no-referrer" };
  if (body) Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  const answer = await fetch(`../${path}`, options).catch(() => {
    throw new Refused(0, "The bus is out of reach.");
  });
  const date = Date.parse(answer.headers.get("Date"));
  if (date && Math.abs(date / 1000 - now()) > 2) bus.skew = date / 1000 - Date.now() / 1000;
  const found = await answer.json().catch(() => ({}));
  if (answer.ok) return found;
  throw new Refused(answer.status, found.error || `the bus answered ${answer.status}`);
}

export const isMine = given => !token || token === given;

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
    const another = id !== null && id !== log.bus;
    if (another) {
      Object.assign(bus, { notice: "This is another bus, or its database was replaced: all is shown anew.", mail: [] });
      seen = null;
    }
    if (another) bus.messages = [];
    newest(log);
    id = log.bus;
    bus.phase = "live";
    bus.away.tries = 0;
    tell(another ? "another" : "phase");
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
  bus.away = { tries, until: Date.now() + patience * 1000, why: error.message };
  bus.phase = "away";
  stop();
  tell("phase");
  const again = session;
  setTimeout(() => again === session && start(), patience * 1000);
}

// The newest messages. Returns whether they reach to those that are known; if not, these are dropped, and come again as
// the older ones.
function newest(log) {
  const reaches = log.next == null || (bus.messages[0]?.ts ?? 0) >= log.next;
  if (!reaches) Object.assign(bus, { messages: [], next: log.next, capped: false });
  add(log);
  since = log.now;
  return reaches;
}

async function followLog(mine) {
  let behind = false; // more is said than can be followed: then the newest are enough, once a second
  while (mine === session) {
    const hidden = document.hidden, began = Date.now();
    held = new AbortController();
    const patience = setTimeout(() => held.abort(), PATIENCE);
    try {
      const fresh = `since=${since}&max=1000&${hidden ? "wait=0" : `block=true&wait=${HOLD}`}`;
      const answer = await ask(`log?${behind ? `before=now&max=${PAGE}` : fresh}`, null, held.signal);
      if (mine !== session) return;
      if (answer.bus !== id) return start();
      if (answer.gap) bus.notice = "Some messages were removed before this page had seen them.";
      if (behind) behind = !newest(answer);
      else {
        behind = answer.more && answer.messages.length >= PAGE;
        since = answer.now;
        add(answer);
      }
      if (answer.messages.length) tell("messages");
    } catch (error) {
      if (mine === session && held.signal.reason === HIDE) continue;
      if (mine === session) failed(error, mine);
      return;
    } finally {
      clearTimeout(patience);
    }
    await pause(Math.max(0, (hidden ? HIDDEN_GAP : behind ? BEHIND : GAP) - (Date.now() - began)));
  }
}

async function followAgents(mine) {
  for (let took = 0; mine === session;) {
    await pause(Math.max(document.hidden ? HIDDEN_LOOK : LOOK, SHARE * took));
    if (mine !== session) return;
    const began = Date.now();
    try {
      await Promise.all([look(), fetchMail()]);
      tell("agents");
    } catch (error) {
      if (error.status === 401 && mine === session) failed(error, mine); // else the log's loop finds out
    }
    took = Date.now() - began;
  }
}

const pause = ms => new Promise(done => setTimeout(done, ms));

// Who is there, and the last minutes in figures.
async function look() {
  const figures = bus.me.operator ? ask("activity").catch(() => ({ minutes: [] })) : { minutes: [] };
  const agents = [];
  for (let after = ""; after != null;) {
    const answer = await ask(`agents?max=${NAMES}${after && `&after=${encodeURIComponent(after)}`}`);
    agents.push(...answer.agents);
    after = answer.more ? answer.next : null;
  }
  Object.assign(bus, { agents, minutes: (await figures).minutes });
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

const letters = new WeakMap(); // of each message: a text has up to 262,144

// Messages of an answer into the list, which has the newest first.
function add(answer) {
  const known = new Set(bus.messages.map(message => message.id));
  const fresh = answer.messages.filter(message => !known.has(message.id));
  for (const message of fresh) letters.set(message, JSON.stringify(message).length);
  const all = [...fresh, ...bus.messages].sort((one, other) => other.ts - one.ts);
  let sum = 0;
  const end = all.findIndex((message, number) => number === MOST || (sum += letters.get(message)) > LETTERS);
  bus.messages = end < 0 ? all : all.slice(0, end);
  bus.capped = bus.capped || end >= 0;
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
      add(answer);
      tell("older");
    }
  } catch (error) {
    if (error.status) bus.next = null;
  } finally {
    reaching = false;
  }
}

// Send, and try again with the same key while it is not known whether the bus has it.
export async function send(message) {
  const hex = (number, digits) => number.toString(16).padStart(digits, "0");
  const random = [...crypto.getRandomValues(new Uint8Array(8))].map(byte => hex(byte, 2)).join("");
  const key = hex(Date.now(), 12) + random;
  for (let tries = 0; ; tries += 1) {
    try {
      return await ask("send", { ...message, key });
    } catch (error) {
      const passes = error.status === 0 || error.status === 429 || error.status >= 500;
      if (!passes || tries === 4) throw error;
      await pause(500 * 2 ** tries);
    }
  }
}

// A hidden tab holds no request: a browser gives all its tabs six connections to one bus.
document.addEventListener("visibilitychange", () => document.hidden && held?.abort(HIDE));
