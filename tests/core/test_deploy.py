"""What deploy/ holds works as it is: real proxies in front of a real bus, with only names and ports replaced."""
import contextlib
import errno
import hashlib
import http.client
import itertools
import json
import os
import pathlib
import re
import shutil
import socket
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

import bus_recv
import bus_send
import bus_server
from tests.faults.history import Conversation, observed
from tests.kit import forked, hostile, new_client, old_client, peers
from tests.kit.hostile import GET, HOST, head
from tests.kit.peers import invite
from tests.kit.processes import PATIENCE, ROOT, Server, free_port, wait_until

TOKEN = "abt_[0-9a-f]{8}_"
DOCUMENT = (ROOT / "docs" / "deploy.md").read_text()
LAST = head(GET, HOST, "Connection: close")


def needs(program):
    return pytest.mark.skipif(not shutil.which(program), reason=f"{program} is not installed")


def replaced(text, **places):
    """The text with each of these in place of what is in it; each must be there."""
    for old, new in places.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


class Front:
    """A proxy before `bus`, a process of its own. `log` is its access log."""

    def __init__(self, place, bus, certificate, config):
        self.place, self.port = place, free_port()
        self.url = f"https://bus.example:{self.port}"
        self.log = place / "access.log"
        self.config = place / "config"
        self.config.write_text(config(self, bus, certificate))

    def __enter__(self):
        with (self.place / "stderr").open("ab") as stderr:
            self.process = subprocess.Popen(self.command(), stdout=stderr, stderr=stderr, env=self.environment())
        wait_until(self.is_there)
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(PATIENCE)

    def is_there(self):
        assert self.process.poll() is None, (self.place / "stderr").read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
            return True

    def environment(self):
        return {**os.environ, "HOME": str(self.place), "XDG_DATA_HOME": str(self.place)}


class Nginx(Front):
    def command(self):
        return ["nginx", "-p", str(self.place), "-c", str(self.config), "-e", "stderr"]


class Caddy(Front):
    def command(self):
        return ["caddy", "run", "--adapter", "caddyfile", "--config", str(self.config)]


AROUND = """
daemon off; master_process off; worker_rlimit_nofile 4096;
pid PLACE/pid; error_log stderr crit;
events { worker_connections 2048; }
http {
    log_format short '$status upstream "$request_method $request_uri" $upstream_status';
    access_log PLACE/access.log short;
    client_body_temp_path PLACE/body; proxy_temp_path PLACE/proxy; fastcgi_temp_path PLACE/f; uwsgi_temp_path PLACE/u;
    scgi_temp_path PLACE/s; MORE
    SERVER
}
"""
BARE = """server {
    listen 443 ssl;
    ssl_certificate /etc/letsencrypt/live/bus.example/fullchain.pem;
    ssl_certificate_key /etc/letsencrypt/live/bus.example/privkey.pem;
    location / { proxy_pass http://127.0.0.1:8080; MORE }
}"""
POOLED = BARE.replace("MORE", "proxy_http_version 1.1; proxy_set_header Host $host; proxy_set_header Connection '';")


def around(server, more=""):
    """A whole configuration of nginx that has this server in it."""

    def config(front, bus, certificate):
        text = re.sub(r".*listen \[::\].*\n", "", server)
        text = text.replace("http://127.0.0.1:8080", "http://bus" if "upstream" in more else f"http://127.0.0.1:{bus.port}")
        text = replaced(text, **{
            "listen 443 ssl": f"listen 127.0.0.1:{front.port} ssl",
            "/etc/letsencrypt/live/bus.example/fullchain.pem": certificate.file,
            "/etc/letsencrypt/live/bus.example/privkey.pem": certificate.key,
        })  # fmt: skip
        more_now = more.replace("BUS", f"127.0.0.1:{bus.port}")
        return replaced(AROUND, SERVER=text, MORE=more_now, PLACE=str(front.place))

    return config


OURS = (ROOT / "deploy" / "nginx.conf").read_text()
DEFAULT = BARE.replace("MORE", "")
UPSTREAM = "upstream bus { server BUS; keepalive 8; }"


CADDYFILE = (ROOT / "deploy" / "Caddyfile").read_text()


def caddyfile(front, bus, certificate):
    here = f"bus.example:{front.port} {{\n\tbind 127.0.0.1\n\ttls {certificate.file} {certificate.key}"
    text = replaced(CADDYFILE, **{"bus.example {": here, "127.0.0.1:8080": f"127.0.0.1:{bus.port}"})
    return "{\n\tadmin off\n\tauto_https disable_redirects\n}\n" + text


ours = pytest.mark.parametrize("kind, config", [
    pytest.param(Nginx, around(OURS), marks=needs("nginx"), id="nginx"),
    pytest.param(Caddy, caddyfile, marks=needs("caddy"), id="caddy"),
])  # fmt: skip


