"""The faults of three nodes and two fronts: what each must hold to, and what runs it.

A row is a function of an empty folder and a size, and comes to a Result. It starts three nodes with deploy/cluster/ and
two fronts, lets conversations go on across them, and harms them so often. A stroke of harm is over when somebody can
send again; then it is mended, and the next comes when all three nodes work together.
"""
import contextlib
import io
import random
import signal
import statistics
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, Optional

from tests.faults import Result, unless
from tests.faults.history import background, observed, violations
from tests.kit.nodes import PARTS, Nodes
from tests.kit.processes import PATIENCE, ROOT, SERVER, comes_true, wait_until
from tests.ledgers import crowd, made_anew, readme
from tests.ledgers.storm import CALM, Pulse, crash, storm
from tests.ledgers.test_cluster import copies, status
from tests.ledgers.test_cluster import failed as checks_failed

TTL = 20  # s, of patroni.yml
WITHIN = TTL + 5  # s
REFUSES = 5.5  # s after it lost the ledger, a front answers 503: 5, and one look
CUT = 32  # s that a network is cut: longer than a standby waits before it leads
AFTER_CUT = TTL + 10  # s: who asks a machine that is cut off waits for an answer; one that is dead refuses at once
THIS = "-c", SERVER  # the program of a front


class World:
    """Three nodes, two fronts, and who sends at both, at the first, and at the second."""

    def __init__(self, place, nodes, a, b):
        self.place, self.nodes, self.a, self.b = place, nodes, a, b
        self.both, self.at_a, self.at_b = self.pulses = Pulse("both", a, b), Pulse("at-a", a), Pulse("at-b", b)
        self.silences, self.found, self.program = [], [], THIS

    def miss(self, holds, sentence):
        if not holds:
            self.found.append(sentence)

    def print_logs(self):
        for bus in (self.a, self.b):
            print(f"    {bus.db}: {bus.log.read_text()[-2000:]}")

    def stroke(self, harm, *further):
        """`harm(self)` returns what mends it, or None."""
        began = time.monotonic()
        mend = harm(self, *further)
        self.both.goes_on()
        self.silences.append(self.both.silence(began))
        if mend:
            mend()
        self.nodes.whole()
        for pulse in self.pulses:
            pulse.goes_on()

    def storm(self, count, within, harm, *further):
        """The Result of so many strokes. A front with a new copy is the last judge: it has what the ledger has."""
        result = storm([self.a, self.b], [partial(self.stroke, harm, *further)] * count, self.pulses, CALM)
        longest = max(self.silences)
        self.miss(longest <= within, f"nobody could send for {longest:.1f} s")
        with self.nodes.front(self.place / "new.db", self.nodes["m1"], program=self.program) as new:
            try:
                copies(self.a, self.b, new)
            except AssertionError:
                self.found.append("the copies of the fronts are not equal")
        middle = f", {statistics.median(self.silences):.1f} s as the median" if count > 2 else ""
        return Result(f"{result.figures}; no send for {longest:.1f} s at most{middle}", result.violations + self.found)


@contextlib.contextmanager
def world(place, networks=False, options=(), program=THIS):
    with Nodes(networks) as nodes, contextlib.ExitStack() as stack:
        fronts = [
            nodes.front(place / f"{name}.db", nodes[node], *options, program=program)
            for name, node in (("a", "m1"), ("b", "m2"))
        ]
        its = World(place, nodes, *map(stack.enter_context, fronts))
        stack.callback(lambda: [pulse.over.set() for pulse in its.pulses])
        try:
            yield its
        except Exception:
            its.print_logs()
            raise


# Processes end


def leader_dies(its):
    node = its.nodes.leader()
    node.kill()
    return node.start


def standby_dies(its):
    node = random.choice(its.nodes.others(its.nodes.leader()))
    node.kill()
    return node.start


def all_die(its):
    for node in its.nodes.nodes:
        node.kill()
    for node in its.nodes.nodes:
        node.start()


def everything_dies(its):
    """The fronts too."""
    for bus in (its.a, its.b):
        bus.kill()
    all_die(its)
    for bus in (its.a, its.b):
        wait_until(lambda: starts(bus), 60)  # noqa: B023


def starts(bus):
    """A front that cannot reach its ledger ends; whoever keeps it running starts it again."""
    with contextlib.suppress(AssertionError):
        return bus.start()
    bus.reap()
    return None


def part_of_leader_dies(its, part):
    """Of PostgreSQL, Patroni starts it again; Patroni itself stays away for longer than the others wait."""
    node = its.nodes.leader()
    node.kill([part])
    if part == "patroni":
        time.sleep(WITHIN + 5)
        return node.start
    return None


def front_dies(its):
    crash(random.choice([its.a, its.b]))


# Processes stand still


