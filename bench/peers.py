"""The servers that are measured: each is started in a folder of its own, on a free port of the loopback, and stopped.

A class each. `missing` says why it cannot run here; `durable` is what its 200 is worth. `mark` and `stored` count what
it has on disk, so that a figure is compared with what was really kept.
"""
from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import re
import select
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, ClassVar

from bench import load, machine, wires

HERE = pathlib.Path(__file__).resolve().parent
PATIENCE = 60  # s for a server to start or to stop; ten million messages included
AT_ONCE = 1000  # messages in a request that is not measured; one has at most 256 KiB
DESCRIPTORS = 19000  # connections we ask a server to allow; some systems give a process 20000 descriptors


class Unavailable(Exception):
    """A peer that did not start; what it said."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def output(*command: str) -> str:
    """What a command prints about itself, on whichever stream."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout.strip()


class Peer:
    """One server process. `load` has the generator that fits its wire."""

    name: str
    program: ClassVar[str]
    durable = "no"  # what is on the disk when a send is answered
    period = 0.0  # s between two looks of a server that is not told of a message
    wire: Any

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @classmethod
    def missing(cls) -> str:
        return "" if shutil.which(cls.program) else f"{cls.program} is not installed"

    @classmethod
    def version(cls) -> str:
        return output(cls.program, "--version").splitlines()[0]

    def command(self) -> list[str]:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        return {**os.environ}

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / "log"
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                self.command(), cwd=self.folder, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                env=self.environment())
        deadline = time.monotonic() + PATIENCE
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise Unavailable(f"{self.name} did not start: {log.read_text(errors='replace')[-500:]}")
            time.sleep(0.002)

    def answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def pids(self) -> list[int]:
        assert self.process
        return machine.tree(self.process.pid)

    def ask(self, *requests: bytes) -> bytes:
        """The last answer, on a connection of its own."""
        with load.Line(self.wire, self.port) as line:
            return [line.exchange(request) for request in requests][-1]

    def sends(self, connections: int, seconds: float) -> load.Count:
        """Single sends for a while, each after the one before was answered, on so many connections."""
        raise NotImplementedError

    def cursor(self) -> str:
        """Where a reader begins that wants only what is new."""
        return ""

    def audience(self, count: int) -> list[str]:
        """What so many readers wait for who all get what is sent to `all`."""
        return ["all"] * count

    def mark(self) -> int:
        return 0

    def stored(self, mark: int) -> int | None:
        """How many messages it has kept since then; None if it does not say."""
        return None


class HttpPeer(Peer):
    """Asked by wrk."""

    def sends(self, connections: int, seconds: float) -> load.Count:
        return load.wrk(self.port, [self.wire.send("dell")], connections, seconds)


class AgentBus(HttpPeer):
    """Ours, as users run it: open, checksums and limits on. A sender may send 50 messages/s, so a load needs --rate 0.

    The limits include 10,000 messages that nobody has fetched, so its names have a reader: `load.Reader`.
    """

    durable = "fsync"
    rate = ("--rate", "0")
    listeners = ("dell", *(f"agent-{number}" for number in range(15)))

    def __init__(self, folder: pathlib.Path, python: str = sys.executable, db: pathlib.Path | None = None) -> None:
        super().__init__(folder)
        self.python, self.db = python, db or folder / "bus.db"
        self.name = f"agent-bus, Python {python_version(python)}"
        self.wire = wires.Http(self.port)

    @classmethod
    def missing(cls) -> str:
        return ""

    def command(self) -> list[str]:
        return [self.python, str(machine.ROOT / "bus_server.py"), "--port", str(self.port), "--db", str(self.db),
                *self.rate]

    def sends(self, connections: int, seconds: float) -> load.Count:
        return self.requests([self.wire.send("dell")], connections, seconds)

    def requests(
        self, requests: Sequence[bytes], connections: int, seconds: float, names: Sequence[str] = ("dell",)
    ) -> load.Count:
        """Any sends, to names that have a reader: without one, and above 10,000 messages each, they are refused."""
        with load.Reader(self.port, self.wire, names):
            return load.wrk(self.port, requests, connections, seconds)

    def deliver(self, to: Sequence[str]) -> None:
        """A message to each of these names, before what is measured."""
        for start in range(0, len(to), AT_ONCE):
            self.ask(self.wire.post("/send", wires.batch(to[start : start + AT_ONCE])))

    def cursor(self) -> str:
        return str(self.wire.cursor(self.ask(self.wire.get("/recv?to=bench&since=now"))))

    def audience(self, count: int) -> list[str]:
        return [f"reader-{number}" for number in range(count)]

    def mark(self) -> int:
        return int(self.query("SELECT ifnull(max(tick), 0) FROM messages"))

    def stored(self, mark: int) -> int | None:
        return int(self.query(f"SELECT count(*) FROM messages WHERE tick > {mark}"))

    def query(self, statement: str) -> Any:
        with contextlib.closing(sqlite3.connect(f"file:{self.db}?mode=ro", uri=True)) as database:
            return database.execute(statement).fetchone()[0]


