"""The channels, and how much mail each has, at GET /channels (PROTOCOL.md section 17)."""

from __future__ import annotations

import argparse
from functools import partial

from bus_server import Answer, Bus, Request, encode, inboxes, ok, unread

TABLES, NOUN, OPERATIONS = None, "", ()


def options(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def start(bus: Bus, options: argparse.Namespace) -> None:
    bus.route("GET", "/channels", partial(channels, bus), "how many mailboxes and unread messages each channel has")


def channels(bus: Bus, request: Request) -> Answer:
    """The mailboxes of /inbox, added up by channel. To count the unread messages of a mailbox may take a read.

    So `max` limits mailboxes, and the rest of a channel may be in the next answer.
    """
    page = inboxes(bus, request)
    sums: dict[str, dict[str, int]] = {}
    for channel, own, box in page:
        each = sums.setdefault(channel, {"mailboxes": 0, "unread": 0})
        each["mailboxes"] += 1
        each["unread"] += unread(bus, channel, own, box)
    return ok(bus, f'"channels": {encode(sums)}{page.more}')
