"""What agents say of themselves. Part of people.py, which is loaded with this file."""

from __future__ import annotations

from typing import Any, NamedTuple

from bus_server import (
    Answer,
    Bus,
    Mailbox,
    Query,
    Refused,
    Request,
    Shares,
    channel_of,
    encode,
    ok,
    parse_json,
    seconds,
    speaker,
    too_much,
)


class Status(NamedTuple):
    """What an agent says of itself."""

    said: str  # members of JSON
    until: float  # monotonic clock, s
    owner: str

    def size(self) -> int:
        return len(self.said) + 300  # bytes; about what its entries take beside the text


class Statuses:
    """What agents say of themselves, at POST /status. It does not count as listening. In memory, owned by the loop."""

    STATES = ("busy", "idle", "waiting")
    CHARACTERS = 500  # of text, cwd and branch together
    TTL, TTL_MAX = 3600.0, 86400.0  # s; a session that says nothing for an hour has probably ended
    EACH, ALL = 1 << 20, 16 << 20  # bytes of one owner's statuses, and of all: 2000 and 30,000 usual ones

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.known: dict[tuple[str, str], Status] = {}
        self.boxes: set[Mailbox] = set()  # of the names in `known`: /agents lists them
        self.held = Shares(self.ALL, self.EACH)
        bus.route("POST", "/status", self.say, "say what an agent is doing; it is shown in /agents")
        bus.on_tidy.append(self.forget)

    def say(self, request: Request) -> Answer:
        """Keep what an agent says, in place of what it said before. Without text, state, cwd and branch: forget it."""
        bus, owner = self.bus, request.owner()
        bus.storms.read(owner)
        said = request.grant.sign(parse_json(request.body))
        if not isinstance(said, dict):
            raise Refused(400, "a status must be a JSON object with from and text, state, cwd or branch")
        own = speaker(said.get("from"), "from")
        key = channel_of(said.get("channel")), own
        words, before = self.words(said), self.known.get(key)
        ttl = Query.of_members(said).number("ttl", self.TTL, 1, self.TTL_MAX)
        bus.storms.name(owner, bus.mailboxes.new(key[0], [own]))
        at = f'"at": {seconds(bus.view.clock())}'
        status = Status(f"{encode(words)[1:-1]}, {at}", bus.mailboxes.clock() + ttl, owner)
        if words and self.held.is_full(owner, status.size() - (before.size() if before else 0)):
            raise too_much("too many agents have said what they do: let some say it for a shorter ttl", 60)
        self.drop(key)
        if words:
            self.held.add(owner, status.size())
            self.known[key] = status
            self.boxes.add(bus.mailboxes.box(*key))
        return ok(bus, '"ok": true')

    def words(self, said: dict[str, Any]) -> dict[str, str]:
        """The members of a status that are not empty."""
        words = {member: said.get(member) or "" for member in ("text", "state", "cwd", "branch")}
        if not all(isinstance(word, str) for word in words.values()):
            raise Refused(400, "text, state, cwd and branch must be strings")
        if words["state"] not in ("", *self.STATES):
            raise Refused(400, f"state must be one of {', '.join(self.STATES)}")
        if sum(map(len, words.values())) > self.CHARACTERS:
            raise Refused(400, f"a status has at most {self.CHARACTERS} characters: say it shorter")
        return {member: word for member, word in words.items() if word}

    def drop(self, key: tuple[str, str]) -> None:
        before, box = self.known.pop(key, None), self.bus.mailboxes.boxes.get(key)
        if before:
            self.held.add(before.owner, -before.size())
        if box:
            self.boxes.discard(box)

    def member(self, channel: str, own: str) -> str:
        status = self.known.get((channel, own))
        return "" if not status or self.is_over(status) else f', "status": {{{status.said}}}'

    def is_over(self, status: Status) -> bool:
        """Has its time passed, or was the token revoked that said it? An owner is a token, or an address."""
        return status.until <= self.bus.mailboxes.clock() or not self.bus.gate.holds(status.owner)

    def forget(self) -> None:
        """Drop those that are over. The bus forgets a name that never polls or sends: it is made anew."""
        for key in [key for key, status in self.known.items() if self.is_over(status)]:
            self.drop(key)
        self.boxes = {self.bus.mailboxes.box(*key) for key in self.known}
