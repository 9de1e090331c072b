"""A ledger of three nodes on this machine, started by deploy/cluster/node.sh; each can be killed, frozen or cut off.

Their addresses are those of this machine, or each node has a network of its own: a namespace of the kernel. Then a
front can be put into the network of a node, and the way from one node to another can be closed.
"""
import base64
import contextlib
import glob
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import tempfile
import urllib.request

from tests.kit import postgres
from tests.kit.processes import ROOT, SERVER, Server, free_port, runs, wait_until

SCRIPT = ROOT / "deploy" / "cluster" / "node.sh"
PATRONI = os.environ.get("PATRONI", "/opt/patroni/bin/patroni")
NAMES = ("m1", "m2", "m3")
CHAIN = "add table ip cut; add chain ip cut out { type filter hook output priority 0; }"  # what a network sends
PARTS = ("patroni", "postgres", "etcd")
WHOLE = 90  # s, until three nodes work together: the slowest is a standby that begins with a copy of the leader


def reason_to_skip():
    if not os.access(PATRONI, os.X_OK):
        return f"{PATRONI} is not here: deploy/cluster/README.md says how to install Patroni"
    if not shutil.which("etcd"):
        return "etcd is not installed"
    return postgres.reason_to_skip()


def no_networks():
    """Why the nodes cannot have networks of their own here, or None."""
    if os.geteuid() or not (shutil.which("ip") and shutil.which("nft")):
        return "needs root, ip and nft, for networks of their own"
    made = subprocess.run(["ip", "netns", "add", f"bus-try-{os.getpid()}"], capture_output=True, text=True)
    if made.returncode:
        return f"this system gives no networks of their own: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", f"bus-try-{os.getpid()}"], check=True)
    return None


def called(*command):
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


