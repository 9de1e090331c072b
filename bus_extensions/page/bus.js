// What the page knows of the bus, and who is told when that changes. Nothing is asked here (follow.js), nothing drawn.

const MOST = 10000; // messages in memory
const LETTERS = 32e6; // in memory, of the messages of one list: a text has up to 262,144
const NAME = "agent-bus name";

export const bus = {
  id: null, // of its database
  phase: "start", // start, live, away, token; the change is told as "phase", or as "another" if it is another bus
  me: { name: null, operator: true, send_only: false, open: true, reads: [] },
  messages: [], // newest first
  next: null, // below which ts the older ones begin; null: there are none
  capped: false, // older messages were dropped from memory
  agents: [], // as /agents has them
  minutes: [], // as /activity has them; none, if the token may not see them
  notice: "", // what the person should know of this session: messages are gone, another database
  away: { tries: 0, until: 0, why: "" },
  refused: "", // why the token was refused
  mail: [], // the person's own, the oldest first: what is unread, and what was read here
};

let listener = null;
export const watch = its => (listener = its);

// "phase", "another", "messages", "older", "changed" (something was done with a message here), "agents"
export function tell(what) {
  try {
    listener(what);
  } catch (error) {
    reportError(error); // a fault of a view: the bus is not out of reach
  }
}

export const speaks = () => bus.me.name || sessionStorage.getItem(NAME) || "";
export const callMe = name => sessionStorage.setItem(NAME, name);
export const names = () => [...new Set(bus.agents.map(agent => agent.name))].sort();

const letters = new WeakMap();

function lettersOf(message) {
  if (!letters.has(message)) letters.set(message, JSON.stringify(message).length);
  return letters.get(message);
}

// The first of these messages: at most so many, and so many letters.
export function fitting(messages, most) {
  let sum = 0;
  const end = messages.findIndex((message, at) => at === most || (sum += lettersOf(message)) > LETTERS);
  return end < 0 ? messages : messages.slice(0, end);
}

// Messages of an answer into the list, as far as they fit.
export function add(messages) {
  const known = new Set(bus.messages.map(message => message.id));
  const all = [...messages.filter(message => !known.has(message.id)), ...bus.messages];
  bus.messages = fitting(all.sort((one, other) => other.ts - one.ts), MOST);
  bus.capped = bus.capped || bus.messages.length < all.length;
}

const changes = new Map(); // id of a message with which something was done here: [it as it is now], or []

// These messages as they are now, without those that are gone.
export const asTheyAre = messages => messages.flatMap(message => changes.get(message.id) ?? message);

export function change(id, now) {
  changes.set(id, now);
  Object.assign(bus, { messages: asTheyAre(bus.messages), mail: asTheyAre(bus.mail) });
}
