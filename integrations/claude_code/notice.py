"""How much mail waits for a session, as a notice without any text of a message; and how an idle session is woken by it.

The hook and the MCP server share it. Read it in this order: Counts and count (one exchange with the bus), notice (the
sentence), read_elsewhere; then the file that wakes a session, arrivals, and Waker, which the MCP server runs.
"""
from __future__ import annotations  # needs Python 3.9 or later

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

from session import (
    ASK_SECONDS,
    Nameless,
    Self,
    bus_at,
    bus_recv,
    get,
    id_of,
    keep_bus,
    mcp_part,
    own_cursor,
    place_of,
    wake_path,
    was_here,
)

ADDRESS = re.compile("[0-9A-Fa-f.:]{2,45}")
AWAITED = 50  # ids of the last questions of a name
SOON = 1.0  # s between looks in a storm: Claude Code reports a change when the file has stayed as it is for 0.5 s
LATER = 8.0  # s until the next attempt, when no look was possible
HOLD_SECONDS = bus_recv.FOLLOW_SECONDS  # of a request; then the bus is asked for the names that the session has now


class Counts(NamedTuple):
    """What is unread. `pressing`: urgent, or a reply that is awaited. `newest`: the time of the newest message, s.

    `senders`: those that a token vouches for. `others`: are there more? `reader`: does a program of this machine read
    this mail, and so tells it? `now`: the cursor behind all that was counted.
    """

    unread: int
    urgent: int = 0
    awaited: int = 0
    newest: float = 0.0
    senders: tuple[str, ...] = ()
    others: bool = False
    more: bool = False
    reader: bool = False
    now: str = "last"

    @property
    def pressing(self) -> int:
        return self.urgent + self.awaited


def count(me: Self, seconds: float, status: dict[str, Any] | None = None) -> Counts:
    """Ask the bus once. An older bus has no digest: then the number alone, and that takes a second exchange.

    `status`: see session.get. Raises as bus_recv.exchange().
    """
    given = bus_recv.settings()
    url, channel = given["AGENT_BUS_URL"], given.get("AGENT_BUS_CHANNEL", "default")
    try:
        answer = get(url, digest_of(me, channel), seconds, status)
    except bus_recv.Refused as refused:
        if refused.status != 404:
            raise
        answer = get(url, f"/inbox?name={me.name}&channel={channel}", seconds)
    try:
        counts = counted(me, channel, answer)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        raise bus_recv.Unreachable() from None  # something else answers
    keep_bus(url, id_of(answer))
    return counts


def digest_of(me: Self, channel: str, since: str = "") -> str:
    """The path of the counts of a session: what is unread, or what came after `since`."""
    if me.also and not since:  # the bus has no cursor for several names
        since = own_cursor(bus_at(bus_recv.settings()["AGENT_BUS_URL"]), channel, me.name)
    return f"/digest?to={','.join(me.names)}&channel={channel}{since and f'&since={since}'}"


def counted(me: Self, channel: str, answer: dict[str, Any]) -> Counts:
    name, bus, now = me.name, id_of(answer), str(answer.get("now", "last"))
    # A reader that still has an old name of the session goes on with the new one when its poll ends.
    reader = any(reader_runs(bus, channel, each) for each in me.names)
    if "recipients" in answer:
        return Counts(int(answer["recipients"].get(channel, {}).get(name, 0)), reader=reader, now=now)
    senders, vouched, newest = answer["senders"], answer["vouched"], answer["newest"]
    if newest and bus_recv.seconds_of(own_cursor(bus, channel, name)) >= float(newest["ts"]):
        return Counts(0, reader=reader, now=now)  # a reader that has ended has shown it; the bus does not know yet
    # An older bus does not tell the answers.
    replies = sum(each.get("answers", 0) for each in answer["threads"] if each["id"] in awaited(name))
    return Counts(
        int(answer["unread"]),
        int(answer["urgent"]),
        int(replies),
        float(newest["ts"]) if newest else 0.0,
        tuple(each for each in vouched if bus_recv.NAME.fullmatch(each)),
        len(senders) > len(vouched),
        bool(answer["more"]),
        reader,
        now,
    )