class Node:
    def __init__(self, nodes, name, address, inside=()):
        self.nodes, self.name, self.address, self.inside = nodes, name, address, inside
        self.folder = nodes.folder / name

    def run(self, *arguments):
        ports = " ".join(map(str, self.nodes.ports))
        command = [*self.inside, SCRIPT, arguments[0], self.folder, *arguments[1:]]
        done = subprocess.run(
            list(map(str, command)), env={**os.environ, "NODE_PORTS": ports, "PATRONI": PATRONI},
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def start(self):
        self.run("start")

    def pids(self, parts=PARTS):
        """Those of its processes that run, each with its children behind it."""
        found = []
        for part in parts:
            file, known = f"{part}.pid", str(self.folder)
            if part == "postgres":
                file, known = "data/postmaster.pid", part
            with contextlib.suppress(OSError, ValueError, IndexError):
                found += family(int((self.folder / file).read_text().split()[0]), known)
        return list(dict.fromkeys(found))

    def signal(self, number, parts=PARTS):
        pids = self.pids(parts)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return pids

    def kill(self, parts=PARTS):
        """kill -9 of all of it, as when its machine loses power."""
        pids = self.signal(signal.SIGKILL, parts)
        wait_until(lambda: not any(map(runs, pids)))

    def freeze(self, parts=PARTS):
        self.signal(signal.SIGSTOP, parts)

    def thaw(self, parts=PARTS):
        self.signal(signal.SIGCONT, parts)

    def ask(self, statement):
        """The rows of a statement of the superuser, in this node; it does not wait for another node."""
        user = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
        where = ["-h", self.folder, "-p", str(self.nodes.ports[2]), "-U", "postgres", "-d", "bus"]
        done = subprocess.run(
            [f"{postgres.PROGRAMS[-1]}/psql", "-XAtq", *where, "-c", statement], cwd="/", capture_output=True,
            env={**os.environ, "PGOPTIONS": "-c synchronous_commit=local"}, text=True, timeout=20, **user,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()


def family(pid, known):
    """A process and all below it; nothing, if it is not one whose command line has `known`."""
    try:
        if known not in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().decode():
            return []
        children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(each for child in children for each in family(int(child), ""))]


class Nodes:
    """Three nodes; `with` starts them and waits until they work together."""

    def __init__(self, networks=False):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="agent-bus-nodes-"))
        self.folder.chmod(0o711)  # the user of PostgreSQL passes through it
        self.networks = Networks() if networks else None
        self.ports = tuple(free_port() for _ in range(4))
        net = f"127.{random.randrange(1, 255)}.{random.randrange(255)}"
        if networks:
            net = self.networks.net
        self.nodes = [
            Node(self, name, f"{net}.{place}", self.networks.inside(name) if networks else ())
            for place, name in enumerate(NAMES, 2)
        ]
        for node in self.nodes:
            node.folder.mkdir()
            (node.folder / "secret").write_text("of a test\n")
            node.run("write", node.name, *(f"{each.name}={each.address}" for each in self.nodes))
        self.url = (self.nodes[0].folder / "front.env").read_text().strip().partition("=")[2]

    def __getitem__(self, name):
        return self.nodes[NAMES.index(name)]

    def front(self, path, node=None, *options, program=("-c", SERVER), env=None):
        """A front; with a node, in its network."""
        bus = Server(path, *options, program=program, env={**(env or {}), "AGENT_BUS_LEDGER": self.url})
        if node and self.networks:
            bus.command = [*node.inside, *bus.command, "--host", node.address, "--open"]
            bus.url = f"http://{node.address}:{bus.port}"
        return bus

    def members(self, *asked):
        """What Patroni says of each node, at the first of these that answers: {} if none does."""
        for node in asked or self.nodes:
            url = f"http://{node.address}:{self.ports[3]}/cluster"
            with contextlib.suppress(OSError, ValueError), urllib.request.urlopen(url, timeout=1) as answer:
                return {each["name"]: each for each in json.load(answer)["members"]}
        return {}

    def leader(self, *asked):
        """The node that leads, as soon as there is one that runs."""

        def found():
            members = self.members(*asked).values()
            its = [each for each in members if (each["role"], each["state"]) == ("leader", "running")]
            return its and self[its[0]["name"]]

        return wait_until(found, WHOLE)

    def others(self, *nodes):
        return [each for each in self.nodes if each not in nodes]

    def is_whole(self):
        """One leads, both others get what it has, and each commit waits for one of them."""
        roles = {each["name"]: each["role"] for each in self.members().values()}
        if sorted(roles.values()) != ["leader", "quorum_standby", "quorum_standby"]:
            return False
        [leader] = [self[name] for name, role in roles.items() if role == "leader"]
        with contextlib.suppress(AssertionError):  # what Patroni says may be some seconds old
            return leader.ask("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'") == ["2"]
        return False

    def whole(self):
        wait_until(self.is_whole, WHOLE)

    def lead(self, node):
        """Hand over to this node."""
        leader = self.leader()
        if leader is not node:
            self.tell(leader, "POST", "switchover", leader=leader.name, candidate=node.name)
            wait_until(lambda: self.leader() is node, WHOLE)
            self.whole()

    def tell(self, node, method, path, **members):
        """Ask Patroni for something that changes the cluster."""
        [password] = re.findall("username: patroni, password: '(.*?)'", (node.folder / "patroni.yml").read_text())
        user = base64.b64encode(f"patroni:{password}".encode()).decode()
        url = f"http://{node.address}:{self.ports[3]}/{path}"
        request = urllib.request.Request(url, json.dumps(members).encode(), {"Authorization": f"Basic {user}"})
        request.method = method
        urllib.request.urlopen(request, timeout=60).close()

    def __enter__(self):
        try:
            for node in self.nodes:
                node.start()
            self.whole()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for node in self.nodes:
            node.kill()
        if self.networks:
            self.networks.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class Networks:
    """A network for each node, and a bridge between them, where this machine is the fourth."""

    def __init__(self):
        self.bridge = f"bus{os.getpid()}"
        self.net = f"10.{random.randrange(64, 255)}.{random.randrange(255)}"
        called("ip", "link", "add", self.bridge, "type", "bridge")
        called("ip", "address", "add", f"{self.net}.1/24", "dev", self.bridge)
        called("ip", "link", "set", self.bridge, "up")
        for place, name in enumerate(NAMES, 2):
            space, outside = f"{self.bridge}-{name}", f"{self.bridge}{name}"
            called("ip", "netns", "add", space)
            called("ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", space)
            called("ip", "link", "set", outside, "master", self.bridge, "up")
            for command in ("link set lo up", f"address add {self.net}.{place}/24 dev eth0", "link set eth0 up"):
                called("ip", "-n", space, *command.split())
            called(*self.inside(name), "nft", CHAIN)

    def inside(self, name):
        return ["ip", "netns", "exec", f"{self.bridge}-{name}"]

    def cut(self, sender, *receivers, ports=()):
        """What this node sends to those is lost; with `ports`, only what goes to or comes from those."""
        those = ", ".join(map(str, ports))
        for each in receivers:
            for which in (f"tcp dport {{ {those} }}", f"tcp sport {{ {those} }}") if ports else ("",):
                called(*self.inside(sender.name), "nft", f"add rule ip cut out ip daddr {each.address} {which} drop")

    def apart(self, node, *others, ports=()):
        """Nothing comes from this node to those, nor back."""
        self.cut(node, *others, ports=ports)
        for other in others:
            self.cut(other, node, ports=ports)

    def heal(self):
        for name in NAMES:
            called(*self.inside(name), "nft", "flush chain ip cut out")

    def close(self):
        for path in glob.glob(f"/var/run/netns/{self.bridge}-*"):
            subprocess.run(["ip", "netns", "del", os.path.basename(path)], check=False)
        subprocess.run(["ip", "link", "del", self.bridge], check=False)
