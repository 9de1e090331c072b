// The place of notify.py: its rules, then the notices that could not be sent. Only an operator sees them.

import { clock, day } from "./dom.js";

const when = at => (at ? `${day(at)}, ${clock(at)}` : "never");
const state = row => row.reason ?? (row.waiting ? "to be sent" : `${row.sent} sent, ${row.failed} failed`);

export default {
  title: "Notices",
  says: "what people are told by webhooks, and what they could not be told",
  path: "notices",
  rows: answer => [...answer.rules, ...answer.dead],
  columns: {
    rule: row => row.rule,
    about: row => row.text ?? `${row.when}: ${row.to ?? "anybody"} on ${row.channel}`,
    last: row => when(row.at ?? row.last),
    state,
  },
};
