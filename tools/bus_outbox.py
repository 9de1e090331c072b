#!/usr/bin/env python3
"""Send one message to an agent-bus, now or when the bus is reachable. The text is an argument, or on stdin.

    echo "T1 is done" | AGENT_BUS_URL=http://10.0.0.5:8080 AGENT_NAME=spark python3 tools/bus_outbox.py dell
    python3 tools/bus_outbox.py --flush
    python3 tools/bus_outbox.py --list

`--flush` sends the waiting messages: when a network comes up, or now and then. `--list` shows the messages that wait or
were refused, for every bus and sender.

The message is written to disk, after the messages that wait already. Then all are sent in order with bus_send.send,
each with the key that is stored beside it. The first message that gets no answer ends this; the next call begins with
it. So the bus gets each message once, even if we are killed or an answer is lost. If a mailbox is full, its messages
wait, and those for others go on. If the bus refuses a message for good, its file goes to the subfolder `dead`, with the
reason; to try it again, move it back.

It takes the variables of bus_send.py. An outbox belongs to one sender and one bus: to its URL, however that is
spelled, or to the first of its URLs by the alphabet. It is a folder in AGENT_BUS_STATE_DIR with a file for each
message. The name of the file is a growing number; it holds the arguments of send() and `ts`, the time, for which the
bus later sets its own. A message whose `ttl` is over while it waits is not sent. If the clock was set back meanwhile,
by as much as its ttl or more, nobody knows how long it has waited: then it is not sent either.
Exit code: 0 sent or stored, and stderr says which; 1 refused by the bus; 2 usage, or the file cannot be written; 75
only with --flush: messages still wait.
"""
from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Union
from urllib.parse import unquote

# Python 3.8 prints this text. Older ones show the line in a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "bus_outbox.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path += [HERE, os.path.dirname(HERE)]  # the clients lie beside this file or one folder up, or are installed
sys.path.sort(key=lambda folder: folder.endswith("-packages"))  # else an older version that is installed wins
try:
    import bus_recv
    import bus_send
except ModuleNotFoundError as missing:
    print(f"bus_outbox: {missing.name}.py is missing in {HERE}: run curl -fO $AGENT_BUS_URL/{missing.name}.py there",
          file=sys.stderr)  # fmt: skip
    sys.exit(2)

PATIENCE = 5.0  # s to get the first message to the bus; the caller has other work to do
ARGUMENTS = {"to", "msg", "sender", "channel", "key"}  # of send(), in a file; the rest are members of the message
NUMBER = re.compile(r"([0-9]{20})\.json")  # a time, ns since 1970, or one more than the last
# The fault is ours (our token, our name, the URL), not the message's: the messages wait until it is corrected.
OURS = {401, 403, 404, 405}
FULL = "(429: the mailbox of "  # in what the bus says of a mailbox that its reader does not empty
SHOWN = ("bus", "sender", "to", "channel", "type", "subject", "reason")
Outcome = Union[dict[str, Any], bus_send.Refused]  # the bus's answer, or its refusal for good


