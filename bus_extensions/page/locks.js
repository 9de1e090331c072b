// The place of reservations: who holds which names. place.js says what the members are.

import { now } from "./ask.js";
import { bus } from "./bus.js";
import { clock, span } from "./dom.js";

const left = row => `${span(Number(row.until) - now())}, until ${clock(row.until)}`;

export default {
  title: "Reservations",
  says: "what agents are about to change, so that others leave it alone",
  path: "locks",
  rows: answer => answer.locks,
  columns: {
    holder: row => row.holder,
    channel: row => row.channel,
    names: row => row.names.join(" ") + (row.shared ? " (shared)" : ""),
    left,
    why: row => row.why,
    waits: row => row.waiting.join(", "),
  },
  actions: [{
    title: "Release",
    may: row => bus.me.open || bus.me.operator || row.holder === bus.me.name,
    sure: "The holder may be in the middle of a change.",
    ask: row => ["unlock", { fence: row.fence, ...(bus.me.open ? { from: row.holder } : {}) }],
    done: (row, answer) => `released: ${answer.released}`,
  }],
};
