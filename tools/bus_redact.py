#!/usr/bin/env python3
"""Take the text of a message away from an agent-bus, also from its disk: a secret was sent by mistake.

    AGENT_BUS_URL=http://10.0.0.5:8080 python3 tools/bus_redact.py 660ba678a1b40

On a bus with tokens it needs that of an operator (`invite NAME --operator`). It prints who has fetched the message
already. Those readers, backups and the outboxes of senders may still have the text: so replace the secret itself, too.
If the send had several receivers, the messages of all of them are redacted.

bus_recv.ask asks the bus; so this program needs bus_recv.py beside it or one folder up. It takes the variables of
bus_recv.py, and writes no file. Exit code: 0 redacted, 1 refused by the bus, 2 usage, 75 out of reach, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
from collections.abc import Sequence
from typing import Any

# Python 3.8 prints this text. Older ones show the line in a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "bus_redact.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path += [HERE, os.path.dirname(HERE)]  # the clients lie beside this file or one folder up, or are installed
sys.path.sort(key=lambda folder: folder.endswith("-packages"))  # else an older version that is installed wins
try:
    import bus_recv
except ModuleNotFoundError as missing:
    print(f"bus_redact: {missing.name}.py is missing in {HERE}: run curl -fO $AGENT_BUS_URL/{missing.name}.py there",
          file=sys.stderr)  # fmt: skip
    sys.exit(2)

SECONDS = 60.0  # the bus may write some megabytes first


def show(id: str, answer: dict[str, Any], as_json: bool) -> None:
    """Print what was redacted, and who has fetched it; and on stderr, where the text may still be."""
    lines = [bus_recv.dump(answer)]
    if not as_json:
        copies = [one for one in listed(answer, "redacted") if isinstance(one, dict)]
        words = [[bus_recv.word(one.get(member)) for member in ("id", "to", "state")] for one in copies]
        fetched = ", ".join(map(bus_recv.word, listed(answer, "fetched_by"))) or "nobody"
        lines = [f"{which} to {to}: {state}" for which, to, state in words]
        lines.append(f"{id} is redacted; fetched by: {fetched}")
    with contextlib.suppress(OSError):  # if nobody reads our output, it is redacted all the same
        bus_recv.emit("".join(f"{line}\n" for line in lines))
    complain(str(answer.get("warning")))


def listed(answer: dict[str, Any], member: str) -> list[Any]:
    """The list that should be there; an empty one if something else is."""
    return answer[member] if isinstance(answer.get(member), list) else []


def complain(line: str) -> None:
    bus_recv.complain(line, "bus_redact")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Replace the text of a message on an agent-bus, also on its disk.")
    parser.add_argument("id", metavar="ID", help="the id of the message")
    parser.add_argument("--json", action="store_true", help="print the answer of the bus, as JSON")
    parser.add_argument("--bus", type=bus_recv.profile, metavar="PROFILE", help="the bus of PROFILE.env")
    options = parser.parse_args(argv)
    bus_recv.tell_people(complain)
    try:
        url = bus_recv.settings()["AGENT_BUS_URL"]
        answer, _ = bus_recv.ask(url, "/redact", SECONDS, {"id": options.id})
        show(options.id, answer, options.json)
    except bus_recv.FAULTS as fault:
        never = isinstance(fault.__cause__, (ConnectionRefusedError, socket.gaierror))  # the bus heard nothing
        known = "nothing is redacted" if never else "it is not known whether the message is redacted"
        return bus_recv.ended(fault, "bus_redact", f"; {known}: repeat it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
