// The person's own mail. The page reads it only after the person asked for that: else it would take the mail of an
// agent with the same token. The cursor it presents moves when the mail was on a screen (`sawMail`): what has only
// arrived is fetched, and what was seen is acknowledged.

import { ask } from "./ask.js";
import { bus, fitting, speaks, tell } from "./bus.js";

const READS = "agent-bus mail of", MOST = 1000; // messages

let seen = null; // ts; null: begin where the reader of this name has ended

export const readsMail = () => speaks() !== "" && sessionStorage.getItem(READS) === speaks();
export const isNew = message => seen === null || message.ts > seen;

// For another bus, and for another token: what was read here was not theirs.
export const beginAnew = () => (seen = null);
export const readNoMore = () => sessionStorage.removeItem(READS);

export async function readMail() {
  sessionStorage.setItem(READS, speaks());
  await fetchMail().catch(error => {
    readNoMore();
    throw error;
  });
  tell("agents");
}

export async function fetchMail() {
  if (!readsMail() || bus.me.send_only || !bus.id) return;
  const answer = await ask(`recv?to=${speaks()}&since=${seen ?? "last"}&bus=${bus.id}&max=100&wait=0`);
  const known = new Set(bus.mail.map(message => message.id));
  const all = [...bus.mail, ...answer.messages.filter(message => !known.has(message.id))];
  bus.mail = fitting(all.reverse(), MOST).reverse();
  if (!answer.messages.length) seen = answer.now;
}

// The mail up to this message was before the person's eyes.
export function sawMail(message) {
  if (!document.hidden && isNew(message)) seen = message.ts;
}
