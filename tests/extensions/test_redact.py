"""POST /redact: PROTOCOL.md section 26, as far as one token and one outside look cannot show it."""

import json
import socket
import sqlite3
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

import bus_server
from bus_extensions import redact
from bus_server import Message, Now, Poll, Put, Remove, State, draft
from tests.core.test_identity import ask
from tests.faults.test_kinds_bounds import Guest
from tests.kit import inside
from tests.kit.near import Near
from tests.kit.peers import TIMED_OUT, fill, marks_are_written, mint, run
from tests.kit.processes import ROOT, Server, wait_until
from tests.kit.wire import a_bus, come_true

SECRET = "hunter2-correct-horse-battery"


def post(bus, path, body, token=None):
    status, answer = ask(bus, "POST", path, body, token)
    assert status == 200, answer
    return answer


def send(bus, to, msg=f"the password is {SECRET}", **members):
    return post(bus, "/send", {"from": "ann", "to": to, "msg": msg, **members})


def files_with(bus, text=SECRET):
    """The files of the bus that have these bytes, in any case: an index has its words in lower case."""
    found = []
    for file in Path(bus.db).parent.glob("bus.db*"):
        with suppress(FileNotFoundError):  # SQLite removes some at any time
            if not file.name.endswith("-journal") and text.encode().lower() in file.read_bytes().lower():
                found.append(file.name)
    return sorted(found)


def test_only_an_operator_redacts(tmp_path):
    tokens = mint(tmp_path / "bus.db", ann=[], bob=[], boss=["--operator"])
    with Server(tmp_path / "bus.db") as bus:
        sent = post(bus, "/send", {"to": "bob", "msg": SECRET}, tokens["ann"])["id"]
        for name in ("ann", "bob"):
            status, answer = ask(bus, "POST", "/redact", {"id": sent}, tokens[name])
            assert status == 403 and answer["error"].startswith("only an operator can redact a message")
        assert ask(bus, "POST", "/redact", {"id": sent})[0] == 401 and files_with(bus)
        assert post(bus, "/redact", {"id": sent}, tokens["boss"])["redacted"][0]["to"] == "bob"
        assert ask(bus, "GET", f"/message/{sent}", token=tokens["bob"])[1]["message"]["redacted"] is True


def test_a_redaction_names_who_has_fetched_the_message(near):
    """One that read it, one that did not; of a broadcast, who has acknowledged it."""
    sent = send(near, ["bob", "carl", "all"])
    for name in ("bob", "dora", "erin"):
        ask(near, "GET", f"/recv?to={name}&since=0")
    ask(near, "GET", f"/recv?to=dora&since={sent['ts']}")
    answer = post(near, "/redact", {"id": sent["ids"]["carl"]})
    assert {each["to"]: each["state"] for each in answer["redacted"]}["carl"] == "queued"
    assert answer["fetched_by"] == ["bob", "dora"]


def test_a_redaction_names_readers_and_not_mailboxes(tmp_path):
    """A broadcast that was read by its id; mail of a group; mail that another name may read; a job."""
    tokens = mint(tmp_path / "bus.db", ann=[], bob=[], carl=["--also", "team,dora,jobs"], boss=["--operator"])
    with Near(tmp_path / "bus.db") as bus:
        ids = {to: post(bus, "/send", {"to": to, "msg": SECRET}, tokens["ann"])["id"]
               for to in ("all", "team", "dora", "jobs")}  # fmt: skip
        assert ask(bus, "GET", f"/message/{ids['all']}", token=tokens["bob"])[0] == 200
        assert ask(bus, "GET", "/recv?to=carl,team", token=tokens["carl"])[0] == 200
        assert ask(bus, "GET", f"/message/{ids['dora']}", token=tokens["carl"])[0] == 200
        assert post(bus, "/claim", {"to": "jobs", "worker": "w1"}, tokens["carl"])["messages"]
        by = {to: post(bus, "/redact", {"id": id}, tokens["boss"])["fetched_by"] for to, id in ids.items()}
        assert by == {"all": ["bob"], "team": ["carl"], "dora": ["carl"], "jobs": ["carl"]}


