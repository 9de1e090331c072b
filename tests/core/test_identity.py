"""Who may speak and who may read: tokens, the browser gate, the refusal to open up to the world."""

import contextlib
import http.client
import itertools
import json
import os
import pathlib
import shlex
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import bus_server
from tests.kit import forked, inside
from tests.kit.peers import command, invite, run, set_expires
from tests.kit.processes import COMMAND, PATIENCE, ROOT, Server, wait_until

NAMES = ["alice", "bob", "carl", "dora", "eve"]


def ask(bus, method, path, body=None, token=None, **headers):
    """(status, JSON) of one request."""
    if token:
        headers["Authorization"] = f"Bearer {token}"
    peer = http.client.HTTPConnection("127.0.0.1", bus.port, timeout=PATIENCE)
    with contextlib.closing(peer):
        peer.request(
            method,
            path,
            None if body is None else json.dumps(body),
            {k.replace("_", "-"): v for k, v in headers.items()},
        )
        answer = peer.getresponse()
        text = answer.read()
        return answer.status, json.loads(text) if text[:1] in b"{[" else text


@pytest.fixture(scope="module")
def closed(tmp_path_factory):
    """A bus with a token for each name, one that only sends, one that may read bob too, one of an operator."""
    with Server(tmp_path_factory.mktemp("closed") / "bus.db") as bus:
        grants = {name: [] for name in NAMES}
        grants |= {"sensor": ["--send-only"], "boss": ["--also", "bob,carl"], "admin": ["--operator"]}
        with ThreadPoolExecutor() as pool:
            tokens = pool.map(lambda name: invite(bus, name, *grants[name]), grants)
            bus.tokens = dict(zip(grants, tokens))
        wait_until(lambda: ask(bus, "GET", "/agents")[0] == 401)
        yield bus


def may_read(who, name):
    return who == "admin" or (who != "sensor" and name in (who, "all")) or (who == "boss" and name in ("bob", "carl"))


def test_a_token_sends_only_as_itself(closed):
    """Every token, every claimed sender, every mailbox."""
    for who, claimed, to in itertools.product(closed.tokens, [*NAMES, None], NAMES):
        message = {"to": to, "msg": "x", **({"from": claimed} if claimed else {})}
        status, answer = ask(closed, "POST", "/send", message, closed.tokens[who])
        assert status == (200 if claimed in (who, None) else 403), (who, claimed, to, answer)
        if status == 200:
            _, found = ask(closed, "GET", f"/message/{answer['id']}", token=closed.tokens["admin"])
            assert found["message"]["from"] == who


def test_a_token_reads_only_what_was_granted(closed):
    for who, name in itertools.product(closed.tokens, [*NAMES, "sensor", "boss", "admin", "all"]):
        status, answer = ask(closed, "GET", f"/recv?to={name}", token=closed.tokens[who])
        assert status == (200 if may_read(who, name) else 403), (who, name, answer)
        status, _ = ask(closed, "GET", f"/recv?to={who},{name}", token=closed.tokens[who])
        assert (status == 200) == (may_read(who, name) and who != "sensor")


def test_the_log_shows_each_token_what_it_may_see(closed):
    """Every sender, every mailbox, every token; and reading the log does not count as listening and moves no mark."""
    admin = closed.tokens["admin"]
    start = ask(closed, "GET", "/log?since=now", token=admin)[1]["now"]
    before = ask(closed, "GET", "/agents", token=admin)[1]["agents"]
    sent = []
    for sender, to in itertools.product(["alice", "dora", "sensor"], [*NAMES, "all"]):
        answer = ask(closed, "POST", "/send", {"to": to, "msg": "x"}, closed.tokens[sender])[1]
        sent.append((sender, to, answer["id"]))
    for who, token in closed.tokens.items():
        answer = ask(closed, "GET", f"/log?since={start}&max=1000", token=token)[1]
        expected = [each[2] for each in sent if each[0] == who or may_read(who, each[1])]
        assert [each["id"] for each in answer["messages"]] == expected and not answer["more"], who
        answer = ask(closed, "GET", f"/log?since={start}&to=bob&from=dora", token=token)[1]
        assert len(answer["messages"]) == (who == "dora" or may_read(who, "bob")), who
    seen = {each["name"]: (each["last_seen"], each["cursor"]) for each in before}
    after = ask(closed, "GET", "/agents", token=admin)[1]["agents"]
    assert {each["name"]: (each["last_seen"], each["cursor"]) for each in after if each["name"] in seen} == seen
    for _, to, ident in sent:
        if to != "all":
            assert ask(closed, "GET", f"/message/{ident}", token=admin)[1]["state"] == "queued"


