// The view Work: the queues, and the jobs that failed.

import { badge, clock, fill, h, many, plain, shown, sum } from "./dom.js";
import { newestOf } from "./follow.js";
import * as look from "./look.js";
import { card, doingWith, mark, opens } from "./views.js";

const MOST = 50; // failed jobs of a queue that are shown
const PAUSE = 2500, SHARE = 30; // ms between two looks at them, and at least so many times as long as one look took

export function workView() {
  const queues = h("div"), jobs = h("div"), result = h("p", { class: "dim", role: "status", tabindex: -1 });
  const node = h("div", {}, h("h1", { class: "only-spoken" }, "Work"), queues, jobs, result);
  const told = text => (result.textContent = text);
  let next = 0; // ms since 1970, from when on the failed jobs are asked for again
  async function fetchJobs(what) {
    const began = Date.now(), rows = look.agents().filter(row => row.work?.dead);
    next = Infinity;
    const some = await Promise.all(rows.map(({ name, channel, work }) =>
      newestOf(`to=${name}.dead&channel=${channel}`, Math.min(work.dead, MOST)).catch(() => [])));
    next = Date.now() + Math.max(PAUSE, SHARE * (Date.now() - began));
    if (what !== "changed" && jobs.contains(document.activeElement)) return; // it would lose the focus
    drawJobs(some.flat(), sum(rows.map(row => row.work.dead)));
  }
  function drawJobs(letters, all) {
    const which = letters.length < all ? `; of ${many(all, "failed job")} the newest of each queue are shown` : "";
    if (jobs.contains(document.activeElement)) result.focus(); // its button goes
    fill(jobs, letters.length ? card(many(letters.length, "failed job"), GIVEN_UP + which, letters.map(job)) : []);
  }
  function job(letter) {
    const { from, to, attempts, ts, msg, id, reason = "no reason was given" } = letter; // anybody may have written these
    const tried = Number.isInteger(attempts) && `${many(attempts, "attempt")} · `;
    return h("article", { class: "letter" },
      h("p", {}, badge(queueOf(letter)), " ", h("b", {}, queueOf(letter)),
        h("span", { class: "dim" }, ` from ${from} · `, tried, clock(ts))),
      h("p", { class: "problem" }, plain(shown(reason), 500)), h("p", {}, plain(shown(msg), 500)),
      h("p", {}, doingWith(AGAIN, { id, to }, told), " ", h("a", opens(id), "details")));
  }
  function update(what) {
    if (what === "messages" || what === "older") return;
    const rows = look.agents().filter(row => row.work), none = h("p", { class: "quiet" }, NO_QUEUE);
    fill(queues, rows.length ? h("ul", { class: "cards" }, rows.map(queueCard)) : none);
    if (what === "changed" || Date.now() > next) fetchJobs(what);
  }
  update();
  return { node, update };
}

const NO_QUEUE = "No queue has jobs. A worker makes one: agent-bus work NAME --exec COMMAND "
  + "(in a clone: python3 tools/agent_bus.py work ...)";
const GIVEN_UP = "given up after all attempts; they wait for you";
const queueOf = letter => letter.to.replace(/\.dead$/, "");
const AGAIN = {
  title: "Send again", ask: ({ id }) => ["again", { id }],
  done: letter => `Sent again: it waits for a worker of ${queueOf(letter)}.`,
};

function queueCard(row) {
  const { in_hand, dead, workers } = row.work, waiting = row.unread || 0;
  const numbers = [["waiting", waiting], ["in hand", in_hand], ["failed", dead]];
  const bar = h("div", { class: "bar-of-three", "aria-hidden": "true" }, numbers.map(([title, number]) => {
    const part = h("span", { class: title.replace(" ", "-") });
    part.style.flexGrow = number;
    return number ? part : null;
  }));
  const one = ([title, number]) =>
    h("div", { class: title.replace(" ", "-") }, h("dt", {}, title), h("dd", {}, number));
  const who = [mark(workers ? "listening" : "away"), ` ${workers ? many(workers, "worker") : "no worker"}`];
  return h("li", { class: "card" }, h("header", {}, h("h2", {}, row.label), h("p", { class: "dim" }, who)), bar,
    h("dl", { class: "numbers" }, numbers.map(one)));
}
