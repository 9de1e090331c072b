"""Notices for people who do not look at the bus: a request to a webhook when a rule says so (PROTOCOL.md section 28).

`--notify RULES.json` names the file of rules. A notice has names and numbers, and never the text of a message. What is
not sent yet, and what failed, is in memory only.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from bus_server import (
    COUNTED_EXPIRED,
    LOOKS,
    Answer,
    Bus,
    Mailbox,
    Message,
    Metric,
    Request,
    Unusable,
    encode,
    ok,
    parts_of,
    say,
    seconds,
    unread,
)

if TYPE_CHECKING:
    import _notify_rules as rules
else:
    [rules] = parts_of(__file__, "_notify_rules")

TABLES, NOUN, OPERATIONS = None, "", ()

EVERY = 2.0  # s between two looks at the rules
APART = 60.0  # s between two requests of one rule; after a failure it is this, then twice as long each time
TRIES = 5  # of one notice
DEAD = 100  # notices that could not be sent and are listed
LOOKED = 1000  # messages that one look passes over to find the oldest unread one: 1 ms
NAMED = 10  # senders in one notice
PARSED = 4096  # bytes beside the text; if a message has more, any member `priority` with the value high counts
MSG = '"msg": '  # the bus writes this before the text; before it come only names
DECODER = json.JSONDecoder()
HIGH = '"priority": "high"'  # a quote inside of a text is written with a backslash, so this stands at a member only


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--notify", metavar="RULES.json", help="send notices to webhooks, by the rules in this file (chmod 600)")
    add("--notify-dry-run", action=DryRun, metavar="RULES.json", help="say what these rules wait for and send; exit")


class DryRun(argparse.Action):
    """Check a file of rules, and say what it would do. Nothing is sent, and no database is opened."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, path: Any, option: str | None = None) -> None:
        try:
            for rule in rules.read(path):
                kind, body = rules.TEMPLATES[rule.template](rule, "(names and numbers)")
                print(f"{rule.says()}\n    {kind}: {body}")
        except Unusable as error:
            parser.exit(2, f"bus_server: {error}\n")
        parser.exit()


def start(bus: Bus, options: argparse.Namespace) -> None:
    Notices(bus, rules.read(options.notify) if options.notify else [])


class Watch:
    """A rule, and how far its notices came."""

    def __init__(self, rule: rules.Rule) -> None:
        self.rule = rule
        self.told = 0  # the number of the last notice that was sent, or at a later look; 0: there was nothing to tell
        self.urgent = 0  # urgent messages since the last notice
        self.senders: list[str] = []  # of those, the first NAMED
        self.named: list[str] = []  # those in the notice
        self.text, self.number = "", 0  # the notice that is to be sent, and how much it tells of
        self.tries = 0  # of this notice
        self.due = 0.0  # monotonic clock, s: no request before
        self.sent = self.failed = 0  # notices
        self.last: int | None = None  # wall clock, us: when one was sent

    def tell(self, number: int, text: str) -> None:
        """Make a notice, if there is something to tell and was nothing before. More dead letters are news, too."""
        if not self.text:
            if number > self.told and (not self.told or self.rule.when == "dead"):
                self.text, self.number, self.tries = text, number, 0
            else:
                self.told = number

    def give_up(self) -> None:
        """This notice could not be sent. What it told of, and still lasts, is for the next one."""
        self.failed, self.text = self.failed + 1, ""
        self.urgent += self.number
        self.senders = [*dict.fromkeys(self.named + self.senders)][:NAMED]

    def render(self) -> str:
        rule, last = self.rule, seconds(self.last) if self.last else "null"
        facts = {"rule": rule.rule, "when": rule.when, "to": rule.to, "channel": rule.channel,
                 "waiting": bool(self.text), "sent": self.sent, "failed": self.failed}  # fmt: skip
        return f'{encode(facts)[:-1]}, "last": {last}}}'


