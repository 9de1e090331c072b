"""Figures for Prometheus at GET /metrics (PROTOCOL.md section 15)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from functools import partial
from itertools import chain

from bus_server import EVERYONE, Answer, Bus, Key, Mailbox, Metric, Page, Request, unread

TABLES, NOUN, OPERATIONS = None, "", ()
PASSED = 100  # expired messages of a name that one look passes over to find its oldest unread one; the next goes on


def options(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def start(bus: Bus, options: argparse.Namespace) -> None:
    bus.metrics.insert(0, lambda: totals(bus))
    bus.route("GET", "/metrics", lambda request: metrics(bus, request), "metrics for Prometheus")


def metrics(bus: Bus, request: Request) -> Answer:
    """Text for Prometheus. If there are more names than in a page, the header Bus-Next has the next `after`."""
    request.grant.check_operator()
    page = Page(bus, request, lambda own, box: own != EVERYONE)
    with bus.storms.parsing(request.owner(), 0):  # it pays for the time: 28 ms for 100 queues of 222 jobs
        waiting = [*by_name(bus, page)]
        found = [(*metric[:3], [*metric[3]]) for metric in chain(*(figures() for figures in bus.metrics))]
    headers = (("Bus-Next", json.loads(f"{{{page.more[2:]}}}")["next"]),) if page.more else ()
    text = "".join(
        f"# HELP agent_bus_{metric} {says}\n# TYPE agent_bus_{metric} {kind}\n"
        + "".join(f"agent_bus_{metric}{labels} {value:.16g}\n" for labels, value in values)
        for metric, kind, says, values in [*found, *waiting]
    )
    return Answer(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8", headers)


def totals(bus: Bus) -> Iterable[Metric]:
    figures = bus.figures
    refused = [(f'{{status="{status}"}}', number) for status, number in sorted(figures.refused.items())]
    return [
        ("sends_total", "counter", "sends that were committed, repeated ones too", [("", figures.sends)]),
        ("messages_total", "counter", "messages stored, one for each receiver", [("", figures.messages)]),
        ("delivered_total", "counter", "messages put into answers", [("", figures.delivered)]),
        ("refused_total", "counter", "answers of 400 and above, by status", refused),
        ("commits_total", "counter", "transactions", [("", figures.commits)]),
        ("commit_seconds_total", "counter", "time that all transactions took", [("", figures.commit_seconds)]),
        ("commit_seconds_max", "gauge", "time of the slowest transaction", [("", figures.slowest_commit)]),
        ("connections", "gauge", "open connections", [("", len(bus.door.connections))]),
        ("parked", "gauge", "connections that wait for a message", [("", len(bus.mailboxes.parked))]),
    ]


def by_name(bus: Bus, found: Iterable[tuple[str, str, Mailbox]]) -> Iterable[Metric]:
    now, waiting, ages, keys = bus.view.clock(), [], [], list[Key]()
    for channel, own, box in found:
        labels = f'{{channel="{channel}",name="{own}"}}'
        number = unread(bus, channel, own, box)
        mark = box.mark()
        look = partial(bus.view.look, channel, own, box.newest, PASSED)
        oldest = (bus.mailboxes.back(channel, own, mark)[1] or box.oldest(mark, now, look)[0]) if number else None
        bus.looks -= bool(number)
        waiting.append((labels, float(number)))
        ages.append((labels, max(now - oldest, 0) / 1000000 if oldest else 0.0))
        keys.append((channel, own))
    return [
        ("unread", "gauge", "messages for a name above its cursor", waiting),
        ("oldest_unread_seconds", "gauge", "age of the oldest unread message of a name", ages),
        *chain(*(figures(keys) for figures in bus.metrics_by_name)),
    ]