def test_a_token_waits_in_the_log_for_what_it_may_see(closed):
    token = closed.tokens["carl"]
    start = ask(closed, "GET", "/log?since=now", token=token)[1]["now"]
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(ask, closed, "GET", f"/log?since={start}&wait={PATIENCE}", token=token)
        ask(closed, "POST", "/send", {"to": "dora", "msg": "for another"}, closed.tokens["alice"])
        ask(closed, "POST", "/send", {"to": "carl", "msg": "for me"}, closed.tokens["alice"])
        answer = waiting.result(PATIENCE)[1]
    assert [each["msg"] for each in answer["messages"]] == ["for me"]


def test_a_message_is_shown_to_who_sent_it_and_who_may_read_it(closed):
    for sender, to in itertools.product(NAMES, NAMES):
        _, sent = ask(closed, "POST", "/send", {"to": to, "msg": "x"}, closed.tokens[sender])
        for who, token in closed.tokens.items():
            status, _ = ask(closed, "GET", f"/message/{sent['id']}", token=token)
            assert status == (200 if who == sender or may_read(who, to) else 404), (sender, to, who)


def test_work_is_handed_to_who_may_read_the_queue(closed):
    for who, queue in itertools.product(closed.tokens, NAMES):
        status, _ = ask(closed, "POST", "/claim", {"to": queue, "wait": 0}, closed.tokens[who])
        assert status == (200 if may_read(who, queue) else 403), (who, queue)


def test_a_question_is_asked_by_who_can_read_its_answer(closed):
    for who, token in closed.tokens.items():
        status, _ = ask(closed, "POST", "/ask?wait=0", {"to": "alice", "msg": "x"}, token)
        assert status == (403 if who == "sensor" else 200), who


def test_a_thread_shows_each_one_what_that_one_may_see(closed):
    _, root = ask(closed, "POST", "/send", {"to": "dora", "msg": "root"}, closed.tokens["alice"])
    reply = {"to": "eve", "msg": "reply", "reply_to": root["id"]}
    ask(closed, "POST", "/send", reply, closed.tokens["dora"])
    both = ["root", "reply"]
    for who, seen in {"alice": ["root"], "dora": both, "eve": ["reply"], "admin": both}.items():
        _, answer = ask(closed, "GET", f"/thread/{root['id']}", token=closed.tokens[who])
        assert [message["msg"] for message in answer["messages"]] == seen, who
    assert ask(closed, "GET", f"/thread/{root['id']}", token=closed.tokens["carl"])[0] == 404


def test_a_message_is_recalled_by_its_sender_only(closed):
    _, sent = ask(closed, "POST", "/send", {"to": "carl", "msg": "x"}, closed.tokens["eve"])
    recalls = {who: ask(closed, "POST", "/recall", {"id": sent["id"]}, closed.tokens[who])[0] for who in NAMES}
    assert recalls == {"alice": 404, "bob": 404, "carl": 403, "dora": 404, "eve": 200}


def test_figures_are_for_an_operator_and_files_for_who_may_read(closed):
    path = "/blob/" + "0" * 64
    for who, token in closed.tokens.items():
        for figures in ("/metrics", "/activity"):
            assert ask(closed, "GET", figures, token=token)[0] == (200 if who == "admin" else 403)
        assert ask(closed, "GET", path, token=token)[0] == (403 if who == "sensor" else 404)
    assert [ask(closed, method, path)[0] for method in ("GET", "PUT")] == [401, 401]