class DefaultBus(AgentBus):
    """The same with its default rate, for as many senders as it takes to stay below it."""

    rate = ()

    def __init__(self, folder: pathlib.Path, python: str = sys.executable) -> None:
        super().__init__(folder, python)
        self.name += ", default --rate"


class TokenBus(AgentBus):
    """The same with tokens: everyone shows one, everywhere."""

    def __init__(self, folder: pathlib.Path, python: str = sys.executable) -> None:
        super().__init__(folder, python)
        self.name += ", with tokens"

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        server = [self.python, str(machine.ROOT / "bus_server.py")]
        invitation = output(*server, "invite", "spark", "--operator", "--db", str(self.db), "--url", "http://bus")
        token = next(word for word in invitation.split() if word.startswith("abt_"))
        self.wire = wires.Http(self.port, token)
        super().start()


class ManyNames(AgentBus):
    """The same with sends to many names in turn. `what` tells it from the others; `key` is a placeholder of wires.

    Before it is measured each name gets a message, for which the bus makes the name, and a second one, at which it
    counts what nobody has fetched: once, whatever follows.
    """

    READ = 400  # names that have a reader; where there are more, none is full after some minutes without one

    def __init__(
        self, folder: pathlib.Path, python: str = sys.executable, db: pathlib.Path | None = None, *,
        names: Sequence[str], what: str, key: str = "",
    ) -> None:
        super().__init__(folder, python, db)
        self.name += f", {what}"
        self.names = names
        self.each = [self.wire.post("/send", wires.message(name, key=key)) for name in names]

    def start(self) -> None:
        super().start()
        for _ in range(2):
            self.deliver(self.names)

    def sends(self, connections: int, seconds: float) -> load.Count:
        return self.requests(self.each, connections, seconds, self.names[: self.READ])


class QueueBus(AgentBus):
    """The same with workers: what it has stored since a mark is that jobs are done."""

    def mark(self) -> int:
        return int(self.query("SELECT count(*) FROM work WHERE due IS NULL"))

    def stored(self, mark: int) -> int | None:
        return self.mark() - mark


class ThreadedBus(HttpPeer):
    """What is widely copied. It speaks HTTP/1.0 as http.server does by default: a connection for each request."""

    name = "http.server, a thread each"
    period = 0.5

    def __init__(self, folder: pathlib.Path, python: str = sys.executable) -> None:
        super().__init__(folder)
        self.python = python
        self.wire = wires.Http(self.port, keeps=False)

    @classmethod
    def missing(cls) -> str:
        return ""

    @classmethod
    def version(cls) -> str:
        return f"Python {python_version(sys.executable)}"

    def command(self) -> list[str]:
        return [self.python, str(HERE / "threaded_bus.py"), str(self.port)]

    def cursor(self) -> str:
        return f"{time.time():.6f}"


class SqlitePeer(HttpPeer):
    """What it stored lies in the table `messages` of a database in its folder."""

    database: str
    count: str  # in SQL, of all that was ever stored

    def mark(self) -> int:
        with contextlib.closing(sqlite3.connect(f"file:{self.folder}/{self.database}?mode=ro", uri=True)) as database:
            return int(database.execute(f"SELECT {self.count} FROM messages").fetchone()[0])

    def stored(self, mark: int) -> int | None:
        return self.mark() - mark


class LeastServer(SqlitePeer):
    """A limit, and no peer: SQLite and an answer, on one connection, with the thread for commits that the bus has."""

    durable, database, count = "fsync", "least.db", "count(*)"
    where = "thread"

    def __init__(self, folder: pathlib.Path, python: str = sys.executable) -> None:
        super().__init__(folder)
        self.python = python
        self.name = f"one INSERT in a {self.where}, one answer"
        self.wire = wires.Http(self.port)

    @classmethod
    def missing(cls) -> str:
        return "" if hasattr(select, "epoll") else "it needs epoll"

    def command(self) -> list[str]:
        path = str(self.folder / self.database)
        return [self.python, str(HERE / "least_server.py"), str(self.port), path, self.where]


class LeastLoop(LeastServer):
    """And the same without the thread."""

    where = "loop"


