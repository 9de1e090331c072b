"""A model of Claude Code's Monitor tool: what an agent sees of a program's stdout. The figures are those of 2.1.329."""
import re

LINE_UNITS, EVENT_UNITS = 500, 3000  # UTF-16 units
GATHER_SECONDS = 0.2  # after the first line of an event
IN_HAND, REFILL_SECONDS = 10, 2.0  # events; one more after so many seconds


def units(text):
    return len(text.encode("utf-16-le")) // 2


def cut(text, limit):
    return text if units(text) <= limit else text.encode("utf-16-le")[: 2 * limit].decode("utf-16-le", "ignore")


class Monitor:
    """Give it what was written and when; `events` is what the agent reads."""

    def __init__(self):
        self.events, self.suppressed, self.truncated = [], 0, 0
        self.left, self.then = float(IN_HAND), None
        self.rest = ""  # a line without its end waits
        self.gathered, self.began = [], None

    def write(self, text, now):
        if self.began is not None and now - self.began >= GATHER_SECONDS:
            self.flush()
        *lines, self.rest = (self.rest + text).split("\n")
        for line in filter(None, map(str.strip, lines)):
            if self.began is None:
                self.began = now
            if units(line) > LINE_UNITS:
                self.truncated += 1
                line = f"{cut(line, LINE_UNITS)}...(truncated)"
            self.gathered.append(line)

    def flush(self):
        """The event that was being gathered is complete."""
        if self.began is None:
            return
        event, now = "\n".join(self.gathered), self.began + GATHER_SECONDS
        self.gathered, self.began = [], None
        if units(event) > EVENT_UNITS:
            self.truncated += 1
            event = cut(event, EVENT_UNITS)
        if self.then is not None:
            self.left = min(IN_HAND, self.left + (now - self.then) / REFILL_SECONDS)
        self.then = now
        if self.left < 1:
            self.suppressed += 1
            return
        self.left -= 1
        self.events.append(event)


HEAD = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ from=(\S+) id=([0-9a-f]+)")


def messages(events):
    """(sender, id, body) of each message in the events, as an agent that reads line by line would take them."""
    found = []
    for line in (line for event in events for line in event.split("\n")):
        head = HEAD.match(line)
        if head:
            found.append((head[1], head[2], []))
        elif line.startswith("|"):
            found[-1][2].append(line)
        else:
            assert line == "---" or line.startswith("-- agent-bus: "), f"a line that belongs to nothing: {line!r}"
    return [(sender, number, "\n".join(body)) for sender, number, body in found]
