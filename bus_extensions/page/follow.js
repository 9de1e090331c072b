// What is asked of the bus: at the start, again and again, and when a person wants something.

import { ask, hasToken, takeToken } from "./ask.js";
import { add, bus, change, fitting, tell } from "./bus.js";
import { beginAnew, fetchMail, readNoMore } from "./mail.js";

const PAGE = 500, OLDER = 300; // messages of the first look, and of each look further back
const NAMES = 300; // of one answer: the bus takes some 2 ms for it
const GAP = 250, BEHIND = 1000, HIDDEN_GAP = 2000; // ms between two answers of the log
const LOOK = 3000, HIDDEN_LOOK = 30000; // ms between two looks at who is there
const SHARE = 30; // and at least so many times as long as the last look took: of very many names it takes a while
const HOLD = 25, PATIENCE = 40000; // s that the bus may hold an answer; ms after which it counts as away
const HIDE = "the tab is hidden";

let since = null, session = 0, held = null;

// The token is gone, and what it showed.
export function forgetToken(why) {
  takeToken("");
  readNoMore();
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
    const another = bus.id !== null && bus.id !== log.bus;
    if (another) {
      const notice = "This is another bus, or its database was replaced: all is shown anew.";
      Object.assign(bus, { notice, messages: [], mail: [] });
      beginAnew();
    }
    newest(log);
    Object.assign(bus, { id: log.bus, phase: "live" });
    bus.away.tries = 0;
    tell(another ? "another" : "phase");
    followLog(mine);
    followAgents(mine);
  } catch (error) {
    if (mine === session) failed(error);
  }
}

function failed(error) {
  if (error.status === 401) return forgetToken(hasToken() ? "The bus does not know this token." : "");
  const tries = bus.away.tries + 1, patience = 1000 * Math.min(30, 2 ** (tries - 1));
  bus.away = { tries, until: Date.now() + patience, why: error.message };
  bus.phase = "away";
  stop();
  tell("phase");
  const again = session;
  setTimeout(() => again === session && start(), patience);
}

// The newest messages. Returns whether they reach to those that are known; if not, these are dropped, and come again as
// the older ones.
function newest(log) {
  const reaches = log.next == null || (bus.messages[0]?.ts ?? 0) >= log.next;
  if (!reaches) Object.assign(bus, { messages: [], next: log.next, capped: false });
  add(log.messages);
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
      if (answer.bus !== bus.id) return start();
      if (answer.gap) bus.notice = "Some messages were removed before this page had seen them.";
      if (behind) behind = !newest(answer);
      else {
        behind = answer.more && answer.messages.length >= PAGE;
        since = answer.now;
        add(answer.messages);
      }
      if (answer.messages.length) tell("messages");
    } catch (error) {
      if (mine === session && held.signal.reason === HIDE) continue;
      if (mine === session) failed(error);
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
      await Promise.all([look(), fetchMail().catch(() => {})]); // the mail is asked for again with the next look
      tell("agents");
    } catch (error) {
      if (error.status === 401 && mine === session) failed(error); // else the log's loop finds out
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

let reaching = false;
// Further back. Does nothing while one such look is under way, at the beginning of the log, and when memory is full.
export async function older() {
  if (reaching || bus.next == null || bus.capped || bus.phase !== "live") return;
  reaching = true;
  const mine = session;
  try {
    const answer = await ask(`log?before=${bus.next}&max=${OLDER}`);
    if (mine === session) {
      bus.next = answer.next;
      add(answer.messages);
      tell("older");
    }
  } catch (error) {
    if (error.status) bus.next = null;
  } finally {
    reaching = false;
  }
}

const ANSWERS = 40; // for one look: the bus passes over 5,000 messages for each, so of a million it takes a while

// The newest messages that a query wants, so many at most. The bus may need several answers to come to them.
export async function newestOf(query, most) {
  let found = [], before = "now";
  for (let asked = 0; before != null && found.length < most && asked < ANSWERS; asked += 1) {
    const answer = await ask(`log?before=${before}&${query}&max=${most - found.length}`);
    const all = [...found, ...answer.messages];
    found = fitting(all, most);
    before = found.length < all.length ? null : answer.next;
  }
  return found;
}

// Something was done with these messages: what the page keeps of them is asked for anew.
export async function renew(ids) {
  await Promise.all(ids.map(async id => {
    const { message } = await ask(`message/${id}`).catch(() => ({}));
    change(id, message?.msg === undefined ? [] : [message]);
  }));
  tell("changed");
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