class Outbox:
    """The waiting messages of one sender for one bus, in order. Any number of processes may share it.

    A message gets its number under one lock, which is held for a moment, and is sent under another lock. So a message
    can be stored while others are sent. The process that sent all messages releases the second lock and looks once
    more: a process that has just stored a message need not wait for that lock.
    """

    def __init__(self, url: str, sender: str | None) -> None:
        self.url, self.state = url, bus_recv.state_directory()
        self.path = bus_recv.place_of("outbox", url, sender or "-")
        self.dead = os.path.join(self.path, "dead")
        self.warn: Any = None  # as in send()
        if not os.path.isdir(self.dead):
            bus_recv.private_file(os.path.join(self.path, "~order"), os.O_RDWR, "r+").close()
            os.makedirs(self.dead, 0o700, exist_ok=True)
            place = self.dead
            while place != os.path.dirname(self.state):
                place = os.path.dirname(place)
                sync(place)

    def waiting(self) -> list[str]:
        return numbered(self.path)

    def put(self, message: dict[str, Any]) -> str:
        """Store the arguments of send(); returns the name of the file. From then on it survives a power cut."""
        with locked(os.path.join(self.path, "~order")):
            last = max([*self.waiting(), *numbered(self.dead)], default="0")
            name = f"{max(time.time_ns(), int(last.partition('.')[0]) + 1):020d}.json"
            store(self.path, name, {**message, "ts": time.time()})
        return name

    def take_over(self) -> None:
        """Move what waits in the folders of an older version here: it had one for each spelling of the URL."""
        for folder in bus_recv.older_places(os.path.dirname(self.path)):
            older = os.path.join(folder, os.path.basename(self.path))
            if os.path.isdir(older) and numbered(older):
                with locked(os.path.join(older, "~delivery"), 0) as held, locked(os.path.join(self.path, "~order")):
                    for name in numbered(older) if held else ():
                        os.replace(os.path.join(older, name), os.path.join(self.path, self.unused(name)))
                sync(self.path)

    def unused(self, name: str) -> str:
        """This name of a file, or the next one that no message here has."""
        while name in {*self.waiting(), *numbered(self.dead)}:
            name = f"{int(name.partition('.')[0]) + 1:020d}.json"
        return name

    def flush(self, patience: float) -> Iterator[tuple[str, dict[str, Any], Outcome]]:
        """Send the waiting messages. Yields for each: the name of its file, the message, its outcome.

        `patience` is that of send(), for each message. Raises bus_send.Unreachable, or Refused if the fault is ours,
        see OURS; then the messages wait. If another process is sending for longer than `patience`, it ends at once.
        If a mailbox is full, it is raised at the end: the messages for that mailbox wait, and the others are sent.
        """
        self.take_over()
        full, fault = set[str](), None
        while any(self.goes_on(name, full) for name in self.waiting()):
            with locked(os.path.join(self.path, "~delivery"), patience) as held:
                if not held:
                    return
                for name in self.waiting():
                    try:
                        if self.goes_on(name, full):
                            yield (name, *self.deliver(name, patience))
                    except bus_send.Unreachable as unreachable:
                        if FULL not in str(unreachable):
                            raise
                        full, fault = full | self.receivers(name), unreachable
        if fault:
            raise fault

    def receivers(self, name: str) -> set[str]:
        """To whom a waiting message goes. Empty if the file holds no message, or is gone."""
        with contextlib.suppress(ValueError, KeyError, TypeError, OSError):
            to = read(os.path.join(self.path, name))["to"]
            return {to} if isinstance(to, str) else set(to)
        return set()

    def goes_on(self, name: str, full: set[str]) -> bool:
        """Can a message be sent before those for these full mailboxes? A broadcast goes to them too."""
        return not full or full.isdisjoint(to := self.receivers(name)) and "all" not in full | to

    def deliver(self, name: str, patience: float) -> tuple[dict[str, Any], Outcome]:
        path, dead = os.path.join(self.path, name), os.path.join(self.dead, name)
        try:
            message = read(path)
        except ValueError as error:
            os.replace(path, dead)
            return {}, bus_send.Refused(400, f"the file holds no message: {error}")
        try:
            check_age(time.time() - stored_at(path, message), message.get("ttl"))
            long = os.path.getsize(path) / bus_send.SLOWEST_RATE
            own = {name: message[name] for name in message.keys() & ARGUMENTS}
            fields = {name: message[name] for name in message.keys() - ARGUMENTS - {"ts"}}
            outcome: Outcome = bus_send.send(
                url=self.url, patience=patience + long, warn=self.warn, fields=fields, **own
            )
        except TypeError as error:  # somebody has edited it
            os.replace(path, dead)
            return {}, bus_send.Refused(400, f"the file holds no message: {error}")
        except bus_send.Refused as refused:
            if refused.status in OURS:
                raise
            outcome = refused
            store(self.dead, name, {**message, "reason": str(refused)})
        os.unlink(path)
        return message, outcome


@contextlib.contextmanager
def locked(path: str, patience: float = float("inf")) -> Iterator[bool]:
    """True with the lock; False if another process still has it after `patience` seconds. It ends with its process."""
    end = time.monotonic() + patience
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+", encoding="ascii") as file:
        while not (held := bus_recv.try_lock(file, path)) and time.monotonic() < end:
            time.sleep(0.02)
        yield held


def store(directory: str, name: str, value: dict[str, Any]) -> None:
    """Write a file durably, and whole or not at all."""
    new = os.path.join(directory, "~new")
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, os.path.join(directory, name))
    sync(directory)


def sync(directory: str) -> None:
    """Make the names in a directory durable. Windows, and file systems as CIFS, have no such call."""
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)


def numbered(directory: str) -> list[str]:
    return sorted(filter(NUMBER.fullmatch, os.listdir(directory)))


def read(path: str) -> dict[str, Any]:
    """The message in the file, without the reason of an earlier refusal. ValueError if there is none."""
    with open(path, encoding="ascii") as file:
        message = json.load(file)
    if not isinstance(message, dict):
        raise ValueError("it is not an object")
    return {field: value for field, value in message.items() if field != "reason"}


def stored_at(path: str, message: dict[str, Any]) -> float:
    """When a message was stored, s since 1970. An older version has left it in the number only."""
    stored = message.get("ts")
    if isinstance(stored, (int, float)) and 0 < stored < 1e11:  # else somebody has edited it
        return stored
    return int(pathlib.Path(path).stem) / 1e9


def check_age(age: float, ttl: float | None) -> None:
    """Refused, if a message may have waited for its ttl or longer. Below 0: the clock was set back meanwhile."""
    if ttl and age >= ttl:
        raise bus_send.Refused(410, f"it waited for {age:.0f} s, longer than its ttl")
    if ttl and -age >= ttl:
        back = f"the clock was set back by {-age:.0f} s or more since it was stored"
        raise bus_send.Refused(410, f"{back}, so it may have waited longer than its ttl")