@pytest.fixture
def front(tmp_path, authority, monkeypatch):
    """front(bus, kind, config): a proxy at bus.example that the clients trust, and that is ended with the test."""
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *where, **how: real("127.0.0.1", *where, **how))
    monkeypatch.setenv("AGENT_BUS_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("AGENT_BUS_CA", authority.file)
    monkeypatch.setenv("SSL_CERT_FILE", authority.file)  # for clients that do not know the other
    with contextlib.ExitStack() as stack:

        def front(bus, kind, config):
            place = tmp_path / kind.__name__
            place.mkdir()
            return stack.enter_context(kind(place, bus, authority.sign("DNS:bus.example"), config))

        yield front


@pytest.fixture
def closed(tmp_path):
    """A bus as deploy/ means it: with tokens."""
    with Server(tmp_path / "bus.db") as bus:
        wanted = {"spark": [], "dell": [], "op": ["--operator"]}
        with ThreadPoolExecutor() as pool:
            tokens = pool.map(lambda name: invite(bus, name, *wanted[name]), wanted)
            bus.tokens = dict(zip(wanted, tokens))
        yield bus


def ask(front, method, path, token="", body=None, **options):
    """(status, what was said) of one request through the proxy."""
    peer = http.client.HTTPSConnection("bus.example", front.port, timeout=PATIENCE)
    with contextlib.closing(peer):
        peer.request(method, path, body, {"Authorization": f"Bearer {token}"}, **options)
        answer = peer.getresponse()
        return answer.status, answer.read()


# ── As it is meant ───────────────────────────────────────────────────────────────────────────────────────────────────


@ours
def test_a_parked_reader_behind_the_proxy_is_woken_by_its_message(closed, front, monkeypatch, kind, config):
    proxy = front(closed, kind, config)

    def online():
        agents = json.loads(ask(proxy, "GET", "/agents", closed.tokens["op"])[1])["agents"]
        return [agent["name"] for agent in agents if agent["online"]] == ["dell"]

    monkeypatch.setenv("AGENT_BUS_TOKEN", closed.tokens["dell"])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: next(bus_recv.receive("dell", url=proxy.url, once=True)))
        wait_until(online)
        monkeypatch.setenv("AGENT_BUS_TOKEN", closed.tokens["spark"])
        assert bus_send.send("dell", "T1", url=proxy.url)["receiver"]["online"]
        assert waiting.result(PATIENCE)["msg"] == "T1"


@ours
def test_the_help_names_the_url_of_the_proxy(closed, front, kind, config):
    proxy = front(closed, kind, config)
    status, text = ask(proxy, "GET", "/")
    assert status == 200 and proxy.url.encode() in text


@ours
def test_a_bus_without_tokens_stays_shut_behind_the_proxy(bus, front, kind, config):
    """There every stranger would be a neighbour on 127.0.0.1; the name in Host tells that they are none."""
    status, text = ask(front(bus, kind, config), "GET", "/log")
    assert status == 403 and b"does not answer to bus.example" in text


@ours
def test_a_large_body_is_refused_by_the_bus_and_a_huge_one_by_the_proxy(closed, front, kind, config):
    proxy, token = front(closed, kind, config), closed.tokens["spark"]
    status, text = ask(proxy, "POST", "/send?to=dell", token, b"x" * 262144)
    assert status == 200
    status, text = ask(proxy, "POST", "/send?to=dell", token, b"x" * 262145)
    assert status == 413 and "nothing was stored" in json.loads(text)["error"]
    with contextlib.suppress(OSError):  # it may hang up on the rest of such a body
        assert ask(proxy, "POST", "/send?to=dell", token, b"x" * (11 << 20))[0] == 413
    assert len(json.loads(ask(proxy, "GET", "/log", closed.tokens["op"])[1])["messages"]) == 1


@ours
def test_a_body_in_chunks_becomes_one_of_known_length_or_is_refused(closed, front, kind, config):
    proxy, token = front(closed, kind, config), closed.tokens["spark"]
    status, text = ask(proxy, "POST", "/send?to=dell", token, iter([b"in ", b"chunks"]), encode_chunked=True)
    assert status == (200 if kind is Nginx else 501), text
    stored = json.loads(ask(proxy, "GET", "/log", closed.tokens["op"])[1])["messages"]
    assert [message["msg"] for message in stored] == (["in chunks"] if kind is Nginx else [])


