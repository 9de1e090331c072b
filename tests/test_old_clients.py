"""Clients of the first contract, unmodified: each message once, in order, whatever happens to the bus or the clocks."""
import json
import os
import time

import pytest

from tests import old_client
from tests.history import Conversation, get
from tests.processes import Server, wait_until

SENDERS, EACH = 8, 1000
CRASH = "kill -9, and a new start"
TROUBLE = [CRASH, -600, CRASH, +300, CRASH]  # spread over the sends; a number is by how much the bus's clock is wrong


class SteppedServer(Server):
    """A server whose wall clock is wrong by as many seconds as `step` said."""

    def __init__(self, db):
        self.error = db.with_suffix(".error")
        self.error.write_text("0")
        super().__init__(db, script="tests/stepped_server.py", env={"CLOCK_ERROR": str(self.error)})

    def step(self, error):
        """Returns when the bus has answered a poll of bob by its new clock."""
        fresh = self.error.with_suffix(".new")
        fresh.write_text(str(error))
        os.replace(fresh, self.error)
        wait_until(lambda: abs(self.polled("bob") - time.time() - error) < 60)

    def polled(self, name):
        """When this name polled last, by the clock of the bus; 0 for never."""
        agents = json.loads(self.get("/agents"))["agents"]
        return max((agent["last_seen"] for agent in agents if agent["name"] == name), default=0)


def speak(conversation, each):
    for number in range(SENDERS):
        conversation.speak(f"sender-{number}", [f"message {count}" for count in range(each)])


def crash(bus):
    bus.kill()
    bus.start()


@pytest.mark.parametrize("skew", [0, 120, -120], ids=["right", "ahead", "behind"])
def test_an_old_client_loses_nothing_when_the_clock_steps_and_the_server_is_killed(tmp_path, skew):
    with SteppedServer(tmp_path / "bus.db") as bus, Conversation(old_client, bus.url, "bob") as talk:
        talk.listen(skew=skew)
        wait_until(lambda: abs(get(bus.url, "/healthz")["now"] - time.time() - skew) < 60)
        crash(bus)  # the bus had taken over the cursor of its reader, and this is on disk
        speak(talk, EACH)
        for place, event in enumerate(TROUBLE, 1):
            talk.wait_for_sends(place * SENDERS * EACH // (len(TROUBLE) + 1))
            if event is CRASH:
                crash(bus)
            else:
                bus.step(event)
        assert talk.finish() == []
        assert sum(each.tick is None for each in talk.sent) < SENDERS * EACH / 10, "most sends are acknowledged"


def test_an_old_client_gets_what_was_queued_before_it_came(tmp_path):
    with Server(tmp_path / "bus.db") as bus, Conversation(old_client, bus.url, "bob") as talk:
        speak(talk, 5000 // SENDERS)
        talk.wait_for_senders()
        crash(bus)
        talk.listen(since=0)
        assert talk.finish() == []
        assert all(each.tick for each in talk.sent)