def test_agents_and_inbox_show_counts_of_own_mailboxes_only(closed):
    for name in NAMES:
        ask(closed, "GET", f"/recv?to={name}", token=closed.tokens[name])
    for who, token in closed.tokens.items():
        inbox = ask(closed, "GET", "/inbox", token=token)[1]["recipients"].get("default", {})
        assert all(may_read(who, name) for name in inbox), (who, inbox)
        agents = ask(closed, "GET", "/agents", token=token)[1]["agents"]
        assert set(NAMES) <= {agent["name"] for agent in agents}
        for agent in agents:
            assert ({"unread", "cursor", "address"} <= agent.keys()) == may_read(who, agent["name"]), (who, agent)


@pytest.mark.parametrize("path", ["/recv?to=alice", "/log", "/agents", "/inbox", "/message/1", "/nothing"])
def test_without_a_token_there_is_only_help(closed, path):
    wrong = "abt_00000000_" + "x" * 43
    for headers in (
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic YTpi"},
        {"Authorization": f"Bearer {wrong}"},
        {"Authorization": f"Bearer {closed.tokens['alice']}x"},
        {"Authorization": closed.tokens["alice"]},
    ):
        status, answer = ask(closed, "GET", path, **headers)
        assert status == 401 and "token" in answer["error"], (headers, answer)
    assert ask(closed, "POST", "/send", {"from": "alice", "to": "bob", "msg": "x"})[0] == 401
    for public in ("/", "/healthz", "/bus_recv.py"):
        assert ask(closed, "GET", public)[0] == 200


def test_a_token_in_a_url_is_refused_and_not_logged(tmp_path):
    with Server(tmp_path / "bus.db", "--verbose") as bus:
        token = invite(bus, "alice")
        for written in (token, token.replace("abt_", "%61bt%5f")):
            status, answer = ask(bus, "GET", f"/recv?to=alice&token={written}")
            assert status == 400 and "Authorization" in answer["error"]
        wait_until(lambda: bus.log.read_text().count(" 400 ") == 2)
        assert token[13:] not in bus.log.read_text()


def test_a_name_that_begins_as_a_token_does_is_a_name(bus):
    assert ask(bus, "POST", "/send", {"from": "eve", "to": "abt_agent", "msg": "x"})[0] == 200
    assert ask(bus, "GET", "/recv?to=abt_agent")[0] == 200


def test_a_secret_is_nowhere_but_with_its_owner(tmp_path):
    """Not in the database, the tokens file, the log, an error, a command line."""
    with Server(tmp_path / "bus.db", "--verbose") as bus:
        token = invite(bus, "alice")
        secret = token[13:]
        errors = [
            ask(bus, *request)
            for request in (
                ("POST", "/send", {"from": "bob", "to": "x", "msg": "x"}, token),
                ("GET", "/metrics", None, token),
                ("GET", "/recv?to=bob", None, token),
                ("GET", "/recv?to=alice&since=x", None, token),
                ("PUT", "/x", None, token),
                ("GET", f"/recv?to={token}", None, token),
                ("GET", "/recv?to=alice", None, token[:-1] + "!"),
            )
        ]
        assert all(status >= 400 for status, _ in errors)
        arguments = " ".join(bus.process.args)
        assert bus.stop() == 0
        assert secret not in repr(errors) + arguments
        assert secret not in command(bus, "tokens")
        for path in tmp_path.iterdir():
            assert secret.encode() not in path.read_bytes(), path
            assert path.name.endswith(".stderr") or path.stat().st_mode & 0o077 == 0, path


def test_an_unknown_id_and_a_wrong_secret_take_as_long(closed):
    """Medians of interleaved pairs on one connection; a measurement that was disturbed is taken again."""
    peer = http.client.HTTPConnection("127.0.0.1", closed.port, timeout=PATIENCE)
    known = closed.tokens["alice"][:12]

    def took(token):
        start = time.perf_counter()
        peer.request("GET", "/agents", headers={"Authorization": f"Bearer {token}", "Connection": "keep-alive"})
        assert peer.getresponse().read().startswith(b'{"error"')
        return time.perf_counter() - start

    for _ in range(10):
        pairs = [(took("abt_ffffffff_" + "x" * 43), took(f"{known}_" + "x" * 43)) for _ in range(700)]
        unknown, wrong = (statistics.median(column) for column in zip(*pairs))
        if abs(unknown - wrong) <= 0.05 * max(unknown, wrong):
            return
    pytest.fail(f"an unknown id takes {unknown * 1e6:.1f} us, a wrong secret {wrong * 1e6:.1f} us")