class StarletteBus(SqlitePeer):
    """One commit for each send, in a process of the Python that runs the bench."""

    name = "Starlette, uvicorn, SQLite"
    durable, database, count = "written, no fsync", "messages.db", "ifnull(max(id), 0)"

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder)
        self.wire = wires.Http(self.port)

    @classmethod
    def missing(cls) -> str:
        try:
            cls.version()
        except ImportError as error:
            return f"{error.name} is not installed"
        return ""

    @classmethod
    def version(cls) -> str:
        import httptools
        import starlette
        import uvicorn
        import uvloop

        parts = {"starlette": starlette, "uvicorn": uvicorn, "httptools": httptools, "uvloop": uvloop}
        return ", ".join(f"{part} {module.__version__}" for part, module in parts.items())

    def command(self) -> list[str]:
        return [sys.executable, "-m", "uvicorn", "starlette_bus:app", "--app-dir", str(HERE), "--port", str(self.port),
                "--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning"]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "DATABASE": str(self.folder / self.database)}


class RedisPeer(Peer):
    """A stream, fsynced before each answer. Rewriting its log is off: that would run beside what is measured."""

    name, program = "Redis Streams", "redis-server"
    durable = "fsync"
    stream, streams = "dell", ["dell"]  # as redis-benchmark is told, and all that come of it

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder)
        self.wire = wires.Redis()

    @classmethod
    def missing(cls) -> str:
        return super().missing() or ("" if shutil.which("redis-benchmark") else "redis-benchmark is not installed")

    @classmethod
    def version(cls) -> str:
        return super().version().partition(" sha=")[0]

    def command(self) -> list[str]:
        return ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder),
                "--appendonly", "yes", "--appendfsync", "always", "--auto-aof-rewrite-percentage", "0", "--save", "",
                "--maxclients", str(DESCRIPTORS)]

    def sends(self, connections: int, seconds: float) -> load.Count:
        return load.redis_benchmark(self.port, connections, seconds, 1, self.stream, len(self.streams))

    def batches(self, connections: int, seconds: float, size: int) -> load.Count:
        """The nearest there is to many messages in one request: `size` commands written before any answer is read."""
        return load.redis_benchmark(self.port, connections, seconds, size)

    def cursor(self) -> str:
        return "$"

    def mark(self) -> int:
        with load.Line(self.wire, self.port) as line:
            return sum(int(line.exchange(self.wire.command("XLEN", stream))[1:]) for stream in self.streams)

    def stored(self, mark: int) -> int | None:
        return self.mark() - mark


class ManyStreams(RedisPeer):
    """The same with as many streams as a bus has names: each message goes to a random one of them."""

    name = "Redis, 400 streams"
    stream, streams = "dell-__rand_int__", [f"dell-{number:012}" for number in range(400)]


class NatsPeer(Peer):
    """JetStream with a file store, fsynced before each answer: `sync_interval: always`, which came with 2.10."""

    name, program = "NATS JetStream", "nats-server"
    durable = "fsync"
    config = 'listen: "127.0.0.1:{port}"\njetstream {{ store_dir: "{folder}", sync_interval: always }}\n'
    stream: ClassVar[dict[str, Any]] = {
        "name": "BUS", "subjects": ["bus.*"], "storage": "file", "num_replicas": 1, "retention": "limits",
        "discard": "old", "max_consumers": -1, "max_msgs": -1, "max_bytes": -1, "max_age": 0}

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder)
        self.wire = wires.Nats()

    @classmethod
    @functools.lru_cache(1)
    def binary(cls) -> str | None:
        """The one of the extra `bench` first: Debian's is older."""
        return shutil.which("nats-server", path=str(pathlib.Path(sys.executable).parent)) or shutil.which("nats-server")

    @classmethod
    def missing(cls) -> str:
        if not cls.binary():
            return "nats-server is not installed"
        version = cls.version().split("v")[-1]
        too_old = tuple(map(int, version.split(".")[:2])) < (2, 10)
        return f"nats-server {version} cannot fsync each message; 2.10 can" if too_old else ""

    @classmethod
    def version(cls) -> str:
        return output(str(cls.binary()), "--version")

    def command(self) -> list[str]:
        config = self.folder / "nats.conf"
        config.write_text(self.config.format(port=self.port, folder=self.folder / "store"))
        return [str(self.binary()), "-c", str(config)]

    def start(self) -> None:
        super().start()
        self.ask(self.wire.publish("$JS.API.STREAM.CREATE.BUS", json.dumps(self.stream).encode(), 1))

    def sends(self, connections: int, seconds: float) -> load.Count:
        return load.sends(self.port, self.wire, "dell", connections, seconds)

    def mark(self) -> int:
        """How many messages are stored. Right after a load it may answer with an error first."""
        deadline = time.monotonic() + 10
        while True:
            answer = self.ask(self.wire.publish("$JS.API.STREAM.INFO.BUS", b"", 1))
            found = json.loads(answer[answer.index(b"{"):])
            if "state" in found or time.monotonic() > deadline:
                return int(found["state"]["messages"])

    def stored(self, mark: int) -> int | None:
        return self.mark() - mark