class Notices:
    """Looks at the rules and sends the notices, one at a time, in a thread. Owned by the loop."""

    def __init__(self, bus: Bus, found: list[rules.Rule]) -> None:
        self.bus, self.watches = bus, [*map(Watch, found)]
        self.urgent = [each for each in self.watches if each.rule.when == "urgent"]
        self.judged = "", False  # the last text, and is it urgent: the copies of a message follow each other
        self.sending = False
        self.dead: deque[str] = deque(maxlen=DEAD)
        bus.route("GET", "/notices", self.list, "rules for notices, and the notices that could not be sent")
        if self.watches:
            bus.loop.every(EVERY, self.look)
            bus.metrics.append(self.figures)
        if self.urgent:
            bus.on_announced.append(self.announced)

    # What there is to tell

    def look(self) -> None:
        self.bus.loop.gradually(self.check, lambda watch: None, iter(self.watches))
        self.bus.loop.soon(self.send)

    def check(self, watch: Watch) -> None:
        bus, rule = self.bus, watch.rule
        if rule.when == "urgent":
            self.check_urgent(watch)
            return
        own = f"{rule.to}.dead" if rule.when == "dead" else str(rule.to)
        box = bus.mailboxes.boxes.get((rule.channel, own))
        bus.countable, bus.looks = COUNTED_EXPIRED, LOOKS
        watch.tell(*(TELL[rule.when](bus, rule, own, box) if box else (0, "")))

    def check_urgent(self, watch: Watch) -> None:
        if watch.urgent and not watch.text:
            others = " and others" if len(watch.senders) == NAMED else ""
            text = f"{count(watch.urgent, 'urgent message')} for {watch.rule.to or 'agents'} from "
            watch.told = 0  # each of them is news
            watch.tell(watch.urgent, f"{text}{', '.join(watch.senders)}{others}")
            watch.urgent, watch.named, watch.senders = 0, watch.senders, []

    def announced(self, visible: list[Message]) -> None:
        self.bus.loop.gradually(self.judge, lambda message: None, iter(visible))

    def judge(self, message: Message) -> None:
        if message.text is not self.judged[0]:
            self.judged = message.text, is_urgent(message.text)
        for watch in self.urgent if self.judged[1] else ():
            if watch.rule.to in (None, message.to) and watch.rule.channel == message.channel:
                watch.urgent += 1
                if message.sender not in watch.senders and len(watch.senders) < NAMED:
                    watch.senders.append(message.sender)

    # Sending

    def send(self) -> None:
        """Send the notice that is due longest. One request at a time: the threads are there for files, too."""
        now = time.monotonic()
        due = [each for each in self.watches if each.text and each.due <= now]
        if due and not self.sending and not self.bus.draining:
            watch = min(due, key=lambda each: each.due)
            self.bus.loop.in_thread(partial(rules.post, watch.rule, watch.text), partial(self.sent, watch))
            self.sending = True

    def sent(self, watch: Watch, error: Exception | None) -> None:
        self.sending = False
        watch.due = time.monotonic() + APART * (2**watch.tries if error else 1)
        watch.tries += 1
        if not error:
            watch.sent, watch.last = watch.sent + 1, self.bus.view.clock()
            watch.told, watch.text = watch.number, ""
        elif watch.tries == TRIES:
            reason = str(error) if isinstance(error, rules.Failed) else type(error).__name__
            letter = {"rule": watch.rule.rule, "text": watch.text, "reason": reason}
            self.dead.append(f'{encode(letter)[:-1]}, "at": {seconds(self.bus.view.clock())}}}')
            say(f"bus_server: a notice of the rule {watch.rule.rule} was not sent: {reason}")
            watch.give_up()
        self.send()

    # What an operator sees

    def list(self, request: Request) -> Answer:
        self.bus.storms.read(request.owner())
        request.grant.check_operator()
        known = ", ".join(each.render() for each in self.watches)
        return ok(self.bus, f'"rules": [{known}], "dead": [{", ".join(self.dead)}]')

    def figures(self) -> Iterator[Metric]:
        results = [(f'{{rule="{each.rule.rule}",result="{word}"}}', float(number)) for each in self.watches
                   for word, number in (("sent", each.sent), ("failed", each.failed))]  # fmt: skip
        yield "notices_total", "counter", "notices that were sent to a webhook, or could not be", results


def is_urgent(text: str) -> bool:
    """Has a message priority high? It is judged in a turn, so what is parsed of it is bounded."""
    if HIGH not in text:
        return False
    _, end = DECODER.raw_decode(text, text.index(MSG) + len(MSG))
    others = text[end + 2 :]  # behind a comma and a blank
    return len(others) > PARSED or json.loads(f"{{{others}}}").get("priority") == "high"


def count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def minutes(bus: Bus, since: int) -> int:
    return (bus.view.clock() - since) // 60000000


def unread_notice(bus: Bus, rule: rules.Rule, own: str, box: Mailbox) -> tuple[int, str]:
    number = unread(bus, rule.channel, own, box)
    look = partial(bus.view.look, rule.channel, own, box.newest, LOOKED)
    mark = box.mark()
    oldest = bus.mailboxes.back(rule.channel, own, mark)[1] or box.oldest(mark, bus.view.clock(), look)[0]
    if not number or oldest is None or bus.view.clock() - oldest < rule.minutes * 60000000:
        return 0, ""
    return number, f"{own} has {count(number, 'unread message')}, the oldest for {minutes(bus, oldest)} minutes"


def dead_notice(bus: Bus, rule: rules.Rule, own: str, box: Mailbox) -> tuple[int, str]:
    number = unread(bus, rule.channel, own, box)
    return number, f"the queue {rule.to} has {count(number, 'dead letter')}"


def silent_notice(bus: Bus, rule: rules.Rule, own: str, box: Mailbox) -> tuple[int, str]:
    away = bus.view.clock() - box.seen >= rule.minutes * 60000000 and box.seen > 0 and not bus.mailboxes.online(box)
    return int(away), f"{own} has not listened for {minutes(bus, box.seen)} minutes"


# By `when`: how much there is to tell of a mailbox, and the text of the notice.
TELL: dict[str, Callable[[Bus, rules.Rule, str, Mailbox], tuple[int, str]]] = {
    "unread": unread_notice,
    "dead": dead_notice,
    "silent": silent_notice,
}