def test_revoking_ends_a_parked_poll_and_everything_after(tmp_path):
    with Server(tmp_path / "bus.db") as bus:
        token, other = invite(bus, "alice"), invite(bus, "bob")
        answers = []
        reader = threading.Thread(
            target=lambda: answers.append(ask(bus, "GET", "/recv?to=alice&block=true", token=token))
        )
        reader.start()
        wait_until(lambda: ask(bus, "GET", "/agents", token=other)[1]["agents"])
        assert "revoked" in command(bus, "revoke", "alice")
        reader.join(PATIENCE)  # which is less than the 25 s that an empty poll is held
        assert answers[0][0] == 401
        assert ask(bus, "GET", "/recv?to=alice", token=token)[0] == 401
        assert ask(bus, "GET", "/recv?to=bob", token=other)[0] == 200
        command(bus, "revoke", "bob")
        wait_until(lambda: ask(bus, "GET", "/recv?to=bob", token=other)[0] == 401)
        assert ask(bus, "GET", "/recv?to=bob")[0] == 401, "a bus without a valid token fell open"
        assert "revoked" in command(bus, "tokens")


def test_the_first_token_closes_the_bus_also_for_who_is_parked(bus):
    answers = []
    reader = threading.Thread(target=lambda: answers.append(ask(bus, "GET", "/recv?to=alice&block=true")))
    reader.start()
    wait_until(lambda: ask(bus, "GET", "/agents")[1]["agents"])
    invite(bus, "bob")
    wait_until(lambda: ask(bus, "GET", "/agents")[0] == 401)
    reader.join(PATIENCE)
    assert answers[0][0] == 401


def test_revoking_what_nobody_has_throws_nobody_out_of_an_open_bus(bus):
    answers = []
    reader = threading.Thread(target=lambda: answers.append(ask(bus, "GET", "/recv?to=alice&block=true&wait=2")))
    reader.start()
    wait_until(lambda: ask(bus, "GET", "/agents")[1]["agents"])
    assert command(bus, "revoke", "typo", code=1) == "typo has no token\n"
    reader.join(PATIENCE)
    assert answers[0][0] == 200 and answers[0][1]["messages"] == []
    assert not os.path.exists(f"{bus.db}.tokens") and not os.path.exists(f"{bus.db}.tokens.lock")


def test_the_list_says_who_has_what_and_when_it_was_used(tmp_path):
    with Server(tmp_path / "bus.db") as bus:
        token = invite(bus, "alice", "--also", "team")
        invite(bus, "sensor", "--send-only")
        ask(bus, "GET", "/recv?to=alice", token=token)
        assert bus.stop() == 0
        lines = command(bus, "tokens").splitlines()
        today = time.strftime("%Y-%m-%d", time.gmtime())
        assert lines[1].split() == [token[:12], "alice", today, today, "never", "send", "read", "read:team"]
        assert lines[2].split()[1:] == ["sensor", today, "never", "never", "send"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["invite"],
        ["invite", "a b"],
        ["invite", "ALL"],
        ["invite", "x", "--also", "a b"],
        ["invite", "x", "--send-only", "--operator"],
        ["invite", "x", "--url", "bus.lan:8080"],
        ["invite", "x", "--url", "https://me:secret@bus.lan"],
        ["invite", "x", "--expires", "soon"],
        ["revoke"],
    ],
)
def test_a_bad_command_is_refused_in_words(arguments, tmp_path):
    done = forked.run(
        [*COMMAND, *arguments, "--db", str(tmp_path / "bus.db")],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 2 and "error:" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "bus.db.tokens").exists()