class MosquittoPeer(Peer):
    """A broker for MQTT; at QoS 1 it acknowledges a publish, and keeps nothing for those who are not connected."""

    name, program = "mosquitto, QoS 1", "mosquitto"
    config = "listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\nset_tcp_nodelay true\n"

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder)
        self.wire = wires.Mqtt()

    @classmethod
    def version(cls) -> str:
        return output("mosquitto", "-h").splitlines()[0]

    def command(self) -> list[str]:
        config = self.folder / "mosquitto.conf"
        config.write_text(self.config.format(port=self.port))
        return ["mosquitto", "-c", str(config)]

    def sends(self, connections: int, seconds: float) -> load.Count:
        return load.sends(self.port, self.wire, "dell", connections, seconds)


class BeanstalkdPeer(Peer):
    """A work queue. With `-f 0` a put and a delete are fsynced before they are answered; a reserve is not written."""

    name, program = "beanstalkd", "beanstalkd"
    durable = "fsync"

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder)
        self.wire = wires.Beanstalk()

    @classmethod
    def version(cls) -> str:
        return output("beanstalkd", "-v")

    def command(self) -> list[str]:
        return ["beanstalkd", "-l", "127.0.0.1", "-p", str(self.port), "-b", str(self.folder), "-f", "0"]

    def deliver(self, to: Sequence[str]) -> None:
        """A job for each of these names, before what is measured."""
        with load.Line(self.wire, self.port) as line:
            for start in range(0, len(to), AT_ONCE):
                some = to[start : start + AT_ONCE]
                line.ask(b"".join(map(self.wire.send, some)))
                for _ in some:
                    line.answer()

    def mark(self) -> int:
        """How many jobs were deleted: a worker deletes the job that it has done."""
        return int(re.search(rb"\ncmd-delete: (\d+)", self.ask(self.wire.stats()))[1])

    def stored(self, mark: int) -> int | None:
        return self.mark() - mark


class NchanPeer(HttpPeer):
    """nginx with nchan: long-polls in C, messages in shared memory. /ceiling is nginx alone, the most wrk can see."""

    name, program = "nginx with nchan", "nginx"
    module = pathlib.Path("/usr/lib/nginx/modules/ngx_nchan_module.so")
    config = """\
load_module {module};
daemon off; pid {folder}/pid; error_log {folder}/error.log;
worker_processes auto; worker_rlimit_nofile {descriptors};
events {{ worker_connections {descriptors}; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    nchan_shared_memory_size 512M;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location ~ ^/pub/(.+)$ {{ nchan_publisher; nchan_channel_id $1; }}
        location ~ ^/sub/(.+)$ {{
            nchan_subscriber longpoll; nchan_channel_id $1; nchan_subscriber_first_message newest;
        }}
        location = /ceiling {{ return 200 "{answer}"; }}
    }}
}}
"""
    answer = "x" * 220  # bytes; what agent-bus answers a send with

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder)
        self.wire = wires.Nchan(self.port)

    @classmethod
    def missing(cls) -> str:
        return super().missing() or ("" if cls.module.exists() else "libnginx-mod-nchan is not installed")

    @classmethod
    def version(cls) -> str:
        package = output("dpkg-query", "-W", "-f", "${Version}", "libnginx-mod-nchan")
        return f"{output('nginx', '-v').split()[-1]}, nchan {package}"

    def command(self) -> list[str]:
        config = self.folder / "nginx.conf"
        config.write_text(self.config.format(
            port=self.port, folder=self.folder, module=self.module, descriptors=DESCRIPTORS, answer=self.answer))
        return ["nginx", "-p", str(self.folder), "-e", str(self.folder / "error.log"), "-c", str(config)]

    def ceiling(self, connections: int, seconds: float) -> load.Count:
        return load.wrk(self.port, [self.wire.post("/ceiling", wires.message("dell"))], connections, seconds)


@functools.lru_cache
def python_version(python: str) -> str:
    return output(python, "-c", "import platform; print(platform.python_version())")


def sqlite_version(python: str) -> str:
    return output(python, "-c", "import sqlite3; print(sqlite3.sqlite_version)")


def versions(pythons: list[str]) -> dict[str, str]:
    """Of all that is measured and of what measures it, or why it is not there."""
    found = {f"Python {python_version(python)}": f"SQLite {sqlite_version(python)}" for python in pythons}
    for kind in (StarletteBus, RedisPeer, NatsPeer, NchanPeer, MosquittoPeer, BeanstalkdPeer):
        found[kind.name] = f"absent: {kind.missing()}" if kind.missing() else kind.version()
    found["wrk"] = output("wrk", "-v").split(" [")[0] if shutil.which("wrk") else "absent"
    return found