def reader_runs(bus: str, channel: str, name: str) -> bool:
    """Does a program on this machine, such as a Monitor, show the mail of this name?"""
    place = map(bus_recv.file_name, (bus, channel, name))
    return is_locked(os.path.join(bus_recv.state_directory(), "cursors", *place) + "~lock")


def is_locked(path: str) -> bool:
    with contextlib.suppress(FileNotFoundError), open(path, "r+", encoding="ascii") as file:
        return not bus_recv.try_lock(file, path)
    return False


def notice(me: Self, counts: Counts, before: bool = False) -> str:
    """One line, whatever waits. `before`: all of it is from before this session."""
    tools = mcp_part("_mcp_tools")  # 6 ms, only when there is something to say
    its = (counts.unread, counts.more, counts.urgent, counts.awaited, counts.senders, counts.others)
    return str(tools.notice_of(me.name, *its, counts.unread if before else 0))


def read_elsewhere(me: Self) -> str:
    """A sentence, if another program reads the mail of this name, too; "" if the bus does not tell."""
    given = bus_recv.settings()
    url, channel = given["AGENT_BUS_URL"], given.get("AGENT_BUS_CHANNEL", "default")
    try:
        answer = get(url, f"/agents?channel={channel}&name={me.name}", ASK_SECONDS)
        its = next((each for each in answer["agents"] if (each["name"], each["channel"]) == (me.name, channel)), {})
        if its.get("online") and (its.get("readers", 0) > 1 or not was_here(id_of(answer), channel, me.name)):
            address = str(its.get("address"))
            is_here = address == "local" or bus_recv.is_here(address)  # `local`: a Unix socket
            named = f" ({address})" if ADDRESS.fullmatch(address) else ""
            where = "by another program on this machine, too" if is_here else f"on another machine, too{named}"
            return (
                f"{me.name} is read {where}, so each of the two gets only a part of the mail, or both get all: "
                "one of them needs another AGENT_NAME."
            )
    except (bus_recv.Refused, bus_recv.Unreachable, LookupError, TypeError, AttributeError):
        pass
    return ""


def reason(fault: Exception) -> str:
    """Why a bus gives no counts, in our words: whatever has its port could say anything, and a hook is believed."""
    given = re.match("([1-5][0-9]{2}): ", str(fault))
    status = getattr(fault, "status", 0) or (given and given[1])
    doctor = bus_recv.called("bus_doctor.py", "doctor")
    if status == 401:
        expired = "has expired" if "expired" in str(fault) else "is missing, wrong or revoked"
        return f"the token of this session {expired}; {doctor} tells more"
    if status:
        return f"it answers {status}; {doctor} tells why"
    if "," in bus_recv.settings()["AGENT_BUS_URL"]:
        return "none of its URLs answers as a bus does"
    ours = fault.__cause__ is None or isinstance(fault.__cause__, OSError)  # else its text is that of an answer
    said = re.sub("(Tunnel connection failed: [0-9]+).*(, through)", r"\1\2", str(fault))  # what a proxy adds to it
    return said if ours else "the answer is not from a bus"


def await_reply(name: str, id: str) -> None:
    """Note that `name` has asked something with this message, so a reply may prolong a turn."""
    with bus_recv.private_file(asked(name), os.O_RDWR, "r+") as file:
        ids = [*file.read().split(), id][-AWAITED:]
        file.seek(0)
        file.write(" ".join(ids))
        file.truncate()


def awaited(name: str) -> list[str]:
    with contextlib.suppress(OSError), open(asked(name), encoding="ascii", errors="replace") as file:
        return file.read().split()
    return []


