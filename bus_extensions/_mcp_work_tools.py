"""The tools for the jobs of a queue."""

from __future__ import annotations

import time

from _mcp_tools import HOLD, ID, SECONDS, TEXT, WORDS, Ask, Session, Steps, Tool, aged, shown, tick_of_ts

LEASE = 600.0  # s that an agent has for a job when it does not say


def claim(me: Session, /, queue: str, wait: float = 0, lease: float = LEASE) -> Steps:
    order = {"to": queue, "channel": me.channel, "worker": me.me(), "lease": lease, "wait": min(max(wait, 0), HOLD)}
    answer = yield Ask("/claim", order)
    if not answer["messages"]:
        return f"no job in the queue {queue}"
    [job] = answer["messages"]
    most = f" of {answer['max_attempts']}" if answer.get("max_attempts") else ""
    id, secret, attempt = job["id"], job.pop("lease"), job.pop("attempt")
    until = time.strftime("%H:%M:%SZ", time.gmtime(tick_of_ts(job.pop("lease_until")) / 1000000))
    how = f"When it is done: bus_done with id {id} and lease {secret}. If not: bus_fail, with the reason."
    return f"A job, attempt {attempt}{most}, yours until {until}. {how} {WORDS}\n{shown(me, aged(me, job))}"


def done(me: Session, /, id: str, lease: str) -> Steps:
    yield Ask("/ack", {"id": id, "lease": lease})
    return f"{id} is done"


def fail(me: Session, /, id: str, lease: str, reason: str, delay: float = 0) -> Steps:
    yield Ask("/nack", {"id": id, "lease": lease, "reason": reason, "delay": delay})
    return f"{id} went back to its queue"


TOOLS = {
    "bus_claim": Tool(
        claim,
        "Take a job from a queue. Nobody else gets it until its lease ends, or you call bus_done or bus_fail.",
        {
            "queue": {**TEXT, "description": "the name of the queue"},
            "wait": {**SECONDS, "description": "if there is none, wait for one: seconds, at most 25"},
            "lease": {**SECONDS, "description": "how long the job may take, in seconds (600)"},
        },
        ("queue",),
        reads_only=False,
    ),
    "bus_done": Tool(
        done,
        "The job that bus_claim gave you is done.",
        {"id": ID, "lease": {**TEXT, "description": "its lease"}},
        ("id", "lease"),
        reads_only=False,
    ),
    "bus_fail": Tool(
        fail,
        "Give the job that bus_claim gave you back to its queue, for another try.",
        {
            "id": ID,
            "lease": {**TEXT, "description": "its lease"},
            "reason": {**TEXT, "description": "why, in one sentence"},
            "delay": {**SECONDS, "description": "seconds until somebody may try again (0)"},
        },
        ("id", "lease", "reason"),
        reads_only=False,
    ),
}
