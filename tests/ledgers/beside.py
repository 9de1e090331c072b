"""Two fronts on three nodes, beside NATS JetStream on three nodes, and beside who writes to that PostgreSQL directly.

In each round all are asked in turn, by clients of the same kind: CONNECTIONS send, each after its last answer. NATS is
asked at the node that leads the stream, where it is fastest, and fsyncs before each answer, as PostgreSQL does.
"""
import contextlib
import json
import multiprocessing
import pathlib
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from bench import load, peers, wires
from tests.kit.nodes import Nodes
from tests.kit.processes import wait_until

CONNECTIONS = 128
DIRECT = 80  # connections: PostgreSQL allows 100, and Patroni and both fronts have theirs
SECONDS = 4.0  # of each load
WAKES = 200  # single sends, one after the other
TABLE = "CREATE TABLE IF NOT EXISTS beside (number bigserial PRIMARY KEY, body text NOT NULL)"
INSERT = "INSERT INTO beside (body) VALUES (%s)"
STREAM = {**peers.NatsPeer.stream, "num_replicas": 3}


class NatsNode(peers.NatsPeer):
    """One of three."""

    def __init__(self, folder, name, route, routes):
        super().__init__(folder)
        self.name, self.route, self.routes = name, route, routes

    def command(self):
        command, config = super().command(), self.folder / "nats.conf"
        routes = ", ".join(f'"nats://127.0.0.1:{each}"' for each in self.routes)
        cluster = f'cluster {{ name: three, listen: "127.0.0.1:{self.route}", routes: [{routes}] }}'
        config.write_text(f"{config.read_text()}server_name: {self.name}\n{cluster}\n")
        return command

    def start(self):
        peers.Peer.start(self)


class Nats:
    """Three nodes with one stream, of which each has a copy."""

    def __init__(self, folder):
        routes = [peers.free_port() for _ in range(3)]
        self.nodes = [
            NatsNode(folder / f"n{number}", f"n{number}", route, routes) for number, route in enumerate(routes)
        ]

    def __enter__(self):
        for node in self.nodes:
            node.start()
        wait_until(lambda: "error" not in self.ask("STREAM.CREATE.BUS", STREAM), 60)
        name = wait_until(lambda: self.ask("STREAM.INFO.BUS").get("cluster", {}).get("leader"), 60)
        [self.leader] = [node for node in self.nodes if node.name == name]
        self.other = next(node for node in self.nodes if node.name != name)
        return self

    def __exit__(self, *_):
        for node in self.nodes:
            node.stop()

    def ask(self, call, body=None):
        """Before the nodes have a leader they may give no answer."""
        wire = self.nodes[0].wire
        with contextlib.suppress(OSError, wires.Refused), load.Line(wire, self.nodes[0].port) as line:
            line.peer.settimeout(1)
            answer = line.exchange(wire.publish(f"$JS.API.{call}", json.dumps(body).encode() if body else b"", 1))
            return json.loads(answer[answer.index(b"{") :])
        return {"error": "no answer"}

    def sends(self):
        return rate([(self.leader.port, self.leader.wire, CONNECTIONS, "n")])

    def wakes(self):
        """A consumer that the stream pushes to, connected to another node."""
        wire = self.leader.wire
        config = {"deliver_subject": "woken", "filter_subject": "bus.woken", "ack_policy": "none"}
        assert "error" not in self.ask("CONSUMER.CREATE.BUS", {"stream_name": "BUS", "config": config})
        with load.Line(wire, self.other.port) as reader, load.Line(wire, self.leader.port) as sender:
            reader.ask(b"SUB woken 2\r\n")

            def woken():
                while b"bus.woken" not in reader.answer():  # the acknowledgement of the send, which comes here as well
                    pass
                return True

            return medians(lambda number: sender.exchange(wire.send("woken", 1)), woken)