@needs("systemd-analyze")
def test_the_unit_is_valid_and_leaves_the_bus_little_to_do_harm_with(tmp_path):
    unit = tmp_path / "agent-bus.service"
    unit.write_text(replaced((ROOT / "deploy" / unit.name).read_text(), **{"/usr/bin/python3": sys.executable}))
    for check in (["verify"], ["security", "--offline=true", "--threshold=15"]):  # an exposure of 1.5, of 10
        done = subprocess.run(["systemd-analyze", *check, str(unit)], capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0 and not done.stderr, done.stderr


def run(line, place):
    """Run this line of a document there, and return what it printed; it must end with 0."""
    line = re.sub("^python3 (?=bus_server)", f"python3 {ROOT}/", line)
    line = re.sub("^python3", sys.executable, line)
    done = subprocess.run(["sh", "-c", line], cwd=place, capture_output=True, text=True, timeout=PATIENCE,
                          stdin=subprocess.DEVNULL)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def make_certificate(place):
    """bus.pem and bus.key, made there by the command of docs/deploy.md."""
    command = re.search(r"openssl req .*?bus\.pem", DOCUMENT, re.DOTALL)[0]
    run(replaced(command, **{"IP:10.0.0.5": "IP:127.0.0.1"}), place)


@needs("openssl")
def test_a_certificate_made_as_documented_is_trusted(tmp_path, monkeypatch):
    make_certificate(tmp_path)
    monkeypatch.setenv("AGENT_BUS_CA", str(tmp_path / "bus.pem"))
    options = ["--tls-cert", str(tmp_path / "bus.pem"), "--tls-key", str(tmp_path / "bus.key")]
    with Server(tmp_path / "bus.db", *options) as bus:
        assert bus_send.send("dell", "T1", url=bus.url.replace("http:", "https:"), sender="spark", patience=0)["ok"]


@needs("openssl")
def test_the_lines_for_a_certificate_of_your_own_end_with_an_invitation(tmp_path, monkeypatch):
    """Two blocks, because the bus stays in the foreground of the first."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    before, serve = re.search(r"```sh\n(.* ops .*)\n(.*--tls-cert.*)\n```", DOCUMENT).groups()
    after = re.search(r"```sh\n(.* dell .*)\n```", DOCUMENT)[1]
    make_certificate(tmp_path)
    assert "--yes" in before  # else it would take the next line of the block as the answer to its question
    assert re.search(TOKEN, run(before, tmp_path))
    options = [str(tmp_path / word) if word.startswith("bus.") else word for word in serve.split()[4:]]
    with Server(tmp_path / "agent-bus" / "bus.db", *options) as bus:
        said = run(replaced(after, **{"bus.lan:8080": f"127.0.0.1:{bus.port}"}), tmp_path)
    assert "bus_join.py" in said and "sha256//" in said and re.search(TOKEN, said), said


@pytest.mark.parametrize("title", ["systemd", "Upgrading from 0.1"])
def test_a_bus_that_was_installed_as_documented_has_every_file_that_it_hands_out(tmp_path, title):
    """An ordinary user installs it here, in another folder than /."""
    lines = re.findall("^sudo (install .*)$", DOCUMENT.split(f"\n## {title}\n")[1].split("\n## ")[0], re.MULTILINE)
    (tmp_path / "etc" / "systemd" / "system").mkdir(parents=True)
    for line in lines:
        run(re.sub(" /(?=opt|etc)", f" {tmp_path}/", line), ROOT)
    assert (tmp_path / "etc" / "systemd" / "system" / "agent-bus.service").exists()
    place = tmp_path / "opt" / "agent-bus"
    for folder in ("bus_extensions", "bus_extensions/page"):
        assert {path.name for path in (ROOT / folder).glob("*.*")} <= {path.name for path in (place / folder).iterdir()}
    with Server(tmp_path / "bus.db", program=("-S", str(place / "bus_server.py"))) as bus:
        assert all(bus.get(file) for file in bus_server.CLIENTS)
        said = run(f"python3 {place}/bus_server.py invite dell --db {bus.db} --url {bus.url}", tmp_path)
    assert "bus_join.py" in said and re.search(TOKEN, said), said


# ── Backups ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def documented(command, place, *, options=("--db", "bus.db")):
    """Run this command of docs/deploy.md there; (exit code, what it said)."""
    line = re.search(f"^python3 (bus_server.py {command} .*)$", DOCUMENT, re.MULTILINE)
    line = [sys.executable, *line[1].replace("bus_server.py", str(ROOT / "bus_server.py")).split(), *options]
    done = forked.run(line, cwd=place, capture_output=True, text=True, timeout=PATIENCE)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


def test_the_lines_for_a_backup_are_for_the_bus_that_readme_starts(tmp_path, monkeypatch):
    """Neither has an option that says where the messages are."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "agent-bus").mkdir()
    with Server(tmp_path / "agent-bus" / "bus.db") as bus:
        bus_send.send("dell", "one", url=bus.url, sender="spark")
        assert documented("backup", tmp_path, options=())[0] == 0
        bus_send.send("dell", "two", url=bus.url, sender="spark")
        bus.stop()
        assert documented("restore", tmp_path, options=())[0] == 0
        bus.start()
        assert [each.msg for each in observed(bus.url)] == ["one"]


def test_a_backup_taken_under_load_has_all_that_was_acknowledged_before(tmp_path):
    """Senders and a reader notice nothing of it, and what it has is what the bus had at one moment."""
    calm, elsewhere = threading.Event(), tmp_path / "elsewhere"
    with Server(tmp_path / "bus.db") as bus, Conversation(new_client, bus.url, "dell") as talk:
        talk.listen()
        for sender in ("spark", "nano", "mini"):
            talk.speak(sender, itertools.takewhile(lambda _: not calm.is_set(), map(str, itertools.count())))
        talk.wait_for_sends(300)
        before = list(talk.sent)
        assert documented("backup", tmp_path)[0] == 0
        talk.wait_for_sends(len(talk.sent) + 300)
        calm.set()
        assert talk.finish() == []
        whole = observed(bus.url)
    elsewhere.mkdir()
    (tmp_path / "bus-copy.db").rename(elsewhere / "bus-copy.db")
    assert documented("restore", elsewhere)[0] == 0
    with Server(elsewhere / "bus.db") as restored:
        copied = observed(restored.url)
        assert restored.stop() == 0
    assert {each.tick for each in before} <= {each.tick for each in copied}
    assert copied == whole[: len(copied)] and len(copied) < len(whole)
    with contextlib.closing(sqlite3.connect(restored.db)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_a_restored_bus_is_another_one_and_its_readers_miss_nothing_that_it_holds(tmp_path, monkeypatch):
    """Both kinds of them; what they had read since the backup comes again under the id that it had."""
    monkeypatch.setenv("AGENT_BUS_STATE_DIR", str(tmp_path / "state"))

    def received():
        messages = bus_recv.receive("dell", url=bus.url, once=True, timeout=0.2)
        return [(message["msg"], message["id"]) for message in messages]

    def poll(**query):
        return json.loads(bus.get("/recv?" + urllib.parse.urlencode({"to": "dell", **query})))

    with Server(tmp_path / "bus.db") as bus:
        bus_send.send("dell", "zero", url=bus.url, sender="spark")
        assert [msg for msg, _ in received()] == ["zero"] and received() == [], "its cursor is presented"
        wait_until(lambda: saved_cursor(bus.db, "dell"))
        one = bus_send.send("dell", "one", url=bus.url, sender="spark")["id"]
        assert documented("backup", tmp_path)[0] == 0
        bus_send.send("dell", "two", url=bus.url, sender="spark")
        assert [msg for msg, _ in received()] == ["one", "two"]
        old = poll(since="now")
        bus.stop()
        code, said = documented("restore", tmp_path)
        assert code == 0 and "the database that was there before is now bus.db." in said
        bus.start()
        told = poll(since=old["now"], bus=old["bus"], block="true")
        assert told["bus"] != old["bus"] and told["messages"] == []
        assert received() == [("one", one)]
        three = bus_send.send("dell", "three", url=bus.url, sender="spark")["id"]
        assert received() == [("three", three)]
        assert [message["id"] for message in poll(since=old["now"])["messages"]] == [three], "of the old contract"


def saved_cursor(path, name):
    """The cursor of a name as it is on disk, which is up to a second late."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT read FROM mailboxes WHERE name = ? AND read > 0", (name,)).fetchone()


def test_what_was_there_before_a_restore_can_be_restored(tmp_path):
    with Server(tmp_path / "bus.db") as bus:
        assert documented("backup", tmp_path)[0] == 0
        bus_send.send("dell", "since the backup", url=bus.url, sender="spark")
        bus.kill()  # its log is still beside it
        assert documented("restore", tmp_path)[0] == 0
        bus.start()
        assert observed(bus.url) == []
        bus.stop()
        (tmp_path / "bus-copy.db").unlink()
        (aside,) = (path for path in tmp_path.glob("bus.db.[0-9]*") if path.name[7:].isdigit())
        shutil.copy(f"{aside}-wal", tmp_path / "bus-copy.db-wal")
        shutil.copy(aside, tmp_path / "bus-copy.db")
        assert documented("restore", tmp_path)[0] == 0
        bus.start()
        assert [each.msg for each in observed(bus.url)] == ["since the backup"]


@pytest.mark.slow("a dozen starts and commands, each a process")
def test_a_restore_revokes_nothing_less_and_opens_nothing(tmp_path):
    """Tokens that are in place stay; a bus that has none gets those of the copy, or is not restored."""
    bus = Server(tmp_path / "bus.db")
    spark, dell = invite(bus, "spark"), invite(bus, "dell")
    assert (good(bus, spark), good(bus, dell)) == (True, True)
    assert documented("backup", tmp_path)[0] == 0
    forked.run([sys.executable, str(ROOT / "bus_server.py"), "revoke", "dell", "--db", bus.db], check=True)
    assert documented("restore", tmp_path)[0] == 0
    assert (good(bus, spark), good(bus, dell)) == (True, False)
    (tmp_path / "bus.db.tokens").unlink()
    assert documented("restore", tmp_path)[0] == 0
    assert (good(bus, spark), good(bus, dell)) == (True, True)
    (tmp_path / "bus.db.tokens").unlink()
    (tmp_path / "bus-copy.db.tokens").unlink()
    code, said = documented("restore", tmp_path)
    assert code == 2 and "would be open" in said


def good(bus, token):
    """Does the bus, once it is started, know this token?"""
    with bus:
        peer = http.client.HTTPConnection("127.0.0.1", bus.port, timeout=PATIENCE)
        peer.request("GET", "/agents", headers={"Authorization": f"Bearer {token}"})
        status = peer.getresponse().status
        peer.close()
        assert status in (200, 401)
        assert bus.stop() == 0  # so that it has saved that the token was used
        return status == 200


def test_a_copy_never_overwrites_and_a_running_bus_is_not_restored(tmp_path):
    (tmp_path / "bus-copy.db").write_text("something else")
    with Server(tmp_path / "bus.db") as bus:
        bus_send.send("dell", "hi", url=bus.url, sender="spark")
        assert documented("backup", tmp_path) == (2, "bus_server: bus-copy.db exists already: choose another name\n")
        (tmp_path / "bus-copy.db").unlink()
        assert documented("backup", tmp_path)[0] == 0
        code, said = documented("restore", tmp_path)
        assert code == 2 and "in use" in said
        assert [each.msg for each in observed(bus.url)] == ["hi"]


@pytest.mark.parametrize("suffix", [".new", ".tokens", ".tokens.new", ".blobs", ".prune", ".restoring", "-wal"])
def test_a_copy_replaces_nothing_beside_it(suffix, tmp_path):
    """It may be a user's own file, the tokens of another bus, or what SQLite would take for a part of the copy."""
    neighbour = tmp_path / f"bus-copy.db{suffix}"
    neighbour.write_text("precious")
    with Server(tmp_path / "bus.db") as bus:
        assert peers.run("invite", "ann", "--yes", "--db", bus.db)[0] == 0
        said = f"bus_server: bus-copy.db{suffix} exists already: choose another name\n"
        assert documented("backup", tmp_path) == (2, said)
    assert neighbour.read_text() == "precious" and list(tmp_path.glob("bus-copy.db*")) == [neighbour]


def test_a_copy_that_has_the_name_of_the_new_database_is_not_lost(tmp_path):
    """restore removed it before it was read."""
    file, copy = tmp_path / "bus.db", tmp_path / "bus.db.new"
    with Server(file) as bus:
        bus_send.send("dell", "hi", url=bus.url, sender="spark")
        assert peers.run("backup", copy, "--db", file)[0] == 0
    before = copy.read_bytes()
    code, out, err = peers.run("restore", copy, "--db", file)
    assert (code, out, err.count("\n")) == (2, "", 1) and f"{copy} has the name under which" in err
    assert copy.read_bytes() == before
    copy.rename(tmp_path / "copy.db")
    assert peers.run("restore", tmp_path / "copy.db", "--db", file)[0] == 0


def test_the_files_of_a_bus_are_copied_and_come_back(tmp_path):
    """Whole ones only. Those that are there stay as they are."""
    with Server(tmp_path / "bus.db") as bus:
        names = [put(bus, data) for data in (b"one", b"two")]
        (tmp_path / "bus.db.blobs" / f"{'0' * 64}.part").write_bytes(b"half")
        code, said = documented("backup", tmp_path)
        assert code == 0 and "2 files" in said
        bus.stop()
        assert {file.name for file in (tmp_path / "bus-copy.db.blobs").iterdir()} == set(names)
        (tmp_path / "bus.db.blobs" / names[0]).unlink()
        code, said = documented("restore", tmp_path)
        assert code == 0 and "1 files" in said
        bus.start()
        assert [bus.get(f"/blob/{name}") for name in names] == [b"one", b"two"]


def put(bus, data):
    """Store a file; returns its name."""
    digest = hashlib.sha256(data).hexdigest()
    request = urllib.request.Request(f"{bus.url}/blob/{digest}", data, method="PUT")
    assert urllib.request.urlopen(request, timeout=PATIENCE).status == 201
    return digest


@pytest.mark.parametrize("fault", ["missing", "empty", "no database", "of something else", "damaged"])
def test_what_is_no_whole_copy_of_a_bus_is_not_restored(tmp_path, fault):
    copy = tmp_path / "bus-copy.db"
    with Server(tmp_path / "bus.db") as bus:
        urllib.request.urlopen(f"{bus.url}/send?from=spark&to=dell", b"hi" * 50000, timeout=PATIENCE)
        bus.stop()
        assert documented("backup", tmp_path)[0] == 0
        if fault == "damaged":
            whole = copy.read_bytes()
            copy.write_bytes(whole[:8192] + b"\xff" * 4096 + whole[12288:])
        else:
            copy.unlink()
        if fault == "of something else":
            sqlite3.connect(copy).execute("CREATE TABLE t(x)").connection.close()
        elif fault in ("empty", "no database"):
            copy.write_text("" if fault == "empty" else "no database, but 25 words and more" * 40)
        code, said = documented("restore", tmp_path)
        says = "cannot copy the database bus-copy.db to bus.db.new: "
        says = "there is no file bus-copy.db: give the COPY" if fault == "missing" else says
        assert code == 2 and said.startswith(f"bus_server: {says}"), said
        assert not (tmp_path / "bus.db.new").exists()
        bus.start()
        assert len(observed(bus.url)) == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, as an operator with sudo is")
def test_what_root_restores_belongs_to_whom_the_bus_belongs_to(tmp_path):
    with Server(tmp_path / "bus.db") as bus:
        put(bus, b"a file")
        invite(bus, "spark")
        assert documented("backup", tmp_path)[0] == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    os.chown(elsewhere, 65534, 65533)
    for name in ("bus-copy.db", "bus-copy.db.tokens"):
        shutil.copy(tmp_path / name, elsewhere / name)
    shutil.copytree(tmp_path / "bus-copy.db.blobs", elsewhere / "bus-copy.db.blobs")
    assert documented("restore", elsewhere)[0] == 0
    (file,) = (elsewhere / "bus.db.blobs").iterdir()
    assert file.parent.stat().st_uid == 65534 and file.parent.stat().st_mode & 0o777 == 0o700
    for name in ("bus.db", "bus.db.tokens", "bus.db.lock", file):
        status = (elsewhere / name).stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (65534, 65533, 0o600)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, as an operator with sudo is")
def test_a_copy_that_root_has_moved_into_a_folder_of_its_own_is_restored(tmp_path):
    """It still belongs to the account of the bus, which may not enter there."""
    with Server(tmp_path / "bus.db"):
        assert documented("backup", tmp_path)[0] == 0
    own = tmp_path / "own"
    own.mkdir(0o700)
    (tmp_path / "bus-copy.db").rename(own / "copy.db")
    os.chown(own / "copy.db", 65534, 65533)
    assert peers.run("restore", own / "copy.db", "--db", tmp_path / "bus.db")[0] == 0


def test_a_bus_in_a_folder_whose_name_is_not_ascii_is_restored(tmp_path):
    folder = tmp_path / "jürgen"
    folder.mkdir()
    for number in range(2):
        copy = tmp_path / f"copy-{number}.db"
        with Server(folder / "bus.db"):
            assert peers.run("backup", copy, "--db", folder / "bus.db")[0] == 0
        assert peers.run("restore", copy, "--db", folder / "bus.db")[0] == 0
    assert not [each for each in folder.iterdir() if each.suffix in (".new", ".restoring")]


@pytest.mark.parametrize("command", ["backup", "restore"])
def test_files_that_have_no_place_to_go_to_are_not_left_out_in_silence(command, tmp_path):
    """As on a disk that is not mounted: a link to it leads to nothing."""
    with Server(tmp_path / "bus.db") as bus:
        put(bus, b"a file")
        assert documented("backup", tmp_path)[0] == 0
        target = {"backup": tmp_path / "to" / "copy.db", "restore": tmp_path / "to" / "bus.db"}[command]
        target.parent.mkdir()
        (target.parent / f"{target.name}.blobs").symlink_to(tmp_path / "unmounted")
        copies = {"backup": (target, "--db", bus.db), "restore": (tmp_path / "bus-copy.db", "--db", target)}
        code, _, err = peers.run(command, *copies[command])
    assert code == 2 and f"{target}.blobs" in err and err.count("\n") == 1
    is_left = target.with_name(f"{target.name}.new").exists()
    assert is_left is (command == "restore"), "it fills a disk that may be full; beside half a restore, no bus starts"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, as an operator with sudo is")
@pytest.mark.parametrize("led", ["folder", "part", "marker", "file", "database"])
def test_no_link_of_the_owner_of_the_bus_leads_root_astray(led, tmp_path):
    """Who has the account of the bus may leave links in its folder. Root neither writes nor reads what they lead to."""
    with Server(tmp_path / "bus.db") as bus:
        hash = hashlib.sha256(b"a file").hexdigest()
        put(bus, b"a file")
        assert documented("backup", tmp_path)[0] == 0
    theirs, secret = tmp_path / "theirs", tmp_path / "secret"
    theirs.mkdir()
    secret.mkdir()
    (secret / "file").write_text("secret")
    (theirs / "bus.db.blobs").mkdir()
    links = {
        "folder": ("bus.db.blobs", secret),
        "part": (f"bus.db.blobs/{hash}.part", secret / "file"),
        "marker": ("bus.db.restoring", secret / "file"),
        "file": (f"bus.db.blobs/{hash}", secret / "file"),
        "database": ("bus.db", tmp_path / "bus-copy.db"),
    }
    if led == "folder":
        (theirs / "bus.db.blobs").rmdir()
    elif led == "file":
        shutil.copy(tmp_path / "bus-copy.db", theirs / "bus.db")
    (theirs / links[led][0]).symlink_to(links[led][1])
    os.chown(theirs, 65534, 65533)
    if led in ("file", "database"):
        done = peers.run("backup", theirs / "copy.db", "--db", theirs / "bus.db")
        assert not any(path.read_bytes() == b"secret" for path in theirs.glob("copy.db.blobs/*"))
        assert led == "file" or not (theirs / "copy.db").exists()
    else:
        done = peers.run("restore", tmp_path / "bus-copy.db", "--db", theirs / "bus.db")
    assert "Traceback" not in done[2]
    assert (secret / "file").read_text() == "secret" and [each.name for each in secret.iterdir()] == ["file"]
    assert (secret.stat().st_uid, (secret / "file").stat().st_uid) == (0, 0)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, as an operator with sudo is")
@pytest.mark.parametrize("word, made", [("restore", "bus.db"), ("backup", "copy.db")])
def test_no_link_that_comes_between_two_steps_leads_root_astray(word, made, tmp_path, monkeypatch):
    """SQLite opens by name, and follows. Root's copy is made where nobody else can put a link."""
    with Server(tmp_path / "bus.db"):
        assert documented("backup", tmp_path)[0] == 0
    theirs, secret = tmp_path / "theirs", tmp_path / "secret"
    theirs.mkdir()
    secret.mkdir()
    if word == "backup":
        shutil.copy(tmp_path / "bus-copy.db", theirs / "bus.db")
    os.chown(theirs, 65534, 65533)
    link, connect = theirs / f"{made}.new", sqlite3.connect

    def connected(*arguments, **options):
        if not link.is_symlink():
            link.symlink_to(secret / "file")
        return connect(*arguments, **options)

    monkeypatch.setattr(sqlite3, "connect", connected)
    given = theirs / made if word == "backup" else tmp_path / "bus-copy.db"
    with contextlib.suppress(bus_server.Unusable):
        getattr(bus_server, word)([str(given), "--db", str(theirs / "bus.db")])
    assert not any(secret.iterdir())
    assert (theirs / made).stat().st_uid == 65534 and not (theirs / made).is_symlink()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, as an operator with sudo is")
@pytest.mark.parametrize("changed", [False, True])
def test_root_copies_no_database_that_its_owner_may_not_read(changed, tmp_path, monkeypatch):
    """Its name may become a link after we have looked; the owner of the copy would get the mail of another bus."""
    with Server(tmp_path / "bus.db"):
        assert documented("backup", tmp_path)[0] == 0
    with tempfile.TemporaryDirectory() as theirs:  # that of pytest is closed to others
        os.chmod(theirs, 0o755)
        file, connect = pathlib.Path(theirs, "bus.db"), sqlite3.connect
        shutil.copy(tmp_path / "bus-copy.db", file)
        for each in (theirs, file):
            os.chown(each, 65534, 65533)

        def connected(path, **options):
            if changed and "bus.db?" in path and not file.is_symlink():
                file.unlink()
                file.symlink_to(tmp_path / "bus-copy.db")
            return connect(path, **options)

        monkeypatch.setattr(sqlite3, "connect", connected)
        with contextlib.suppress(bus_server.Unusable):
            bus_server.copy_database(str(file), f"{theirs}/copy.db")
        assert os.path.exists(f"{theirs}/copy.db") is not changed
        assert os.geteuid() == 0


def test_a_link_that_root_left_in_its_own_folder_is_followed(monkeypatch):
    """As the link /tmp on a Mac, or /backup that leads to another disk."""
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    assert bus_server.no_link("/backup") == 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, as an operator with sudo is")
def test_what_says_that_a_restore_was_cut_off_names_no_other_place(tmp_path):
    with Server(tmp_path / "bus.db"):
        assert documented("backup", tmp_path)[0] == 0
    (tmp_path / "another").write_text("stays")
    (tmp_path / "bus.db.restoring").write_text(str(tmp_path / "another"))
    assert documented("restore", tmp_path)[0] == 0
    assert (tmp_path / "another").read_text() == "stays"


@pytest.mark.parametrize("part", ["copy.db.new.part", "copy.db.blobs"])
def test_a_backup_that_fails_leaves_no_part(part, tmp_path, monkeypatch):
    """Root makes the copy elsewhere first. What had come of it stayed on the disk that was full."""
    with Server(tmp_path / "bus.db") as bus:
        put(bus, b"a file")
    assert peers.run("invite", "ann", "--yes", "--db", bus.db)[0] == 0
    place = tmp_path / "place"
    place.mkdir()
    place.chmod(0o777)
    copy = shutil.copyfileobj

    def full(old, new):
        copy(old, new)
        if part in os.readlink(f"/proc/self/fd/{new.fileno()}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(bus_server.Unusable, match="No space left on device"):
        patch.setattr(shutil, "copyfileobj", full)
        bus_server.backup([str(place / "copy.db"), "--db", str(tmp_path / "bus.db")])
    assert {each.name for each in place.iterdir()} <= {"copy.db.tokens.lock"}
    bus_server.backup([str(place / "copy.db"), "--db", str(tmp_path / "bus.db")])  # the name is free again


# ── As it may be ─────────────────────────────────────────────────────────────────────────────────────────────────────


@needs("nginx")
def test_nothing_is_lost_behind_nginx(tmp_path, front):
    got, sent = {"dell": [], "nano": []}, []

    def read(name, messages):
        got[name].extend(itertools.takewhile("the end".__ne__, (message["msg"] for message in messages)))

    with Server(tmp_path / "bus.db", "--allow-host", "bus.example") as bus:
        proxy = front(bus, Nginx, around(OURS))
        new = bus_recv.receive("dell", url=proxy.url)
        old = old_client.receive(proxy.url, "nano", since=0)
        readers = [threading.Thread(target=read, args=each, daemon=True) for each in (("dell", new), ("nano", old))]
        for reader in readers:
            reader.start()
        for _ in range(20):
            sent.append(f"T{len(sent)}")
            bus_send.send(["dell", "nano"], sent[-1], url=proxy.url, sender="spark")
        bus_send.send(["dell", "nano"], "the end", url=proxy.url, sender="spark")
        for reader in readers:
            reader.join(PATIENCE)
    assert got == {"dell": sent, "nano": sent}


# ── Where requests begin and end ─────────────────────────────────────────────────────────────────────────────────────

CASES = [case for case in [*hostile.BROKEN, *hostile.WHOLE, *hostile.CUT] if "would wait" not in case.name]
SHORT = ("client_header_timeout 1s; client_body_timeout 1s; keepalive_timeout 1s; lingering_timeout 1s; "
         "large_client_header_buffers 4 32k;")  # fmt: skip


def greeted(front):
    """A connection with TLS. If a busy machine is later than SHORT allows a handshake to be, it is tried again."""
    end = time.monotonic() + PATIENCE
    while True:
        sock = socket.create_connection(("bus.example", front.port), PATIENCE)
        try:
            return ssl.create_default_context().wrap_socket(sock, server_hostname="bus.example")
        except OSError:
            sock.close()
            if time.monotonic() > end:
                raise


def talk(front, sent):
    """All that is answered to these bytes, up to the end that the proxy makes."""
    heard = []
    with greeted(front) as peer, contextlib.suppress(ConnectionError):
        peer.sendall(sent)
        heard.extend(iter(lambda: peer.recv(65536), b""))
    return b"".join(heard).decode("latin-1")


@needs("nginx")
@pytest.mark.parametrize("server", [OURS, DEFAULT, POOLED], ids=["ours", "default", "pooled"])
def test_nginx_and_the_bus_agree_where_each_request_begins_and_ends(tmp_path, front, server):
    """Behind each case comes a send of mallory's: for both a request of its own, or for both a part of another.

    So nothing is stored but what a 200 said, and the bus has answered what nginx passed on, no request more or less.
    """
    with Server(tmp_path / "bus.db", "--verbose") as bus:
        proxy = front(bus, Nginx, around(server, SHORT + (UPSTREAM if server is POOLED else "")))
        with ThreadPoolExecutor(64) as pool:
            heard = "".join(pool.map(lambda case: talk(proxy, case.sent + hostile.SMUGGLED + LAST), CASES))

        def statuses(of, line):
            return Counter(re.findall(line, of.log.read_text(), re.MULTILINE))

        # Both write their logs a little later.
        wait_until(lambda: statuses(bus, r'" (\d+) \d+$') == statuses(proxy, r'" (\d+)$'))
        assert sum(statuses(proxy, r'" (\d+)$').values()) > 250
        stored = [message["id"] for message in json.loads(bus.get("/log?max=1000"))["messages"]]
    assert sorted(re.findall('{"ok": true, "ts": [^}]*"id": "([0-9a-f]+)"', heard)) == stored and len(stored) > 100