def listed() -> Iterator[str]:
    """A line for each message of every outbox."""
    top = pathlib.Path(bus_recv.state_directory(), "outbox")
    for path in sorted(top.glob("*/*/**/*.json")):
        try:
            message = json.loads(path.read_bytes())
        except (ValueError, OSError):  # it may have been sent just now
            continue
        if not isinstance(message, dict):  # somebody edited it
            message = {}
        when = bus_recv.iso(stored_at(str(path), message))
        known = {"bus": unquote(path.relative_to(top).parts[0]), **message}
        words = [f"{field}={bus_recv.word(known[field])}" for field in SHOWN if known.get(field)]
        yield " ".join(["dead   " if path.parent.name == "dead" else "waiting", when, *words])


def check(url: str, message: dict[str, Any]) -> None:
    """ValueError for a mistake that can be seen without the bus, and before somebody types a text."""
    for one in bus_send.urls_of(url):
        bus_send.connect(one, PATIENCE)
    bus_send.credentials(url)
    to = message.get("to", [])
    for name in (message.get("from"), message["channel"], *([to] if isinstance(to, str) else to)):
        if name is not None:
            bus_recv.check_name(name)


def deliver(outbox: Outbox, message: dict[str, Any] | None, patience: float, as_json: bool) -> int:
    """Store the message, if there is one, and send all waiting messages. Returns the exit code."""
    try:
        mine = outbox.put(message) if message else None
    except OSError as error:
        raise OSError(f"nothing is kept, and nothing was sent: {outbox.path}: {error.strerror or error}") from error
    code, reason, sent_now = 0, "", 0
    try:
        for name, sent, outcome in outbox.flush(patience):
            if isinstance(outcome, bus_send.Refused):
                complain(f"refused, and moved to {os.path.join(outbox.dead, name)}: {outcome}")
                code = code if mine else 1
            elif name == mine:
                bus_send.report(outcome, sent["to"], as_json)
            sent_now += not isinstance(outcome, bus_send.Refused)
    except bus_send.Refused as refused:
        code, reason = 1, str(refused)
    except bus_send.Unreachable as fault:
        code, reason = 0 if mine else 75, f"{outbox.url}: {fault.__cause__ or fault}"
    except KeyboardInterrupt:
        if mine in outbox.waiting():
            again = bus_recv.called("bus_outbox.py", "outbox")
            complain(f"not sent yet, but kept on this disk: it goes out with {again} --flush, or with the next message")
        raise
    if is_seen() and not message:
        complain(f"sent of the waiting messages: {sent_now}")
    waiting = outbox.waiting()
    why = reason or "another process is sending"
    if mine in waiting:
        complain(f"not sent yet, but kept on this disk; {len(waiting)} wait for the next call, or --flush ({why})")
    elif waiting and (reason or not mine):
        complain(f"{len(waiting)} still wait ({why})")
        code = code or (0 if mine else 75)
    return 1 if mine in numbered(outbox.dead) else code


def is_seen() -> bool:
    """Does a person see what we say?"""
    return bool(sys.stderr and sys.stderr.isatty())


def complain(line: str, code: int = 0) -> int:
    """One line on stderr."""
    bus_recv.complain(line, "bus_outbox")
    return code


def main(argv: Sequence[str] | None = None) -> int:
    parser = bus_send.command_line("Send TEXT, or the text on stdin: now, or when the bus is reachable again.")
    add = parser.add_argument
    add("--timeout", type=bus_send.duration, default=PATIENCE, metavar="S", help="try for S seconds (5)")
    parser.add_argument("--flush", action="store_true", help="only send the waiting messages")
    parser.add_argument("--list", action="store_true", help="only list waiting and refused messages, for all buses")
    given = vars(parser.parse_intermixed_args(argv))
    to, patience, flush, show, as_json, _ = map(given.pop, ("to", "timeout", "flush", "list", "json", "bus"))
    if bool(to) + flush + show != 1:
        parser.error("give TO, or --flush, or --list")
    bus_send.tell_people(complain)
    try:
        if show:
            lines = [f"{line}\n" for line in listed()]
            bus_recv.emit("".join(lines))
            return 0 if lines or not is_seen() else complain("no message waits, and none was refused")
        check(*bus_send.compose(to, "", sender=given["sender"], channel=given["channel"]))
        msg = bus_send.message_of(given) if to else ""
        url, message = bus_send.compose(to, msg, **(given if to else {"sender": given["sender"]}))
        message["sender"] = sender = message.pop("from", None)
        outbox = Outbox(url, sender)
        outbox.warn = complain if is_seen() else None  # for a program, one line at the end says it all
        code = deliver(outbox, None if flush else message, patience, as_json)
        others = sum(line.startswith("waiting") for line in listed()) - len(outbox.waiting())
        if flush and others > 0:
            complain(f"{others} wait for another bus, or of another sender: --list shows them")
        return code
    except (ValueError, OSError) as error:
        return complain(str(error), 2)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
