"""A front with a fault that $FAULT names, and that the checker of histories must find. Its options are a server's.

early    it answers before its entry is in the ledger, and appends it a little later
no id    each attempt to append is a new entry
unready  it serves before it has read the ledger, and never reads it
"""
import os
import pathlib
import queue
import secrets
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent.parent))
import bus_server  # noqa: E402
import ledgers.front  # noqa: E402
import ledgers.mirror  # noqa: E402
from ledgers import Unknown  # noqa: E402

LATER = 0.1  # s
append = ledgers.front.Front.append


def reaches(front, *_):
    """In place of Front.follow(): it reads nothing, and goes on."""
    front.bus.gate.until = time.monotonic() + 5


def early():
    """Only one front may have it: it does not see what others append meanwhile."""
    waiting = queue.Queue()

    def appends(front):
        while True:
            entry = waiting.get()
            time.sleep(LATER)
            append(front, entry, time.monotonic() + 10)

    def answers(front, entry, end):
        if waiting.unfinished_tasks == 0:
            threading.Thread(target=appends, args=[front], daemon=True).start()
        waiting.put(entry)
        return front.mirror.position + 1, time.time_ns() // 1000

    ledgers.front.Front.append = answers
    ledgers.front.Front.follow = reaches


def no_id():
    """What the ledger does not answer, as when a connection breaks, it appends anew. Here that is each tenth entry."""
    count = iter(range(1 << 30))

    def appends(front, entry, end):
        while True:
            try:
                place = front.mirror.ledger.append(entry, secrets.token_hex(16), time.monotonic() + 4)
                if next(count) % 10 == 9:
                    raise Unknown
                return place
            except Unknown:
                continue

    ledgers.front.Front.append = appends


def unready():
    """As if it had all, and as if the others had heard of it."""
    ledgers.mirror.Mirror.replay = lambda mirror: setattr(mirror, "asked", time.monotonic())
    ledgers.mirror.Mirror.is_silent = lambda mirror: False
    ledgers.front.Front.follow = reaches


if __name__ == "__main__":
    {"early": early, "no id": no_id, "unready": unready}[os.environ["FAULT"]]()
    sys.exit(bus_server.main())