def leader_freezes(its, seconds, parts=PARTS):
    node = its.nodes.leader()
    node.freeze(parts)
    time.sleep(seconds)
    node.thaw(parts)


def front_freezes(its, seconds):
    bus = random.choice([its.a, its.b])
    bus.process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    bus.process.send_signal(signal.SIGCONT)


# Networks are cut


class Health:
    """When each front began to answer 503, in s from now."""

    def __init__(self, *buses):
        self.began, self.over, self.refused = time.monotonic(), threading.Event(), {}
        self.work = [background(self.look, bus) for bus in buses]

    def look(self, bus):
        while not self.over.wait(0.05):
            if status(bus.url, "/healthz") == 503:
                self.refused.setdefault(bus, time.monotonic() - self.began)

    def end(self):
        self.over.set()
        for each in self.work:
            each.result(30)


def partition(its, leader, cut, minority):
    """Let this node lead, and cut networks for CUT s; `minority` are the fronts that have lost the others."""
    its.nodes.lead(its.nodes[leader])
    health = Health(its.a, its.b)
    cut(its.nodes.networks, *its.nodes.nodes)
    cut_off = time.monotonic()
    time.sleep(CUT)
    healed = time.monotonic()
    health.end()
    for bus, pulse in ((its.a, its.at_a), (its.b, its.at_b)):
        if bus in (getattr(its, name) for name in minority):
            after = health.refused.get(bus, CUT)
            its.miss(after <= REFUSES, f"the front that was cut off answered 503 after {after:.1f} s")
            known = pulse.acknowledged(cut_off + 0.2, healed)
            its.miss(not known, f"a front that was cut off acknowledged {known}")
    its.both.goes_on()  # before the network is whole
    its.nodes.networks.heal()


def flap(networks, m1, m2, m3):
    for _ in range(5):
        networks.apart(m1, m2, m3)
        time.sleep(3)
        networks.heal()
        time.sleep(3)


def etcd_apart(networks, m1, m2, m3):
    networks.apart(m1, m2, m3, ports=m1.nodes.ports[:2])


# A commit waits for its quorum

WAITING = "SELECT {} FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND usename = 'bus'"


@contextlib.contextmanager
def no_quorum(its, leader):
    """Both standbys stand still, so that no commit can end; nothing may be acknowledged meanwhile."""
    standbys = its.nodes.others(leader)
    for node in standbys:
        node.freeze(["postgres"])
    began = time.monotonic()
    wait_until(lambda: leader.ask(WAITING.format("count(*)")) != ["0"])
    try:
        yield
    finally:
        known = sum(pulse.acknowledged(began + 0.2, time.monotonic()) for pulse in its.pulses)
        its.miss(not known, f"{known} acknowledged by one node alone")
        for node in standbys:  # what the leader sent meanwhile is not even in their sockets: Patroni starts them anew
            node.kill(["postgres"])


def wait_is_ended(its, how):
    """For 3 s each wait for the second node is ended by hand."""
    leader = its.nodes.leader()
    with no_quorum(its, leader):
        for _ in range(30):
            leader.ask(WAITING.format(f"{how}(pid)"))
            time.sleep(0.1)


def server_ends(its):
    """PostgreSQL of the leader is shut down and started again while commits wait for their quorum."""
    leader = its.nodes.leader()
    with no_quorum(its, leader):
        leader.signal(signal.SIGINT, ["postgres"])
        time.sleep(5)


def leader_is_lost_with_what_waited(its):
    leader = its.nodes.leader()
    with no_quorum(its, leader):
        time.sleep(3)
        leader.kill()
    return leader.start


# Standbys that are behind


def one_is_behind(its):
    """A standby stands still, the others go on for 5 s and die; it must not lead until one of them is back."""
    leader = its.nodes.leader()
    behind, other = its.nodes.others(leader)
    behind.freeze(["postgres", "patroni"])
    time.sleep(5)
    for node in (leader, other):
        node.kill(["patroni", "postgres"])  # etcd lives, so that somebody could be elected
    died = time.monotonic()
    behind.thaw()

    def leads():
        return its.nodes.members(behind).get(behind.name, {}).get("role") == "leader"

    its.miss(not comes_true(leads, TTL + 15), "a standby that was behind leads")
    known = sum(pulse.acknowledged(died + 0.2, time.monotonic()) for pulse in its.pulses)
    its.miss(not known, f"{known} acknowledged by a standby that was behind")
    leader.start()
    other.start()


