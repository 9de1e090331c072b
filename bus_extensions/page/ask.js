// One request to the bus, with the token of this tab, and the time of the bus.

const KEY = "agent-bus token";

let token = sessionStorage.getItem(KEY) || "", skew = 0; // s that the clock of the bus is ahead of this one

export const now = () => Date.now() / 1000 + skew;
export const hasToken = () => token !== "";
export const isMine = given => !token || token === given;

// From now on this token is sent; "" is none.
export function takeToken(given) {
  token = given;
  if (given) sessionStorage.setItem(KEY, given);
  else sessionStorage.removeItem(KEY);
}

class Refused extends Error {
  constructor(status, sentence) {
    super(sentence);
    this.status = status;
  }
}

// Throws Refused with the sentence of the bus, or with the status 0 if there was no answer.
export async function ask(path, body, signal) {
  const headers = { "X-Agent-Page": "1", ...(token && { Authorization: `Bearer ${token}` }) }; // no page elsewhere can say so
  const options = { headers, signal, credentials: "omit", redirect: "error", cache: "no-store",
    referrerPolicy: "no-referrer" };
  if (body) Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  const answer = await fetch(`../${path}`, options).catch(() => {
    throw new Refused(0, "The bus is out of reach.");
  });
  const date = Date.parse(answer.headers.get("Date"));
  if (date && Math.abs(date / 1000 - now()) > 2) skew = date / 1000 - Date.now() / 1000;
  const found = await answer.json().catch(() => ({}));
  if (answer.ok) return found;
  throw new Refused(answer.status, found.error || `the bus answered ${answer.status}`);
}