def asked(name: str) -> str:
    return place_of("asked", name)


# An idle session of Claude Code is woken when a file changes that its SessionStart hook has named.


def wake_file(name: str) -> str:
    """The path of the file that wakes the sessions of this name. It is made if it is not there."""
    bus_recv.private_file(wake_path(name), os.O_WRONLY | os.O_APPEND, "a").close()
    return wake_path(name)


def is_watched(name: str) -> bool:
    """Does a program of this machine wait for mail for this name, to wake the session?"""
    return is_locked(f"{wake_path(name)}~lock")


@contextlib.contextmanager
def alone(name: str, kind: str) -> Iterator[bool]:
    """Be the one that waits for mail for this name in this way; or False, while another program of this machine is."""
    path = f"{wake_path(name)}~{kind}"
    with bus_recv.private_file(path, os.O_RDWR, "r+") as file:
        os.utime(path)  # see session.was_here
        yield bus_recv.try_lock(file, path)


def arrivals(
    who: Callable[[], Self], warn: Callable[[str], None], kind: str, is_needed: Callable[[], bool] = lambda: True
) -> Generator[tuple[Self, Counts], None, None]:
    """Yields whenever more mail waits for a session than before; it takes nothing. `kind`: see alone().

    `who` is asked before each look, because a session may be renamed; `is_needed` may end it. After a look the bus is
    asked to answer when something later has come; meanwhile the name counts as listening. It is quiet while another
    program reads the mail. What could not be told comes again, if the reason is thrown into it.
    """
    known, next_look, warned = (0, 0.0), 0.0, ""
    while is_needed():
        try:
            me = who()
            with alone(me.name, kind) as ours:
                if ours:
                    counts = count(me, bus_recv.GRACE_SECONDS)
                    if not counts.reader and (counts.newest > known[1] or counts.unread > known[0]):
                        yield me, counts
                    known, warned = (counts.unread, max(counts.newest, known[1])), ""
                    if hold(me, counts.now):
                        time.sleep(max(next_look - time.monotonic(), 0))
                        next_look = time.monotonic() + SOON
                    continue
        except (bus_recv.Unreachable, bus_recv.Refused, Nameless, ValueError, OSError, LookupError) as fault:
            if str(fault) != warned:
                warned = str(fault)
                warn(f"no mail can wake the session now: {fault}")
        time.sleep(LATER)


def hold(me: Self, since: str) -> bool:
    """Wait until the bus has a message for this session after `since`, or for HOLD_SECONDS. Nothing is fetched.

    True, if the bus has answered before that time; also if it is one that does not hold a request.
    """
    given, began = bus_recv.settings(), time.monotonic()
    path = f"{digest_of(me, given.get('AGENT_BUS_CHANNEL', 'default'), since)}&wait={HOLD_SECONDS}"
    try:
        bus_recv.ask(given["AGENT_BUS_URL"], path, HOLD_SECONDS + bus_recv.GRACE_SECONDS)
    except bus_recv.Refused as refused:
        if refused.status != 404:
            raise
        time.sleep(LATER)  # a bus without the digest
    return time.monotonic() < began + HOLD_SECONDS


class Waker(threading.Thread):
    """Appends a line to the wake file of a session whenever more mail waits for it. For the MCP server."""

    def __init__(self, who: Callable[[], Self], warn: Callable[[str], None]) -> None:
        super().__init__(daemon=True)
        self.who, self.warn = who, warn

    def run(self) -> None:
        arriving = arrivals(self.who, self.warn, "lock")
        found = next(arriving, None)
        while found:
            try:
                self.wake(*found)
                found = next(arriving, None)
            except OSError as fault:  # the disk is full
                found = arriving.throw(fault)

    def wake(self, me: Self, counts: Counts) -> None:
        for name in me.names:  # the session watches the file of the name that it had when it started
            bus_recv.append(wake_file(name), f"{counts.unread} unread for {me.name}\n")
