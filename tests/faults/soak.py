"""Hours of a quiet day in minutes, or an hour of it: nothing is lost, and nothing grows."""
import contextlib
import statistics
import threading
import time

from tests.core.test_parked import cpu_seconds, footprint
from tests.faults import Result, unless
from tests.faults.crash import told
from tests.faults.history import Conversation
from tests.kit import new_client, old_client
from tests.kit.processes import Server

RATE = 300  # messages per second: 100,000 in 5.6 minutes, a million in an hour
SENDERS = 4  # to each reader
GROWTH = 4 << 20  # bytes of memory, and connections that happen to be open at once
CROWD = 12


def soak(directory, messages, rate=RATE):
    """Paced sends to a reader of each contract; what is older than a minute is removed. It is sampled all the time.

    What the bus has at the end of the first fifth, when it is warm, it may have in the last.
    """
    each, samples = messages // (2 * SENDERS), []
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        bus = stack.enter_context(Server(directory / "bus.db", "--keep", "60s"))
        talks = [stack.enter_context(Conversation(new_client, bus.url, "keeper")),
                 stack.enter_context(Conversation(old_client, bus.url, "veteran"))]  # fmt: skip
        for talk in talks:
            talk.listen()
            for number in range(SENDERS):
                talk.speak(f"{talk.name}-{number}", paced(each, rate / (2 * SENDERS)))
        patience = began + 60 + 3 * messages / rate
        while sum(len(talk.sent) for talk in talks) < each * 2 * SENDERS and time.monotonic() < patience:
            samples.append(footprint(bus.process))
            threading.Event().wait(messages / rate / 200)
        took, load = time.monotonic() - began, cpu_seconds(bus.process)
        found = [violation for talk in talks for violation in talk.finish()]
        found += unless(not bus.log.read_text(), f"on stderr: {bus.log.read_text()[:500]}")
    fifth = len(samples) // 5
    early, late = samples[fifth : 2 * fifth], samples[-fifth:]
    memory = [statistics.median(sample.memory for sample in part) for part in (early, late)]
    descriptors = [max(sample.descriptors for sample in part) for part in (early, late)]
    found += unless(memory[1] - memory[0] <= GROWTH, f"memory grew from {memory[0]:,.0f} to {memory[1]:,.0f} bytes")
    found += unless(descriptors[1] - descriptors[0] <= CROWD, f"descriptors: {descriptors[0]}, then {descriptors[1]}")
    return Result(
        f"{told(talks)} in {took:.0f} s ({load / took:.0%} of a CPU); memory {memory[0] / (1 << 20):.1f} MiB, then "
        f"{memory[1] / (1 << 20):.1f}; descriptors at most {descriptors[0]}, then {descriptors[1]}", found)


def paced(count, rate):
    """So many texts, no faster than `rate` a second."""
    began = time.monotonic()
    for number in range(count):
        threading.Event().wait(max(began + number / rate - time.monotonic(), 0))
        yield f"message {number}"
