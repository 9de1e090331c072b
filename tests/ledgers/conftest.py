"""Fronts in this process, on a ledger in memory."""
import contextlib

import pytest

from tests.kit.ledger import Clock, Fake, Log, end, front


@pytest.fixture
def log():
    return Log(Clock())


@pytest.fixture
def fronts(tmp_path, log):
    """front(name): a front with the copy NAME.db; again, after it was closed, the same one started anew."""
    with contextlib.ExitStack() as stack:

        def make(name="a", *options):
            bus = front(tmp_path / f"{name}.db", Fake(log), *options)
            stack.callback(lambda: bus.loop.sock.fileno() < 0 or end(bus))
            return bus

        yield make