def test_one_redaction_is_in_each_commit_and_is_paid_for(tmp_path):
    """Senders wait for one, however many are asked for."""
    with a_bus(time.monotonic, tmp_path / "bus.db") as bus:
        bus.storms = storms = bus_server.Storms(time.monotonic, 50)
        lists, really = [], bus.ledger.apply
        guests, message = [Guest(bus) for _ in range(5)], {"from": "ann", "to": "bob", "msg": SECRET}
        ids = [guest.asks("POST", "/send", message).json()["id"] for guest in guests]
        bus.ledger.apply = lambda operations: lists.append([each.kind for each in operations]) or really(operations)
        for id, guest in zip(["1", *ids[1:]], guests):  # one is refused, and the next one has its turn all the same
            guest.begins("POST", "/redact", {"id": id})
        assert [guest.answer().status for guest in guests] == [404, 200, 200, 200, 200]
        assert [kinds.count("redact") for kinds in lists if "redact" in kinds] == [1] * 5
        assert storms.WORK_BURST - storms.work.left["127.0.0.1/"][0] >= 4 * redact.Redaction.WORK
        storms.worked("127.0.0.1", "", 2 * storms.WORK_BURST)
        guests[0].begins("POST", "/redact", {"id": ids[0]})
        assert guests[0].answer().status == 429


def test_a_reader_that_is_being_sent_the_message_has_fetched_it(tmp_path):
    bus = inside.make(tmp_path / "bus.db")
    try:
        message = Message(5, "default", "bob", "ann", '"from": "ann"', 1, None)
        poll = Poll("bob", ("bob",), "default", None, 0, 10, 0, False)
        observer = poll._replace(me=None)

        class Reading:
            delivering = None

        peers = [Reading(), Reading(), Reading()]
        peers[0].delivering, peers[1].delivering = (poll, 5), (observer, 5)
        bus.door.connections = peers
        redaction = bus.routes["POST", "/redact"].call.__self__
        assert [*redaction.readers(message)] == ["bob"] and [*redaction.readers(message._replace(tick=6))] == []
        bus.door.connections = []
    finally:
        inside.close(bus)


def test_no_byte_of_a_redacted_text_is_left_in_the_files_of_the_bus(tmp_path):
    """In the database, its log, its free pages, where the removal of older messages has left copies, and the index."""
    with Server(tmp_path / "bus.db") as bus:
        for size in (10, 200, 900):
            fill(bus, "bob", 200, "x" * size)
            sent = send(bus, "bob", f"{SECRET} {'y' * size * 20}", subject=SECRET, password=SECRET)
            fill(bus, "bob", 200, "x" * size)
            send(bus, "carl", SECRET)
            fill(bus, "bob", 200, "x" * size)
        # A search waits half a second for the index, and finds what that has by then.
        wait_until(lambda: len(ask(bus, "GET", f"/search?q={SECRET}")[1]["messages"]) == 6)
        assert ask(bus, "GET", "/recv?to=bob&since=0&max=1000")[0] == 200
        wait_until(lambda: ask(bus, "GET", "/inbox")[1]["recipients"]["default"]["carl"] == 3)
        now = ask(bus, "GET", "/healthz")[1]["now"]
        ask(bus, "GET", f"/recv?to=bob&since={now}")
        marks_are_written(bus)
        assert run("prune", "--older", "0", "--db", bus.db)[0] == 0  # bob's are fetched, carl's are not
        assert files_with(bus)
        for each in ask(bus, "GET", "/log?to=carl&since=0")[1]["messages"]:
            answer = post(bus, "/redact", {"id": each["id"]})
            assert answer["overwritten"] is True
        assert ask(bus, "POST", "/redact", {"id": sent["id"]})[0] == 404  # it is removed, and had no key
        wait_until(lambda: not files_with(bus))
        assert ask(bus, "GET", f"/search?q={SECRET}")[1]["messages"] == []


def test_the_index_forgets_without_a_search(tmp_path):
    with Server(tmp_path / "bus.db") as bus:
        sent = send(bus, "bob", SECRET.replace("-", ""))
        assert len(ask(bus, "GET", f"/search?q={SECRET.replace('-', '')}")[1]["messages"]) == 1
        wait_until(lambda: len(files_with(bus, SECRET.replace("-", ""))) > 1)
        post(bus, "/redact", {"id": sent["id"]})
        wait_until(lambda: not files_with(bus, SECRET.replace("-", "")))
        wait_until(Path(f"{bus.db}.search").exists)