class Fronts:
    """Two of them, each on a node of its own, with half of the connections."""

    def __init__(self, nodes, folder):
        self.buses = [nodes.front(folder / f"{name}.db") for name in "ab"]

    def __enter__(self):
        for bus in self.buses:
            bus.start()
        return self

    def __exit__(self, *errors):
        for bus in self.buses:
            bus.__exit__(*errors)

    def sends(self):
        half = CONNECTIONS // 2
        return rate([(bus.port, wires.Http(bus.port), half, name) for bus, name in zip(self.buses, "ab")])

    def wakes(self):
        """The reader is at the other front."""
        at, to = (wires.Http(bus.port) for bus in self.buses)
        with load.Line(to, self.buses[1].port) as reader, load.Line(at, self.buses[0].port) as sender:
            cursor = [to.cursor(reader.exchange(to.get("/recv?to=woken&since=now")))]

            def woken():
                cursor[0] = to.cursor(reader.answer())
                return cursor

            def send(number):
                return sender.exchange(at.send("woken"))

            return medians(send, woken, lambda: reader.ask(to.wait("woken", cursor[0])))


class Direct:
    """INSERT, one row a transaction, at the node that leads."""

    def __init__(self, url):
        self.url = url

    def sends(self):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(inserts, (self.url,))

    def wakes(self):
        body = wires.message("woken").decode()
        with connected(self.url) as connection:
            return medians(lambda number: connection.execute(INSERT, [body]))


def connected(url):
    """To the node that leads."""
    import psycopg

    return psycopg.connect(url, autocommit=True, target_session_attrs="read-write")


def inserts(url):
    over, counts = threading.Event(), []

    def insert(number):
        body, count = wires.message(f"d-{number}").decode(), 0
        with connected(url) as connection:
            together.wait()
            while not over.is_set():
                connection.execute(INSERT, [body], prepare=True)
                count += 1
        counts.append(count)

    together = threading.Barrier(DIRECT + 1, timeout=60)
    with ThreadPoolExecutor(DIRECT) as pool:
        work = [pool.submit(insert, number) for number in range(DIRECT)]
        together.wait()
        began = time.monotonic()
        over.wait(SECONDS)
        over.set()
        taken = time.monotonic() - began
        for each in work:
            each.result()
    return sum(counts) / taken


def to_its_own(wire, number, prefix):
    """A name for each connection, so that no mailbox is full."""
    request = wire.send(f"{prefix}-{number}", number)
    while True:
        yield request


def rate(loads):
    """Sends a second, together."""
    with ThreadPoolExecutor(len(loads)) as pool:
        work = [
            pool.submit(load.closed_loop, port, wire, connections, SECONDS, to_its_own, prefix)
            for port, wire, connections, prefix in loads
        ]
        return sum(each.result().rate for each in work)


def medians(send, woken=None, before=lambda: None):
    """(ms until a send is answered, ms until its reader has it or None)."""
    answered, came = [], []
    with ThreadPoolExecutor(1) as pool:
        for number in range(WAKES):
            before()
            reader = pool.submit(lambda: woken() and time.monotonic()) if woken else None
            began = time.monotonic()
            send(number)
            answered.append(time.monotonic() - began)
            if reader:
                came.append(reader.result(20) - began)
    return [statistics.median(each) * 1000 if each else None for each in (answered, came)]


def beside(rounds):
    """Print what each of them did in so many rounds."""
    if NatsNode.missing():
        print(f"without NATS: {NatsNode.missing()}")
        return
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        nodes = stack.enter_context(Nodes())
        nodes.whole()
        with connected(nodes.url) as connection:
            connection.execute(TABLE)
        fronts, nats = stack.enter_context(Fronts(nodes, folder)), stack.enter_context(Nats(folder / "nats"))
        all_of_them = {"two fronts": fronts, "NATS JetStream": nats, "PostgreSQL directly": Direct(nodes.url)}
        for name, each in all_of_them.items():  # before the loads, which leave sends that are not answered
            answered, came = each.wakes()
            reader = f", and its reader elsewhere has it after {came:.1f} ms" if came else ""
            print(f"{name}: a send alone is answered in {answered:.1f} ms{reader}", flush=True)
        rates = {name: [] for name in all_of_them}
        for _ in range(rounds):
            for name, each in all_of_them.items():
                rates[name].append(each.sends())
        for name, its in rates.items():
            ratio = statistics.median(ours / theirs for ours, theirs in zip(rates["two fronts"], its))
            middle = f"{statistics.median(its):,.0f} sends/s ({min(its):,.0f} to {max(its):,.0f})"
            print(f"{name}: {middle}, ours are {ratio:.2f}x")