def leader_is_lost(place, size, quorum="quorum"):
    """Both standbys stand still, sends go on if they can, and the leader is lost for ever: what is there then?"""
    with world(place, options=() if quorum == "quorum" else ["--ledger-single"]) as its:
        leader = its.nodes.leader()
        if quorum == "off":
            its.nodes.tell(leader, "PATCH", "config", synchronous_mode="off")
            wait_until(lambda: leader.ask("SHOW synchronous_standby_names") == [""])
        its.both.goes_on()
        standbys = its.nodes.others(leader)
        for node in standbys:
            node.freeze(["postgres"])
        time.sleep(3)
        leader.kill()
        for node in standbys:  # else they find in their sockets what the leader has sent meanwhile
            node.kill(["postgres"])
        wait_until(lambda: its.nodes.leader(*standbys) is not leader, 60)
        for pulse in its.pulses:
            pulse.over.set()
        sent = [each for pulse in its.pulses for each in pulse.history()]
        with its.nodes.front(place / "new.db", None, *(() if quorum == "quorum" else ["--ledger-single"])) as new:
            known = sum(each.tick is not None for each in sent)
            return Result(f"{known:,} acknowledged", violations(sent, observed(new.url)))


# Fronts are exchanged

HEADS = "SELECT DISTINCT convert_from(substring(entry FOR 2), 'UTF8') FROM agent_bus_ledger WHERE position > 0"


