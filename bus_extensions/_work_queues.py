"""What the bus tells of queues and their jobs. Part of work.py, which is loaded with this file."""

from __future__ import annotations

from collections.abc import Iterator

from _work_letters import DEAD
from _work_words import Worker

from bus_server import MAILBOX, Bus, Grant, Key, Mailbox, Message, Metric, is_name, unread


class Queues:
    """The mailboxes that are queues, and the answers of others in which they appear. Owned by the loop."""

    LOOKED, PER_LOOK = 500, 50  # jobs of a queue that one answer looks at; so many take as long as one look

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.known = set(self.had_workers())
        bus.states.append(self.state_of)
        bus.about.append(self.of_queue)
        bus.on_tidy.append(lambda: self.known.intersection_update(bus.mailboxes.boxes))
        bus.metrics_by_name.append(self.undone)
        bus.mailboxes.back = self.back

    def begin(self, channel: str, queue: str) -> None:
        """What comes from now on is work, as the row of the mailbox says; it is kept as any row that is polled."""
        self.known.add((channel, queue))
        self.bus.mailboxes.box(channel, queue).firm = True

    def state_of(self, message: Message) -> tuple[str, str] | None:
        """The state of a message that was handed out."""
        row = self.bus.view.database.execute(
            "SELECT attempt, due, lease, worker FROM work WHERE tick = ?", (message.tick,)
        ).fetchone()
        if not row:
            return None
        attempt, due, lease, worker = row
        if not (isinstance(attempt, int) and all(map(is_name, str(worker).split("/")))):
            self.bus.view.damaged(f"the worker of {message.tick:x}")
            return None
        state = "fetched" if due else "acknowledged" if lease else "dead"
        return state, f', "attempt": {attempt}, "by": "{worker}"'

    def had_workers(self) -> Iterator[tuple[str, str]]:
        """The mailboxes that workers had messages of."""
        rows = self.bus.view.database.execute("SELECT channel, name FROM mailboxes WHERE taken > 0").fetchall()
        return ((channel, own) for channel, own in rows if is_name(channel) and is_name(own))

    def of_queue(self, grant: Grant, channel: str, queue: str, box: Mailbox) -> str:
        """The member `work` of a queue in /agents. A page counts at most as many jobs as the bus allows it."""
        bus, key = self.bus, (channel, queue)
        if key not in self.known or not grant.reads(queue):
            return ""
        had = f"SELECT worker FROM work WHERE mailbox = {MAILBOX} AND due > ? AND lease IS NOT NULL LIMIT ?"
        values = *key, bus.clock.now().steady, max(bus.countable, 0)
        holders = [worker for [worker] in bus.view.database.execute(had, values).fetchall()]
        bus.countable -= len(holders)
        bus.looks -= 1
        parked = [bus.mailboxes.parked[each] for each in bus.mailboxes.waiting.get(key, ())]
        waiting = [each.called for each in parked if isinstance(each, Worker)]
        letters = bus.mailboxes.boxes.get((channel, queue + DEAD))
        dead = unread(bus, channel, queue + DEAD, letters) if letters else 0
        workers = len(waiting) + len(set(holders) - set(waiting))
        return f', "work": {{"in_hand": {len(holders)}, "dead": {dead}, "workers": {workers}}}'

    def back(self, channel: str, queue: str, mark: int) -> tuple[int, int | None]:
        """How many jobs came back and are in nobody's hand, and the oldest. Those above the mark are unread anyway."""
        bus, key = self.bus, (channel, queue)
        if key not in self.known:
            return 0, None
        now, wall = bus.clock.now().steady, bus.view.clock()
        undone = f"SELECT tick, due, lease FROM work WHERE mailbox = {MAILBOX} AND due IS NOT NULL ORDER BY due LIMIT ?"
        free = "tick <= ? AND (lease IS NULL OR due <= ?) AND EXISTS (SELECT 1 FROM messages WHERE messages.tick = "
        free += "job.tick AND ifnull(expires > ?, 1))"
        rows = f"SELECT count(*), total(free), min(CASE WHEN free THEN tick END) FROM (SELECT tick, {free} AS free FROM"
        values = mark, now, wall, *key, min(self.LOOKED, max(bus.countable, 0))
        looked, number, oldest = bus.view.database.execute(f"{rows} ({undone}) AS job)", values).fetchone()
        bus.countable -= looked
        bus.looks -= 1 + looked // self.PER_LOOK
        return int(number), oldest

    def undone(self, keys: list[Key]) -> list[Metric]:
        count = f"SELECT count(*) FROM work WHERE mailbox = {MAILBOX} AND due IS NOT NULL"
        of = {key: int(self.bus.view.ask(count, *key)[0]) for key in keys if key in self.known}
        jobs = [(f'{{channel="{channel}",name="{own}"}}', number) for (channel, own), number in of.items() if number]
        return [("undone_jobs", "gauge", "handed out at least once and not done", jobs)]