def test_the_index_forgets_a_message_that_was_removed_before(tmp_path):
    """Of the message only its key is left, and of its words the index has all."""
    secret = SECRET.replace("-", "")
    with Server(tmp_path / "bus.db") as bus:
        sent = send(bus, "bob", secret, key="k1")
        assert len(ask(bus, "GET", f"/search?q={secret}")[1]["messages"]) == 1
        assert run("prune", "--older", "0", "--pending", "--db", bus.db)[0] == 0
        assert post(bus, "/redact", {"id": sent["id"]})["redacted"] == []
        wait_until(lambda: not files_with(bus, secret))


def test_an_index_of_an_extension_that_is_off_is_named(tmp_path):
    bus = inside.make(tmp_path / "bus.db")
    try:
        warning = bus.routes["POST", "/redact"].call.__self__.warning
        Path(f"{tmp_path}/bus.db.search").touch()
        assert "bus.db.search" not in warning(True, False, True)
        del bus.extensions["search"]
        assert "bus.db.search, the index of an extension that is off: remove that file" in warning(True, False, True)
    finally:
        inside.close(bus)


def fail(bus, queue, reason):
    """A worker gives a job back for the last time. The id of the job."""
    [job] = post(bus, "/claim", {"to": queue})["messages"]
    post(bus, "/nack", {"id": job["id"], "lease": job["lease"], "reason": reason})
    return job["id"]


def test_a_redaction_follows_a_job_to_its_dead_letters_and_back(tmp_path):
    """A job, the other message of its send, its dead letter, the job made of that again, and the dead letter of it."""
    with Server(tmp_path / "bus.db", "--max-attempts", "1") as bus:
        for which in range(5):
            jobs, secret = f"jobs-{which}", f"{SECRET}-{which}"
            other = send(bus, jobs, "an innocent job")["id"]
            assert fail(bus, jobs, "no") == other
            sent = send(bus, [jobs, "bob"], f"the password is {secret}", attempts=secret)
            first = fail(bus, jobs, f"{secret} is wrong")
            innocent, letter = (each["id"] for each in ask(bus, "GET", f"/log?to={jobs}.dead&since=0")[1]["messages"])
            again = post(bus, "/again", {"id": letter})["id"]
            assert fail(bus, jobs, f"{secret} is wrong") == again
            last = ask(bus, "GET", f"/log?to={jobs}.dead&since=0")[1]["messages"][-1]["id"]
            wait_until(lambda secret=secret: secret in str(ask(bus, "GET", f"/search?q={secret}")[1]))
            whole = [first, sent["ids"]["bob"], letter, again, last]
            answer = post(bus, "/redact", {"id": whole[which]})
            assert [each["id"] for each in answer["redacted"]] == sorted(whole) and answer["overwritten"] is True
            wait_until(lambda secret=secret: not files_with(bus, secret))
            for each in (other, innocent):
                assert ask(bus, "GET", f"/message/{each}")[1]["message"]["msg"] == "an innocent job"


def test_a_letter_that_names_a_message_of_another_redacts_only_itself(tmp_path):
    """Else who writes a letter by hand could have any message redacted; and a mailbox of mail is no queue."""
    tokens = mint(tmp_path / "bus.db", ann=[], eve=[], boss=["--operator"])
    with Near(tmp_path / "bus.db") as bus:
        mail = [post(bus, "/send", {"to": "bob", "msg": SECRET}, tokens["ann"])["id"] for _ in range(2)]
        letter = {"to": "bob.dead", "msg": SECRET, "dead_of": mail[0]}
        letter = post(bus, "/send", letter, tokens["eve"])["id"]
        for each in (letter, mail[1]):
            answer = post(bus, "/redact", {"id": each}, tokens["boss"])
            assert each in [one["id"] for one in answer["redacted"]]
            left = ask(bus, "GET", f"/message/{mail[0]}", token=tokens["boss"])[1]["message"]
            assert left["msg"] == SECRET


@pytest.mark.parametrize("limit, number", [("LOOKED", 9), ("LOOKED_BYTES", 400), ("COPIES", 3)])
def test_a_redaction_says_so_if_it_has_not_looked_at_the_whole_queue(tmp_path, monkeypatch, limit, number):
    monkeypatch.setattr(redact.copies, limit, number)
    bus = inside.make(tmp_path / "bus.db")
    try:
        one = Put([draft({"from": "ann", "to": "jobs", "msg": SECRET}, None)])
        sent = [bus.state.apply([one], Now(1000000 * number, 1)).visible for number in range(1, 13)]
        ticks = [message.tick for [message] in sent]
        bus.state.writing.execute("UPDATE mailboxes SET taken = 1")
        [done] = bus.state.apply([redact.Redact(ticks[0])], Now(1000000, 1)).results
        assert done.whole is False and ticks[0] in done.ticks and len(done.ticks) < 12
        warning = bus.routes["POST", "/redact"].call.__self__.warning
        assert "search for it" in warning(True, False, done.whole) and "search for it" not in warning(True, False, True)
    finally:
        inside.close(bus)