def test_a_label_tells_tokens_of_a_name_apart_and_revokes_one(bus):
    laptop, tower = (invite(bus, "dell", "--label", label) for label in ("laptop", "the tower"))
    unlabelled = invite(bus, "dell")
    lines = command(bus, "tokens").splitlines()
    assert [line.partition(" (")[2] for line in lines[1:]] == ["laptop)", "the tower)", ""]
    said = command(bus, "revoke", "dell", "--label", "the tower")
    assert said == f"revoked the tokens of dell the tower: {tower[:12]}\n"
    wait_until(lambda: ask(bus, "GET", "/recv?to=dell", token=tower)[0] == 401)
    assert [ask(bus, "GET", "/recv?to=dell", token=each)[0] for each in (laptop, unlabelled)] == [200, 200]
    assert "dell desk has no token\n" in command(bus, "revoke", "dell", "--label", "desk", code=1)
    said = command(bus, "revoke", "dell", "--label", "Lap-top", code=1)
    assert said == "dell Lap-top has no token: did you mean laptop?\n"


def test_one_token_is_revoked_and_listed_by_its_id(bus):
    first, second = invite(bus, "dell"), invite(bus, "dell")
    assert first[:12] in command(bus, "tokens", first[:12]) and second[:12] not in command(bus, "tokens", first[:12])
    assert command(bus, "revoke", first[:12]) == f"revoked one token of dell: {first[:12]}\n"
    wait_until(lambda: ask(bus, "GET", "/recv?to=dell", token=first)[0] == 401)
    assert ask(bus, "GET", "/recv?to=dell", token=second)[0] == 200
    assert command(bus, "revoke", first[:12], code=1) == f"{first[:12]} is revoked already\n"
    assert command(bus, "revoke", second[:12], "--label", "x", code=1) == f"{second[:12]} x has no token\n"
    for verb in ("revoke", "tokens"):
        assert command(bus, verb, "abt_00000000", code=1) == "there is no token with the id abt_00000000\n"


@pytest.mark.parametrize("length", [9, 11, 13, 40, 99])
def test_a_token_that_was_pasted_is_not_taken_for_a_name(length, bus):
    token = invite(bus, "dell")
    for verb in ("revoke", "tokens"):
        said = command(bus, verb, token[:length], code=1)
        assert "looks like a token, whole or cut short" in said and said.endswith(f": did you mean {token[:12]}?\n")
        assert token[12:16] not in said


def test_a_list_without_a_token_says_that_the_bus_is_open(tmp_path):
    with Server(tmp_path / "bus.db") as bus:
        assert run("tokens", "--db", bus.db) == (0, "no tokens: the bus is open\n", "")


@pytest.mark.parametrize("verb", ["revoke", "tokens"])
def test_a_mistyped_name_gets_the_one_that_may_be_meant(verb, bus):
    dell, nano = invite(bus, "dell"), invite(bus, "Nano")
    assert command(bus, verb, "dlel", code=1) == "dlel has no token: did you mean dell?\n"
    assert command(bus, verb, "NANO", code=1) == "NANO has no token: did you mean Nano?\n"
    assert command(bus, verb, "architect", code=1) == "architect has no token\n"
    listed = command(bus, "tokens", "dell")
    assert dell[:12] in listed and nano[:12] not in listed and listed.count("\n") == 2


def test_a_copy_that_does_not_exist_is_said_to_be_none_and_nothing_is_made(tmp_path):
    code, out, err = run("restore", tmp_path / "cpoy.db", "--db", tmp_path / "new" / "bus.db")
    said = f"bus_server: there is no file {tmp_path}/cpoy.db: give the COPY that backup has made\n"
    assert (code, out, err) == (2, "", said) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["tokens"], ["revoke", "x"], ["prune"], ["backup", "COPY"]])