def before(place):
    """The program of the version before this one: what a front runs was changed since."""
    changed = ["git", "log", "-2", "--format=%h", "--", "bus_server.py", "bus_extensions", "ledgers"]
    commit = subprocess.run(changed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()[-1]
    packed = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as files:
        files.extractall(place / commit)
    return "-c", SERVER.replace(repr(str(ROOT)), repr(str(place / commit)))


def following(copy):
    """The program of the version after this one; `copy` is a class of newer.py."""
    change = f"import ledgers.start; from tests.ledgers.newer import {copy}; ledgers.start.Mirror = {copy}; sys.exit"
    return "-c", SERVER.replace("sys.exit", change)


def is_newer_written(its):
    return "[2" in its.nodes.leader().ask(HEADS)


def front_is_exchanged(its, coming):
    """As docs/cluster.md says: stop it, start it with the other program, and wait until it answers 200."""
    bus, its.program = next(coming)
    its.miss(not is_newer_written(its), "an entry of format 2 was written while a front did not understand it")
    code = bus.stop()
    its.miss(code == 0, f"a front ended with {code}")
    bus.command = [sys.executable, *its.program, *bus.command[bus.command.index("--port") :]]
    bus.start()
    wait_until(lambda: status(bus.url, "/healthz") == 200)
    for pulse in its.pulses:
        pulse.goes_on(PATIENCE)


def upgrade(place, size, first=None, last="Newer"):
    """Both fronts, one after the other: to this version and back, and so on, and at last to the one after this."""
    first = first or before(place)
    with world(place, program=first) as its:
        programs = [*[THIS, first] * (size - 1), THIS, following(last)]
        coming = ((bus, program) for program in programs for bus in (its.a, its.b))
        try:
            result = its.storm(2 * len(programs), WITHIN, front_is_exchanged, coming)
        except AssertionError as error:  # a front serves no more, or does not start
            its.print_logs()
            return Result("it went no further", [*its.found, f"an error that no retry mends: {error}"])
        found = unless(is_newer_written(its), "no entry of format 2 was written")
        failed = sum((pulse.failed for pulse in its.pulses), Counter())
        found += unless(failed.keys() <= {503, "no answer"}, f"answers: {dict(failed)}")
        return Result(f"{result.figures}; {sum(failed.values())} attempts failed", result.violations + found)


def conformance(place, size):
    (place / "files").mkdir()
    with world(place, options=["--files-dir", str(place / "files")]) as its:
        found = []
        for pulse in its.pulses:
            pulse.end()
        for bus in (its.a, its.b):
            failed, printed = checks_failed(bus.url)
            found += [f"{check} failed: {printed[-2000:]}" for check in failed]
        return Result("at both fronts", found)


# The table


class Row(NamedTuple):
    name: str  # on the command line
    fault: str
    bar: str
    run: Callable[[Path, int], Result]
    full: int  # times, messages, readers
    control: Optional[Callable[[Path], Result]] = None  # has the fault on purpose, and must be found out
    networks: bool = False  # it needs networks of its own


def row(name, full, fault, harm, *further, bar="", within=WITHIN, networks=False):
    def run(place, size):
        with world(place, networks) as its:
            return its.storm(size, within, harm, *further)

    return Row(name, fault, f"{NOTHING}{bar}", run, full, None, networks)


def cut(name, fault, leader, harm, *minority):
    refuses = "; a front that was cut off acknowledges nothing, and answers 503 within 5 s" if minority else ""
    within = 2 * CUT if name == "flapping" else AFTER_CUT
    bar = f"{refuses}; sends again within {within} s"
    return row(f"cut-{name}", 5, f"{fault}, for {CUT} s", partition, leader, harm, minority, bar=bar, within=within,
               networks=True)  # fmt: skip


NOTHING = "the common bar"
AGAIN = f"; sends again within {WITHIN} s"
ROWS = [
    Row("conformance", "none: `test_bus.py` at each front", "all pass", conformance, 1),
    row("kill-leader", 30, "kill -9 of the whole leading node", leader_dies, bar=AGAIN),
    row("kill-standby", 30, "kill -9 of a whole standby", standby_dies, bar=AGAIN),
    row("kill-all", 5, "kill -9 of all three nodes at once", all_die, bar=AGAIN),
    row("kill-everything", 3, "kill -9 of all three nodes and both fronts at once", everything_dies, bar=AGAIN),
    row("kill-postgres", 5, "kill -9 of the leader's PostgreSQL alone", part_of_leader_dies, "postgres", bar=AGAIN),
    row("kill-patroni", 1, "kill -9 of the leader's Patroni alone", part_of_leader_dies, "patroni", bar=AGAIN),
    row("kill-front", 100, "kill -9 of a front", front_dies),
    row("stop-leader-5", 2, "SIGSTOP of the whole leading node for 5 s", leader_freezes, 5, bar=AGAIN),
    row("stop-leader-10", 2, "SIGSTOP of the whole leading node for 10 s", leader_freezes, 10, bar=AGAIN),
    row("stop-leader-32", 1, "SIGSTOP of the whole leading node for 32 s", leader_freezes, 32, bar=AGAIN),
    row("stop-patroni-32", 1, "SIGSTOP of the leader's Patroni alone for 32 s", leader_freezes, 32, ["patroni"],
        bar=AGAIN),
    row("stop-front-10", 3, "SIGSTOP of a front for 10 s", front_freezes, 10),
    cut("leader-alone", "the leader reaches nobody", "m3", lambda net, m1, m2, m3: net.apart(m3, m1, m2)),
    cut("leader-with-front", "the leader and a front reach nobody", "m1",
        lambda net, m1, m2, m3: net.apart(m1, m2, m3), "a"),
    cut("standby-with-front", "a standby and a front reach nobody", "m1",
        lambda net, m1, m2, m3: net.apart(m2, m1, m3), "b"),
    cut("one-way", "nobody hears the leader, which hears all", "m1", lambda net, m1, m2, m3: net.cut(m1, m2, m3), "a"),
    cut("etcd", "the etcd of the leader reaches nobody, nor does the leader reach other etcd", "m1", etcd_apart),
    cut("flapping", "the leader reaches nobody, then all, each for 3 s", "m1", flap),
    row("cancel", 3, "for 3 s each commit that waits for its quorum is canceled", wait_is_ended, "pg_cancel_backend",
        bar="; no answer 200 meanwhile"),
    row("terminate", 3, "the same with pg_terminate_backend", wait_is_ended, "pg_terminate_backend",
        bar="; no answer 200 meanwhile"),
    row("shutdown", 3, "PostgreSQL is shut down while commits wait", server_ends, bar="; no answer 200 meanwhile"),
    row("kill-waiting", 1, "both standbys stand still for 3 s, then the leader dies", leader_is_lost_with_what_waited,
        bar="; no answer 200 meanwhile"),
    row("behind", 1, "a standby that is 5 s behind is the only one left", one_is_behind,
        bar="; it never leads", within=90),
    Row("leader-lost", "the leader dies for ever while both standbys stand still", "nothing acknowledged is lost",
        leader_is_lost, 1, lambda place: leader_is_lost(place, 1, "off")),
    Row("upgrade", "a front is stopped and started as another version: both from the commit before to this one and "
        "back, twice, then to this one, then to one that has format 2", f"{NOTHING}; each error is mended by a retry; "
        "format 2 is written when both fronts understand it, and not before", upgrade, 3,
        lambda place: upgrade(place, 1, THIS, "Hasty")),
    Row("copy", "a front was away for 1,000,000 messages; then its copy is removed; then its copy is damaged, and it "
        "begins with one of the other front", f"it answers 200 within {made_anew.READY} s and the time of the copy, "
        "and not before it has all; of the damaged copy it says so, and ends", made_anew.made_anew, 1000000,
        made_anew.unready),
    Row("readers", "10,000 readers wait at two fronts, half of them at each; kill -9 of one front", "each gets at the "
        "other front what is sent at once and what is sent later; a front has at most "
        f"{crowd.ENGINE} connections to PostgreSQL", crowd.front_dies, 10000, crowd.begin_anew),
    Row("readme", "three networks, and the commands of deploy/cluster/README.md: to a message that survives `kill -9` "
        "of the leading node and of the front it was sent to", "under 15 minutes, installing and reading not counted",
        readme.by_its_own_text, 1, None, True),
]  # fmt: skip
