// The place of later.py: what is to be sent later, and what could not be.

import { clock, day } from "./dom.js";

const when = ({ at }) => `${day(at)}, ${clock(at)}`;

export default {
  title: "Schedules",
  says: "messages that the bus sends later, and those that it could not send",
  path: "later",
  rows: answer => answer.schedules,
  columns: {
    when,
    repeats: row => (row.cron ? `${row.cron} (UTC)` : ""),
    from: row => row.message.from,
    to: row => [row.message.to].flat().join(", "),
    text: row => row.message.msg,
    state: row => (row.reason ? `${row.state}: ${row.reason}` : row.state),
  },
  actions: [{
    title: "Take back",
    sure: "The message is not sent then.",
    ask: row => ["later", { cancel: row.id }],
    done: row => `taken back: the message to ${[row.message.to].flat().join(", ")}`,
  }],
};