def test_a_mistyped_database_is_said_to_be_none_and_nothing_is_made(arguments, tmp_path):
    arguments = [str(tmp_path / each) if each == "COPY" else each for each in arguments]
    code, out, err = run(*arguments, "--db", tmp_path / "bsu.db")
    assert (code, out) == (2, "") and err.startswith(f"bus_server: there is no bus with the database {tmp_path}/bsu.db")
    assert "give --db PATH" in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_token_with_an_end_is_good_until_then_and_listed_with_it(bus):
    token = invite(bus, "dell", "--expires", "90d")
    assert ask(bus, "GET", "/recv?to=dell", token=token)[0] == 200
    ends = json.loads(pathlib.Path(f"{bus.db}.tokens").read_text())["expires"]
    listed = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ends))
    assert command(bus, "tokens").splitlines()[1].split()[4] == listed


def test_an_expired_token_is_refused_in_words_that_only_its_owner_gets(bus):
    token = invite(bus, "dell", "--expires", "1d")
    set_expires(bus, "dell", 1795203596)
    wait_until(lambda: ask(bus, "GET", "/recv?to=dell", token=token)[0] == 401)
    assert command(bus, "tokens").splitlines()[1].split()[4:] == ["2026-11-20T19:39:56Z", "expired"]
    error = ask(bus, "GET", "/recv?to=dell", token=token)[1]["error"]
    assert error.startswith("this token expired at 2026-11-20T19:39:56Z: set AGENT_BUS_TOKEN")
    status, answer = ask(bus, "GET", "/recv?to=dell", token=token[:-1] + ("x" if token[-1] != "x" else "y"))
    assert status == 401 and answer["error"].startswith("this bus does not accept this token, which is wrong")


def test_a_token_that_expires_while_it_is_parked_ends_its_poll_in_words(bus):
    """Nothing writes the file at that moment."""
    token, answers = invite(bus, "dell", "--expires", "2s"), []
    reader = threading.Thread(target=lambda: answers.append(ask(bus, "GET", "/recv?to=dell&block=true", token=token)))
    reader.start()
    reader.join(PATIENCE)
    assert answers[0][0] == 401 and "this token expired at 20" in answers[0][1]["error"]
    assert ask(bus, "POST", "/send", {"to": "bob", "msg": "late"}, token=token)[0] == 401


def test_the_world_is_not_let_in_without_identity(tmp_path):
    start = [
        sys.executable,
        str(ROOT / "bus_server.py"),
        "--host",
        "0.0.0.0",
        "--port",
        "0",
        "--db",
        str(tmp_path / "bus.db"),
    ]
    done = forked.run(start, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and "--open" in done.stderr and done.stderr.count("\n") == 1
    its = shlex.quote(str(tmp_path / "bus.db"))
    assert f"invite NAME --db {its})" in done.stderr, "else the token is another bus's"
    with Server(tmp_path / "bus.db", "--host", "0.0.0.0", "--open") as bus:
        wait_until(lambda: "WARNING: anyone who can reach" in bus.log.read_text())
        invite(bus, "alice")
    with Server(tmp_path / "bus.db", "--host", "0.0.0.0") as bus:
        assert ask(bus, "GET", "/agents")[0] == 401
        assert bus.log.read_text().count("WARNING") == 1


# The browser gate

BROWSER = {"User-Agent": "Mozilla/5.0", "Accept-Language": "en"}
PAGES = [  # what a page of another site can make a browser send without asking us first
    ("POST", "/send", {"Origin": "https://evil.example", "Content-Type": "text/plain"}),
    ("POST", "/send", {"Origin": "null", "Content-Type": "text/plain"}),
    ("POST", "/send", {"Origin": "http://evil.example", "Content-Type": "application/x-www-form-urlencoded"}),
    ("POST", "/send", {"Origin": "http://evil.example", "Content-Type": "multipart/form-data; boundary=x"}),
    ("POST", "/send?from=evil&to=bob", {"Origin": "http://evil.example", "Sec-Fetch-Mode": "no-cors"}),
    ("POST", "/send", {"Sec-Fetch-Site": "cross-site"}),
    ("POST", "/send", {"Sec-Fetch-Site": "same-site"}),
    ("POST", "/send", {"Host": "evil.example", "Origin": "http://evil.example", "Sec-Fetch-Site": "same-origin"}),
    ("POST", "/send", {"Host": "evil.example:8080", "Sec-Fetch-Site": "none"}),
    ("GET", "/recv?to=bob", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}),
    ("GET", "/recv?to=bob", {"Host": "rebound.example", "Sec-Fetch-Site": "same-origin"}),
    # An image, over http from another machine: a browser says neither which page has it nor that there is one.
    ("GET", "/recv?to=bob&since=now", {"Host": "192.0.2.2:8080", **BROWSER}),
    ("GET", "/log", {"Host": "192.0.2.2:8080", **BROWSER}),
    ("GET", "/digest?to=ghost&wait=1", {"Host": "192.0.2.2:8080", **BROWSER}),
    ("GET", "/search?q=secret", {"Host": "192.0.2.2:8080", **BROWSER}),
    ("GET", "/message/1?as=bob", {"Host": "192.0.2.2:8080", **BROWSER}),
    ("GET", "/thread/1?as=bob", {"Host": "192.0.2.2:8080", **BROWSER}),
    ("OPTIONS", "/send", {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}),
]