@contextmanager
def reading(path):
    """Another program reads the database, from now on."""
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("BEGIN")
        database.execute("SELECT count(*) FROM messages").fetchone()
        yield


# bus_server.py in the folder that is its first argument; it tries ten times a second to empty its log, and overwrites
# no more than 50 free pages
HASTY = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import bus_server
load = bus_server.load
def hasty(file):
    module = load(file)
    if file.stem == "redact":
        module.Redaction.FOLD_SECONDS, module.FREE_PAGES = 0.1, 50
    return module
bus_server.load = hasty
sys.exit(bus_server.main())
"""


def test_while_another_program_reads_the_log_is_emptied_later(tmp_path):
    with Server(tmp_path / "bus.db", program=("-S", "-c", HASTY, str(ROOT))) as bus:
        sent = send(bus, "bob")
        with reading(bus.db):
            answer = post(bus, "/redact", {"id": sent["id"]})
            assert answer["overwritten"] is False and "another program reads" in answer["warning"]
            assert files_with(bus)
            assert send(bus, "bob", "others go on")["ok"]
        wait_until(lambda: not files_with(bus))


def planned_folds(bus, monkeypatch):
    """The attempts to empty the log that a bus plans from now on."""
    planned, later, wait = [], bus.loop.later, redact.Redaction.FOLD_SECONDS

    def note(seconds, action):
        return planned.append(action) if seconds == wait else later(seconds, action)

    monkeypatch.setattr(bus.loop, "later", note)
    return planned


def test_redactions_whose_texts_stay_in_the_log_wait_for_one_attempt(tmp_path, monkeypatch):
    """Senders wait a tenth of a second for each attempt, as long as another program reads."""
    with a_bus(time.monotonic, tmp_path / "bus.db") as bus:
        guest, planned = Guest(bus), planned_folds(bus, monkeypatch)

        def tried():
            planned.pop()()
            come_true(bus.ledger.idle)
            return not planned

        ids = [guest.sends("bob", SECRET)["id"] for _ in range(4)]
        with reading(tmp_path / "bus.db"):
            for ident in ids:
                assert guest.asks("POST", "/redact", {"id": ident}).json()["overwritten"] is False
                assert len(planned) == 1
            assert not tried() and len(planned) == 1
        wait_until(tried)
        assert SECRET.encode() not in (tmp_path / "bus.db-wal").read_bytes()


def test_over_so_many_free_pages_the_answer_names_the_command(tmp_path):
    with Server(tmp_path / "bus.db", program=("-S", "-c", HASTY, str(ROOT))) as bus:
        fill(bus, "bob", 4, "x" * 200_000, at_once=1)
        assert run("prune", "--older", "0", "--pending", "--db", bus.db)[0] == 0
        sent = send(bus, "carl")
        answer = post(bus, "/redact", {"id": sent["id"]})
        assert answer["overwritten"] is False and f"run sqlite3 {bus.db} VACUUM" in answer["warning"]


def test_a_retry_of_a_redacted_send_is_refused_and_no_hash_of_it_is_kept(tmp_path):
    """Also when the message was removed before, and only its key and a hash of its text are left."""
    with Server(tmp_path / "bus.db") as bus:
        sent = send(bus, ["bob", "carl"], key="k1")
        assert run("prune", "--older", "0", "--pending", "--db", bus.db)[0] == 0

        def hashes():
            with closing(sqlite3.connect(bus.db)) as database:
                return [row[0] for row in database.execute("SELECT hash FROM keys")]

        assert len(hashes()) == 2 and send(bus, ["bob", "carl"], key="k1")["duplicate"] is True
        answer = post(bus, "/redact", {"id": sent["id"]})
        assert answer["redacted"] == [] and hashes() == [redact.NO_HASH] * 2
        again = {"from": "ann", "to": ["bob", "carl"], "msg": f"the password is {SECRET}", "key": "k1"}
        assert ask(bus, "POST", "/send", again)[0] == 409
        wait_until(lambda: not files_with(bus))


def test_the_hash_of_a_removed_job_goes_when_its_dead_letter_is_redacted(tmp_path):
    """But a letter that only says so, of another sender, takes away the hash of no message."""
    bus = inside.make(tmp_path / "bus.db")
    try:
        keyed, other = (draft({"from": "ann", "to": "jobs", "msg": SECRET, "key": key}, None) for key in ("k1", "k2"))
        [job], [innocent] = (bus.state.apply([Put([one])], Now(1, 1)).visible for one in (keyed, other))
        bus.state.apply([Remove(0, 100, False, [], 1)], Now(1000, 1))
        letters = [draft({"from": who, "to": "jobs.dead", "msg": SECRET, "dead_of": f"{tick:x}"}, None)
                   for who, tick in (("ann", job.tick), ("eve", innocent.tick))]  # fmt: skip
        ticks = [each.tick for each in bus.state.apply([Put(letters)], Now(1001, 1)).visible]
        bus.state.apply([redact.Redact(tick) for tick in ticks], Now(1002, 1))
        hashes = dict(bus.state.writing.execute("SELECT key, hash FROM keys"))
        assert hashes["k1"] == redact.NO_HASH and hashes["k2"] == bus_server.hash_of(innocent.text)
    finally:
        inside.close(bus)


def test_a_kill_in_the_middle_of_a_redaction_leaves_the_old_text_or_the_new_one(tmp_path):
    """And after the next start, no file has a text that was replaced."""
    with Server(tmp_path / "bus.db") as bus:
        for number in range(8):
            sent = send(bus, ["bob", "carl"], f"{SECRET} {'x' * 5000}")
            ask(bus, "GET", f"/search?q={SECRET}")
            with socket.create_connection(("127.0.0.1", bus.port)) as peer:
                body = json.dumps({"id": sent["id"]}).encode()
                head = f"POST /redact HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
                peer.sendall(head.encode() + body)
                peer.settimeout(0.002 * (number % 4) + 0.0005)
                with suppress(*TIMED_OUT):
                    peer.recv(100)
                bus.kill()
            bus.start()
            texts = [ask(bus, "GET", f"/message/{ident}")[1]["message"] for ident in sent["ids"].values()]
            assert len({"redacted" in text for text in texts}) == 1, "one of the two only"
            if "redacted" in texts[0]:
                assert not [name for name in files_with(bus) if ".search" not in name]
                assert ask(bus, "GET", f"/search?q={SECRET}")[1]["messages"] == []
            assert post(bus, "/redact", {"id": sent["id"]})["overwritten"] is True
        wait_until(lambda: not files_with(bus))


def test_a_damaged_message_beside_it_harms_no_redaction(tmp_path):
    state = State(str(tmp_path / "bus.db"))
    try:
        one = draft({"from": "ann", "to": ["bob", "carl", "dora"], "msg": SECRET}, None)
        ticks = [each.tick for each in state.apply([Put([one])], Now(1000000, 1)).visible]
        state.writing.execute("UPDATE messages SET text = 'x' WHERE tick = ?", ticks[1:2])
        [done] = state.apply([redact.Redact(ticks[0])], Now(1000000, 1)).results
        assert done == ([ticks[0], ticks[2]], True)
    finally:
        state.close()


def test_a_message_in_a_page_with_room_is_overwritten(bus):
    """Without secure_delete, its bytes would stay between those of its neighbours."""
    sent = [send(bus, "bob", text) for text in ("one", SECRET, "three")]
    assert post(bus, "/redact", {"id": sent[1]["id"]})["overwritten"] is True and not files_with(bus)


def test_an_index_that_is_whole_is_looked_at_again_after_a_redaction(tmp_path):
    """Nobody searches, and no message comes: only the number of replaced texts says that there is something to do."""
    bus = inside.make(tmp_path / "bus.db")
    try:
        searches = bus.routes["GET", "/search"].call.__self__
        one = Put([draft({"from": "ann", "to": "bob", "msg": "swordfish"}, None)])
        [message] = bus.state.apply([one], Now(1000000, 1)).visible
        bus.last = bus.state.last
        assert not searches.index.grow(bus.last) or not searches.index.grow(bus.last)

        def look():
            searches.look()
            began = bool(searches.jobs)
            bus.loop.run(lambda: not searches.jobs)
            searches.rests = 0
            return began

        assert look() and not look()
        bus.state.apply([redact.Redact(message.tick)], Now(1000000, 1))
        assert look()
        assert not [file for file in tmp_path.glob("*.search*") if b"swordfish" in file.read_bytes()]
    finally:
        inside.close(bus)
