"""A database that an older server has made is served on, with everything that was in it.

What is expected is read from the dump itself, with sqlite3 and json alone: by no code of the server. tests/databases/
has a dump of each schema; make.py there makes another when a migration is added.
"""

import contextlib
import json
import os
import pathlib
import re
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

import bus_server
from tests.kit import forked
from tests.kit.processes import ROOT, Server, wait_until

DUMPS = sorted((pathlib.Path(__file__).resolve().parent.parent / "databases").glob("v*.sql"))
RECALLED = 1  # in messages.expires
FETCHED, ACKNOWLEDGED = 0, 1  # in receipts.kind
ATTEMPTS = 5
MANY = int(os.environ.get("MIGRATED", "30000"))  # messages to migrate; 100000 in full
OPENS = "import sys, bus_server; print('opens', flush=True); bus_server.State(sys.argv[1])"
forked.WARM[OPENS] = str(ROOT), "bus_server"


class Old:
    """The content of a dump, as rows with names."""

    def __init__(self, dump, path):
        with contextlib.closing(sqlite3.connect(path)) as file:
            file.executescript(dump.read_text())
            file.row_factory = sqlite3.Row
            self.version = file.execute("PRAGMA user_version").fetchone()[0]
            tables = [row[0] for row in file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            rows = {table: [dict(row) for row in file.execute(f"SELECT * FROM {table}")] for table in tables}
        self.bus = rows["bus"][0]["id"]
        self.boxes = {row["id"]: row for row in rows["mailboxes"]}
        self.messages = sorted(rows["messages"], key=lambda row: row["tick"])
        self.jobs = {row["tick"]: row for row in rows.get("work", ())}
        self.receipts = rows.get("receipts", [])

    def box(self, message):
        return self.boxes[message["mailbox"]]

    def alive(self, messages=None):
        """Those that are neither recalled nor expired."""
        now = time.time() * 1000000
        return [each for each in (self.messages if messages is None else messages)
                if each["expires"] is None or each["expires"] > now]

    def of(self, box):
        return [each for each in self.messages if each["mailbox"] == box["id"]]

    def delivered(self, message):
        """The message as a reader gets it."""
        tick = message["tick"]
        members = json.loads("{" + message["text"] + "}")
        return {"ts": seconds(tick), "id": f"{tick:x}", "to": self.box(message)["name"], **members}

    def failed(self):
        """The jobs that no worker can have again: dead ones, and those whose last lease has run out since."""
        return [job for job in self.jobs.values() if job["attempt"] == ATTEMPTS]

    def came_back(self, message):
        """A job that is not done; by now its lease has run out."""
        job = self.jobs.get(message["tick"])
        return bool(job) and job["due"] is not None and job not in self.failed()

    def state(self, message):
        """(state, by, at) of a message, as the rows say."""
        box, tick = self.box(message), message["tick"]
        if message["expires"] == RECALLED:
            return "recalled", None, None
        job = self.jobs.get(tick)
        if job:
            state = "fetched" if job["due"] else "acknowledged" if job["lease"] else "dead"
            return state, job["worker"], None
        if tick > max(box["fetched"], box["read"] or 0):
            return ("queued" if message in self.alive() else "expired"), None, None
        kind = ACKNOWLEDGED if box["own"] and tick <= (box["read"] or 0) else FETCHED
        told = [each for each in self.receipts
                if (each["mailbox"], each["kind"]) == (box["id"], kind) and each["tick"] >= tick]
        first = min(told, key=lambda each: each["tick"], default={"reader": None, "at": None})
        return ("fetched", "acknowledged")[kind], first["reader"], first["at"] and seconds(first["at"])


def seconds(tick):
    return f"{tick // 1000000}.{tick % 1000000:06}"


@pytest.fixture(params=DUMPS, ids=[dump.stem for dump in DUMPS])
def old(request, tmp_path):
    return Old(request.param, tmp_path / "bus.db")


@pytest.fixture
def bus(old, tmp_path):
    """The server of today on that database, and it has buried what failed for the last time.

    The messages in a dump are old: --keep 0 lets them stay.
    """
    with Server(tmp_path / "bus.db", "--keep", "0") as server:
        for job in old.failed():
            wait_until(lambda tick=job["tick"]: get(server, f"/message/{tick:x}")["state"] == "dead")
        yield server


def ask(bus, path, body=None):
    """(status, JSON) of a GET, or of a POST of JSON. Times stay text, and all other numbers are as they were."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(bus.url + path, data, timeout=20) as answer:
            return answer.status, json.loads(answer.read(), parse_float=spelled)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def spelled(digits):
    return digits if re.fullmatch(r"\d{10}\.\d{6}", digits) else float(digits)


def get(bus, path):
    status, answer = ask(bus, path)
    assert status == 200, (path, answer)
    return answer


def post(bus, path, **members):
    status, answer = ask(bus, path, members)
    assert status == 200, (path, members, answer)
    return answer


def recv(bus, box, **query):
    """(messages of this mailbox, the whole answer) of a poll by its name; broadcasts are another mailbox's."""
    asked = {"to": box["name"], "channel": box["channel"], "max": 1000, **query}
    answer = get(bus, "/recv?" + "&".join(f"{name}={value}" for name, value in asked.items()))
    return [each for each in answer["messages"] if each["to"] == box["name"]], answer


def claim(bus, queue):
    """Everything that can be had now, by id."""
    return {job["id"]: job for job in post(bus, "/claim", to=queue, max=100, wait=0)["messages"]}


def undone(old, queue):
    """{id: its attempt when it is claimed} of the jobs in a queue that are not done. Their leases have run out."""
    found = {}
    for message in old.alive():
        job = old.jobs.get(message["tick"])
        if old.box(message)["name"] == queue and (job is None or (job["due"] and job["attempt"] < ATTEMPTS)):
            found[f"{message['tick']:x}"] = (job["attempt"] if job else 0) + 1
    return found


each_of_many = pytest.mark.slow("a migration and a server for each test and schema; two tests remain in make quick")


def test_there_is_a_dump_of_each_schema():
    """Before a migration is added, tests/databases/make.py dumps the schema as it is; one may be younger than that."""
    versions = [int(re.search(r"^PRAGMA user_version=(\d+);$", dump.read_text(), re.MULTILINE)[1]) for dump in DUMPS]
    assert [dump.stem for dump in DUMPS] == [f"v{version}" for version in versions]
    assert versions[:2] == [1, 2] and len(versions) in (len(bus_server.MIGRATIONS), len(bus_server.MIGRATIONS) - 1)


def test_a_dump_has_something_of_everything(old):
    """Else the tests below could pass, and show nothing."""
    assert len(old.messages) >= 36 and len(old.alive()) < len(old.messages)
    assert {bool(box["own"]) for box in old.boxes.values()} == {True, False}
    assert any(box["removed"] for box in old.boxes.values()) and any(each["key"] for each in old.messages)
    states = {old.state(message)[0] for message in old.messages}
    assert {"queued", "fetched", "acknowledged", "expired"} <= states
    if old.version >= 2:
        assert {"recalled", "dead"} <= states and any(each["thread"] for each in old.messages)
        assert any(job["due"] for job in old.failed()) and old.receipts


def test_every_message_is_delivered_as_it_was(old, bus):
    expected = [old.delivered(message) for message in old.alive()]
    logged = get(bus, "/log?max=1000")["messages"]
    letters = [each for each in logged if int(each["id"], 16) > old.messages[-1]["tick"]]
    assert logged == [*expected, *letters]
    assert all("dead_of" in letter for letter in letters), "the bus wrote messages that nobody has sent"
    for box in old.boxes.values():
        mine = [old.delivered(message) for message in old.alive(old.of(box))]
        messages, answer = recv(bus, box)
        assert [each for each in messages if each not in letters] == mine, box
        assert answer["bus"] == old.bus


@each_of_many
def test_every_message_is_as_far_as_it_was(old, bus):
    for message in old.messages:
        answer = get(bus, f"/message/{message['tick']:x}")
        state, by, at = old.state(message)
        job = old.jobs.get(message["tick"])
        state = "dead" if job in old.failed() else state
        assert (answer["state"], answer.get("by"), answer.get("at")) == (state, by, at), message
        readable = old.delivered(message)
        if state in ("recalled", "expired"):  # it has no text any more
            readable = {member: readable[member] for member in ("ts", "id", "to", "from", "channel")}
        assert answer["message"] == readable
        assert answer.get("attempt") == (job["attempt"] if job else None)


@each_of_many
def test_as_much_is_unread_as_was(old, bus):
    found = get(bus, "/inbox")["recipients"]
    for box in old.boxes.values():
        if box["name"] == "all" or box["name"].endswith(".dead"):
            continue
        mark = (box["read"] or 0) if box["own"] else box["fetched"]
        unread = [each for each in old.alive(old.of(box)) if each["tick"] > mark or old.came_back(each)]
        assert found[box["channel"]][box["name"]] == len(unread), box


@each_of_many
def test_a_reader_goes_on_at_its_cursor(old, bus):
    for box in old.boxes.values():
        if box["read"] is not None:
            rest = [old.delivered(message) for message in old.alive(old.of(box)) if message["tick"] > box["read"]]
            assert recv(bus, box, since="last")[0] == rest, box
    agents = {(each["channel"], each["name"]): each for each in get(bus, "/agents")["agents"]}
    assert all((box["channel"], box["name"]) in agents for box in old.boxes.values() if box["own"])


@each_of_many
def test_what_retention_has_removed_is_told(old, bus):
    for box in old.boxes.values():
        gap = recv(bus, box)[1].get("gap")
        assert gap == ({"from": 0.0, "to": seconds(box["removed"])} if box["removed"] else None), box


@each_of_many
def test_a_key_is_known(old, bus):
    sends = {}
    for message in old.messages:
        if message["key"]:
            sends.setdefault((message["sender"], old.box(message)["channel"], message["key"]), []).append(message)
    assert len(sends) >= 4
    for (_, _, key), messages in sends.items():
        names = [old.box(message)["name"] for message in messages]
        again = {**json.loads("{" + messages[0]["text"] + "}"), "key": key, "to": names if names[1:] else names[0]}
        answer = post(bus, "/send", **again)
        assert (answer["duplicate"], answer["id"]) == (True, f"{messages[-1]['tick']:x}"), again
        assert answer.get("ids", {}) == ({n: f"{m['tick']:x}" for n, m in zip(names, messages)} if names[1:] else {})
        assert ask(bus, "/send", {**again, "msg": "another"})[0] == 409


@each_of_many
def test_a_thread_is_whole_and_goes_on(old, bus):
    threads = {}
    for message in old.messages:
        if message.get("thread"):
            threads.setdefault(message["thread"], []).append(message)
    [root] = [message for message in old.messages if '"msg": "a question"' in message["text"]]
    members = [root, *threads.get(root["tick"], [])]  # schema 1 did not note what belongs together
    assert len(members) == (4 if old.version >= 2 else 1)
    for message in members:
        found = get(bus, f"/thread/{message['tick']:x}")["messages"]
        assert found == [old.delivered(each) for each in members]
    late = post(bus, "/send", **{"from": "nano", "to": "spark", "msg": "late", "reply_to": f"{members[-1]['tick']:x}"})
    assert get(bus, f"/thread/{late['id']}")["messages"][-1]["id"] == late["id"]
    assert len(get(bus, f"/thread/{late['id']}")["messages"]) == len(members) + 1


@each_of_many
def test_jobs_go_on_where_they_were(old, bus):
    for queue in ("queue", "failing", "last-try"):
        expected = undone(old, queue)
        jobs = claim(bus, queue)
        assert {ident: job["attempt"] for ident, job in jobs.items()} == expected, queue
        for job in jobs.values():
            post(bus, "/ack", id=job["id"], lease=job["lease"])
            assert get(bus, f"/message/{job['id']}")["state"] == "acknowledged"
        assert claim(bus, queue) == {}
    assert len(undone(old, "queue")) >= 5


@each_of_many
def test_a_lease_of_then_is_worth_nothing_when_another_has_the_job(old, bus):
    leased = [job for job in old.jobs.values() if job["due"] and job["lease"] and job["attempt"] < ATTEMPTS]
    assert len(leased) == 2 or old.version < 2
    claimed = claim(bus, "queue")
    for job in leased:
        ident = f"{job['tick']:x}"
        assert ask(bus, "/ack", {"id": ident, "lease": job["lease"]})[0] == 409
        post(bus, "/ack", id=ident, lease=claimed[ident]["lease"])


@each_of_many
def test_dead_letters_are_there_and_what_failed_for_the_last_time_becomes_one(old, bus):
    assert len(old.failed()) == 2 or old.version < 2
    for job in old.failed():
        [message] = [each for each in old.messages if each["tick"] == job["tick"]]
        box = old.box(message)
        [letter] = recv(bus, {**box, "name": f"{box['name']}.dead"})[0]
        were = {member: value for member, value in old.delivered(message).items() if member not in ("ts", "id", "to")}
        assert {member: letter[member] for member in were} == were
        assert (letter["dead_of"], letter["attempts"]) == (f"{job['tick']:x}", ATTEMPTS)
        assert letter["reason"] == job["reason"] or job["reason"] is None
        assert claim(bus, box["name"]) == {} and letter["id"] in claim(bus, letter["to"])


def test_what_is_new_comes_after_all_that_was(old, bus, tmp_path):
    """And a server that is started again finds both."""
    sent = post(bus, "/send", **{"from": "spark", "to": "never-read", "msg": "new"})
    before = [message["msg"] for message in recv(bus, {"name": "never-read", "channel": "default"})[0]]
    assert before[-1] == "new" and int(sent["id"], 16) > old.messages[-1]["tick"]
    bus.stop()
    with contextlib.closing(sqlite3.connect(tmp_path / "bus.db")) as file:
        assert file.execute("PRAGMA user_version").fetchone() == (len(bus_server.MIGRATIONS),)
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    bus.start()
    assert [message["msg"] for message in recv(bus, {"name": "never-read", "channel": "default"})[0]] == before


@pytest.mark.slow("30,000 messages for each schema, and five processes that migrate them")
@pytest.mark.parametrize("dump", DUMPS, ids=lambda dump: dump.stem)
def test_a_migration_that_is_killed_costs_nothing_but_time(dump, tmp_path):
    """It has many messages, so that there is something to do when the kill comes."""
    path = tmp_path / "bus.db"
    old = Old(dump, path)
    box = old.messages[-1]["mailbox"]
    with contextlib.closing(sqlite3.connect(path)) as file, file:
        numbers = f"WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {MANY})"
        columns = "tick, mailbox, n, sender, depth, sum, text"
        values = f"{old.messages[-1]['tick']} + n, {box}, n, 'many', 0, 0, ''"
        file.execute(f"INSERT INTO messages({columns}) {numbers} SELECT {values} FROM numbers")
    command = [sys.executable, "-c", OPENS, str(path)]
    for patience in (MANY * each for each in (1e-7, 1e-6, 2e-6, 4e-6)):
        with forked.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as opening:
            assert opening.stdout.readline() == b"opens\n"
            with contextlib.suppress(subprocess.TimeoutExpired):
                opening.wait(patience)
            opening.kill()
    state = bus_server.State(str(path))
    assert bus_server.index_is_whole(state.writing) and bus_server.sound_runs(state.writing)
    assert state.ask("SELECT count(*) FROM places") == (MANY + len(old.messages),)
    state.close()