def test_what_takes_or_waits_is_kept_from_a_browser_that_does_not_say_which_page_asks(tmp_path):
    bus = inside.make(tmp_path / "bus.db")
    inside.close(bus)
    takes = {path for (method, path), route in bus.routes.items() if method == "GET" and route.takes}
    assert takes and takes < set(bus_server.TAKING)


@pytest.fixture(scope="module")
def with_a_secret(tmp_path_factory):
    """A bus with one message, which stays unread."""
    with Server(tmp_path_factory.mktemp("secret") / "bus.db") as bus:
        ask(bus, "POST", "/send", {"from": "alice", "to": "bob", "msg": "secret"})
        yield bus


@pytest.mark.parametrize(("method", "path", "headers"), PAGES)
def test_a_page_of_another_site_stores_and_reads_nothing(with_a_secret, method, path, headers):
    bus = with_a_secret
    body = {"from": "evil", "to": "bob", "msg": "hello"} if method == "POST" else None
    status, answer = ask(bus, method, path, body, **{name.replace("-", "_"): value for name, value in headers.items()})
    assert status == 403 and "secret" not in repr(answer)
    messages = ask(bus, "GET", "/log")[1]["messages"]
    assert [message["from"] for message in messages] == ["alice"]
    assert ask(bus, "GET", "/inbox")[1]["recipients"]["default"]["bob"] == 1


def test_our_page_and_programs_are_answered_over_http_too(with_a_secret):
    browser = {name.replace("-", "_"): value for name, value in BROWSER.items()}
    for headers in ({**browser, "X_Agent_Page": "1"}, {"User_Agent": "Mozilla/5.0"}, {"Accept_Language": "*"}, {}):
        assert ask(with_a_secret, "GET", "/recv?to=eve", Host="192.0.2.2:8080", **headers)[0] == 200
    assert ask(with_a_secret, "GET", "/agents", Host="192.0.2.2:8080", **browser)[0] == 200


def test_names_of_its_own_are_answered(tmp_path):
    with Server(tmp_path / "bus.db", "--allow-host", "bus.example") as bus:
        for host in (
            f"127.0.0.1:{bus.port}",
            "localhost:1",
            "LOCALHOST",
            "[::1]:8080",
            "10.1.2.3",
            "bus.example",
            "Bus.Example:443",
        ):
            assert ask(bus, "GET", "/healthz", Host=host)[0] == 200, host
            assert (
                ask(bus, "GET", "/healthz", Host=host, Origin=f"http://{host}", Sec_Fetch_Site="same-origin")[0] == 200
            )
        for host in ("evil.example", "bus.example.evil", "localhost.evil", "127.0.0.1.nip.example", "1"):
            assert ask(bus, "GET", "/healthz", Host=host)[0] == 403, host
    with Server(tmp_path / "tokens.db") as bus:
        token = invite(bus, "alice")
        assert ask(bus, "GET", "/agents", token=token, Host="bus.behind.a.proxy")[0] == 200
