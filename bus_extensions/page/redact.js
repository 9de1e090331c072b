// The place of redact.py: beside a message, a button that takes its text away.

import { bus } from "./bus.js";

export default {
  onMessage: [{
    title: "Redact",
    may: () => bus.me.operator,
    sure: "The text goes from the bus and from its disk, for everybody and for ever.",
    ask: message => ["redact", { id: message.id }],
    changes: answer => answer.redacted.map(({ id }) => id), // the copies of a list, and of a failed job, are redacted too
    done: (message, answer) => `Redacted. Fetched by ${answer.fetched_by.join(", ") || "nobody"}; ${answer.warning}.`,
  }],
};
