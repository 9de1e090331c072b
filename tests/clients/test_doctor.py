"""The doctor names the hop that fails, says what to do, and leaves the bus as it was."""
import contextlib
import email.utils
import functools
import json
import os
import re
import shlex
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

import bus_recv
import bus_send
import bus_server
from tests.clients.test_clients import refusing
from tests.kit import bad_servers, forked
from tests.kit.bad_servers import FAULTS, HTML, Scripted, answer, mail, page
from tests.kit.peers import invite
from tests.kit.processes import PATIENCE, ROOT, SERVER, Server, free_port, no_settings, wait_until
from tools import bus_doctor

HOPS = ["url", "proxy", "dns", "tcp", "tls", "http", "bus", "clock", "token", "send", "recv", "hold", "file"]
NOBODYS = "abt_00000000_" + "s" * 43
NO_RECEIVER = answer({"error": "to is required"}, status=400)


@pytest.fixture
def examine(monkeypatch, capsys):
    """examine(url, **environment) -> ({hop: (verdict, what was found, what to do)}, exit code)."""
    no_settings(monkeypatch)
    monkeypatch.setattr(bus_doctor.Bus, "PATIENCE", 5.0)

    def examine(url, *options, **environment):
        with monkeypatch.context() as patch:
            for variable, value in {"AGENT_BUS_URL": url, "AGENT_NAME": "spark", **environment}.items():
                patch.setenv(variable, value)
            code = bus_doctor.main(options or ["--hold", "0"])
        printed = capsys.readouterr()
        assert not printed.err
        assert not re.search("abt_[0-9a-f]{8}_|secret", printed.out)
        found, hop = {}, None
        for line in printed.out.splitlines():
            if line.startswith("             -> "):
                found[hop] = (*found[hop][:2], line[16:])
            else:
                verdict, hop, text = re.fullmatch("(ok|warn|-|FAIL) +([a-z]+) +(.+)", line).groups()
                assert hop not in found
                found[hop] = (verdict, text, "")
        assert list(found) == HOPS[: len(found)]
        verdicts = [verdict for verdict, *_ in found.values()]
        assert code == (1 if "FAIL" in verdicts else 0) and "FAIL" not in verdicts[:-1]
        assert code or len(found) == len(HOPS)
        assert all(text.startswith("skipped: ") for verdict, text, _ in found.values() if verdict == "-")
        assert all(bool(advice) == (verdict in ("warn", "FAIL")) for verdict, _, advice in found.values()), found
        return found, code

    return examine


@pytest.fixture
def fails(examine):
    """fails(hop, found, advice, url, ...): it ends there, and both texts match."""

    def fails(hop, found, advice, *where, **environment):
        walk, code = examine(*where, **environment)
        assert code == 1 and list(walk)[-1] == hop, walk
        assert re.search(found, walk[hop][1]) and re.search(advice, walk[hop][2]), walk[hop]

    return fails


@pytest.fixture
def resolve(monkeypatch):
    """bus.example is this machine."""
    real = socket.getaddrinfo

    def resolve(host, *rest, **more):
        return real("127.0.0.1" if host.endswith(".example") else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


# ── All is well ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_good_way_is_ok_at_every_hop_and_the_bus_is_as_it_was(bus, examine):
    bus_send.send("spark", "one", url=bus.url, sender="dell")
    bus.get(f"/recv?to=spark&since={json.loads(bus.get('/log'), parse_float=str)['now']}")
    bus_send.send("spark", "two", url=bus.url, sender="dell")

    def mail():
        agents = json.loads(bus.get("/agents"))["agents"]
        log = json.loads(bus.get("/log"))["messages"]
        states = [json.loads(bus.get(f"/message/{each['id']}"))["state"] for each in log]
        return log, states, agents

    before = mail()
    assert before[1] == ["acknowledged", "queued"]
    found, code = examine(bus.url, "--hold", "2")
    assert code == 0 and {verdict for verdict, *_ in found.values()} == {"ok"}, found
    assert found["hold"][1] == "open for 2 s"
    assert mail() == before


def test_what_was_skipped_is_not_called_ok(bus, examine):
    found, _ = examine(bus.url)
    assert found["hold"] == ("-", "skipped: --hold is 0", "") and found["recv"][0] == "ok"
    found, code = examine(bus.url, AGENT_NAME="")
    assert found["recv"] == found["hold"] == ("-", "skipped: AGENT_NAME is not set", "") and code == 0


def test_a_good_token_is_ok_and_never_shown(tmp_path, examine):
    with Server(tmp_path / "bus.db") as bus:
        token = invite(bus, "spark")
        path = tmp_path / "token"
        path.write_text(token)
        path.chmod(0o600)
        for setting in ({"AGENT_BUS_TOKEN": token}, {"AGENT_BUS_TOKEN_FILE": str(path)}):
            found, code = examine(bus.url, **setting)
            assert code == 0 and found["token"] == ("ok", f"{token[:12]} is valid", "")
            assert found["send"][1].startswith("as spark: 64 KiB") and found["recv"][0] == "ok"


def test_it_runs_as_a_program_from_anywhere(bus, tmp_path):
    program = [sys.executable, "-I", "-S", str(ROOT / "tools" / "bus_doctor.py")]
    run = functools.partial(forked.run, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE,
                            env={"AGENT_BUS_URL": bus.url, "AGENT_NAME": "spark"})  # fmt: skip
    assert run([*program, "--hold", "0"]).returncode == 0
    usage = run([*program, "--hold", "61"])
    assert usage.returncode == 2 and "0 to 60" in usage.stderr


# ── Each hop ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://bus", "http://", "http://bus:port", "http://a b", "http://b?c"])
def test_a_url_that_is_none(fails, url):
    fails("url", "", "http://|correct", url)


def test_a_secret_in_the_url_is_not_shown(fails, capsys):
    fails("url", "has a login", "", f"http://me:{NOBODYS}@127.0.0.1:{free_port()}")


def test_a_proxy_variable_is_ignored_for_this_machine(bus, examine):
    found, code = examine(bus.url, http_proxy="http://127.0.0.1:1")
    assert code == 0 and "http_proxy is set, and not used" in found["proxy"][1]


def test_the_proxy_that_is_used_is_named(fails, examine, resolve):
    with Scripted(mail(), health=page(502, HTML, "Server: squid")) as proxy:
        port = proxy.url.rpartition(":")[2]
        variable = {"HTTP_PROXY": f"http://me:secret@127.0.0.1:{port}"}
        fails("http", "502.*squid", "http_proxy", "http://bus.example", **variable)
        found, _ = examine("http://bus.example", **variable)
        assert found["proxy"][1] == f"HTTP_PROXY leads through 127.0.0.1 port {port}"
        found, _ = examine(f"http://bus.example:{free_port()}", **variable, NO_PROXY="bus.example")
        assert "bus.example is in no_proxy" in found["proxy"][1] and list(found)[-1] == "tcp"


def test_a_proxy_that_does_not_let_tls_through(fails):
    with Scripted(page(403, HTML)) as proxy:
        fails("tls", "403", "proxy", "https://bus.example", HTTPS_PROXY=proxy.url)


def test_a_name_without_an_address(fails, monkeypatch):
    def resolve(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    fails("dns", "no address for bus.example", "spelled", "http://bus.example:8080")


def test_a_port_where_nothing_listens(fails):
    fails("tcp", "refuses", "--host", f"http://127.0.0.1:{free_port()}")


@pytest.mark.parametrize("error, found, advice", [
    (socket.timeout("timed out"), "does not answer", "firewall"),
    (OSError(113, "No route to host"), "No route to host", "VPN"),
])  # fmt: skip
def test_a_host_that_is_out_of_reach(fails, monkeypatch, error, found, advice):
    def create_connection(*_, **__):
        raise error

    monkeypatch.setattr(socket, "create_connection", create_connection)
    fails("tcp", found, advice, "http://127.0.0.1:8080")


@contextlib.contextmanager
def secured(place, certificate):
    with Server(place / "bus.db", "--tls-cert", certificate.file, "--tls-key", certificate.key) as bus:
        bus.url = bus.url.replace("http:", "https:")
        yield bus


def test_a_certificate_of_an_authority_of_our_own(tmp_path, authority, examine, fails):
    with secured(tmp_path, authority.sign("IP:127.0.0.1")) as bus:
        fails("tls", "not valid: .*issuer", "AGENT_BUS_CA", bus.url)
        found, code = examine(bus.url, AGENT_BUS_CA=authority.file)
        assert code == 0 and found["tls"] == ("ok", "the certificate is valid", "")
        fails("url", "AGENT_BUS_CA", "correct", bus.url, AGENT_BUS_CA=str(tmp_path))
        other = authority.sign("IP:127.0.0.1").file
        fails("tls", "not valid", f"{other} is not of the authority that signed it", bus.url, AGENT_BUS_CA=str(other))


def test_a_bus_that_was_joined_and_has_a_new_key(tmp_path, authority, fails, home, monkeypatch):
    """No operator has a file for AGENT_BUS_CA to give away: only another invitation brings the new key."""
    kept = tmp_path / "config" / "agent-bus" / "work.pem"
    kept.parent.mkdir(parents=True)
    shutil.copy(authority.self_signed("IP:127.0.0.1").file, kept)
    with secured(tmp_path, authority.self_signed("IP:127.0.0.1")) as bus:
        settings = f"AGENT_BUS_URL={bus.url}\nAGENT_BUS_CA={kept}\n"
        bus_recv.append(str(kept.with_suffix(".env")), settings)
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
        monkeypatch.setenv("AGENT_BUS_PROFILE", "work")
        anew = "^if the bus has a new key, ask its operator for a new invitation, and run its line$"
        fails("tls", "not valid", anew, bus.url)
        with pytest.raises(bus_recv.Unreachable) as fault:
            bus_recv.ask(bus.url, "/healthz", PATIENCE)
        assert re.search(anew[1:], str(fault.value)) and f"is not trusted by {kept}: " in str(fault.value)


def test_a_certificate_for_another_name(tmp_path, authority, fails, resolve):
    with secured(tmp_path, authority.sign("DNS:other.example")) as bus:
        fails("tls", "IP address mismatch", "use a name", bus.url, AGENT_BUS_CA=authority.file)
        named = bus.url.replace("127.0.0.1", "bus.example")
        fails("tls", "Hostname mismatch", "use a name", named, AGENT_BUS_CA=authority.file)


def test_a_certificate_that_has_expired(tmp_path, authority, fails):
    certificate = authority.sign("IP:127.0.0.1", days=0)
    valid = ["openssl", "x509", "-checkend", "0", "-noout", "-in", certificate.file]
    wait_until(lambda: subprocess.run(valid, capture_output=True).returncode)  # in the second after it was made
    with secured(tmp_path, certificate) as bus:
        fails("tls", "expired", "renew", bus.url, AGENT_BUS_CA=authority.file)


def test_https_where_http_is_spoken(bus, fails):
    fails("tls", "speaks http$", f"AGENT_BUS_URL={bus.url}", bus.url.replace("http:", "https:"))


def test_http_where_https_is_spoken(tmp_path, authority, fails):
    with secured(tmp_path, authority.sign("IP:127.0.0.1")) as bus:
        fails("http", "speaks https", f"AGENT_BUS_URL={bus.url}", bus.url.replace("https:", "http:"))


def test_plain_http_across_a_network_is_a_warning_unless_it_is_meant(bus, examine, resolve):
    with Scripted(NO_RECEIVER) as bus:
        url = bus.url.replace("127.0.0.1", "bus.example")
        assert "AGENT_BUS_PLAIN_HTTP" in examine(url)[0]["tls"][2]
        assert examine(url, AGENT_BUS_PLAIN_HTTP="1")[0]["tls"][0] == "ok"


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_else_is_taken_for_the_bus(examine, monkeypatch, fault):
    monkeypatch.setattr(bus_doctor.Bus, "PATIENCE", 0.2)
    with Scripted(mail(), health=FAULTS[fault]) as stranger:
        found, code = examine(stranger.url)
    assert code == 1 and list(found)[-1] in ("http", "bus"), found


IN_ITS_PLACE = {
    "a redirect to https": (page(301, "", "Location: https://bus.example/healthz"), "https://bus.example",
                            "AGENT_BUS_URL=https://bus.example$"),
    "a redirect to a login": (page(302, "", "Location: /login?next=/healthz"), "/login", "follow no redirect"),
    "a login": (page(401, HTML, "WWW-Authenticate: Basic"), "401", "tunnel"),
    "the login of a proxy": (page(407, HTML), "407", "tunnel"),
    "a firewall": (page(403, "<title>Attention</title>", "Server: waf"), "'Attention', from waf", "AGENT_BUS_UA"),
    "a captive portal": (page(200, "<TITLE>Wi-Fi</TITLE>"), "'Wi-Fi'", "login page"),
    "a proxy without a bus": (page(502, HTML, "Server: nginx"), "502.*from nginx", "is the bus running"),
    "a proxy whose bus is silent": (page(504, HTML), "504", "is the bus running"),
    "a status of somebody's own": (page(522, HTML), "522", "is the bus running"),
    "a path that is too long": (answer({"error": "there is nothing at /send/healthz"}, status=404), "/send/healthz",
                                "must end before"),
    "a bus that is stopped": (answer({"error": "shutting down"}, status=503), "shutting down", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", IN_ITS_PLACE)
def test_the_page_or_the_refusal_is_told_and_what_to_do(fails, case):
    health, found, advice = IN_ITS_PLACE[case]
    with Scripted(mail(), health=health) as stranger:
        fails("http", found, advice, stranger.url)


def test_nothing_but_silence(fails, monkeypatch):
    monkeypatch.setattr(bus_doctor.Bus, "PATIENCE", 0.2)
    with Scripted(mail(), health=bad_servers.silence) as stuck:
        fails("http", "no answer: timed out", "log", stuck.url)


def test_a_name_that_the_bus_does_not_answer_to(bus, fails, resolve):
    fails("http", "does not answer to bus.example", "--allow-host", bus.url.replace("127.0.0.1", "bus.example"))


def test_another_json_than_that_of_a_bus(fails):
    with Scripted(mail(), health=answer({"status": "ok"})) as other:
        fails("bus", "not an agent-bus", "right host", other.url)


def test_a_bus_of_the_first_contract_is_a_warning(examine):
    with Scripted(NO_RECEIVER, bus=None) as bus:
        found, _ = examine(bus.url, AGENT_NAME="")
    assert found["bus"][0] == "warn" and "first contract" in found["bus"][1]


@pytest.mark.parametrize("theirs, verdict, found", [
    (0, "ok", "within"), (100, "ok", "within"), (-150, "warn", "1[56]. s ahead"), (3600, "warn", "3[56].. s behind"),
])  # fmt: skip
def test_a_clock_that_is_wrong_is_a_warning(examine, theirs, verdict, found):
    date = email.utils.formatdate(time.time() + theirs, usegmt=True)
    health = answer({"ok": True, "now": 1.5, "bus": "b1"}, f"Date: {date}")
    with Scripted(answer({"recipients": {}}), health=health) as bus:
        clock = examine(bus.url, AGENT_NAME="")[0]["clock"]
    assert clock[0] == verdict and re.search(found, clock[1])


def test_a_token_that_is_missing_or_none_or_unknown(tmp_path, fails):
    with Server(tmp_path / "bus.db") as bus:
        token = invite(bus, "spark")
        fails("token", "needs one", "invite", bus.url)
        fails("token", r"not a token.*\(50 characters\)", "56", bus.url, AGENT_BUS_TOKEN=token[:50])
        fails("token", "does not accept abt_00000000", "tokens", bus.url, AGENT_BUS_TOKEN=NOBODYS)
        fails("token", "blanks", "correct", bus.url, AGENT_BUS_TOKEN=f"{token} {token}")


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_a_token_file_that_others_can_read_or_nobody(tmp_path, bus, fails):
    path = tmp_path / "token"
    path.write_text(NOBODYS)
    path.chmod(0o644)
    fails("token", "chmod 600", "correct", bus.url, AGENT_BUS_TOKEN_FILE=str(path))
    fails("token", "cannot be read", "correct", bus.url, AGENT_BUS_TOKEN_FILE=str(tmp_path / "none"))


def test_a_token_that_would_cross_a_network_in_the_clear(fails, resolve):
    with Scripted(mail()) as bus:
        url = bus.url.replace("127.0.0.1", "bus.example")
        fails("token", "in the clear", "correct", url, AGENT_BUS_TOKEN=NOBODYS)


def test_a_token_that_nobody_asked_for(bus, examine):
    assert "no effect" in examine(bus.url, AGENT_BUS_TOKEN=NOBODYS)[0]["token"][1]


def test_a_name_that_is_missing_or_none_or_not_that_of_the_token(tmp_path, bus, examine, fails):
    assert examine(bus.url, AGENT_NAME="")[0]["send"][0] == "warn"
    fails("send", "not a name", "1 to 64", bus.url, AGENT_NAME="two words")
    fails("send", "reserved", "another name", bus.url, AGENT_NAME="user")
    with Server(tmp_path / "closed.db") as closed:
        fails("send", "sends as dell", "AGENT_NAME", closed.url, AGENT_BUS_TOKEN=invite(closed, "dell"))
        found, code = examine(closed.url, AGENT_BUS_TOKEN=invite(closed, "sensor", "--send-only"), AGENT_NAME="sensor")
        assert code == 0 and found["recv"][0] == "warn" and "--send-only" in found["recv"][2]


LETS_SOME_PASS = {
    "a firewall against posts": ("send", answer({}), page(403, HTML)),
    "a proxy for small bodies": ("send", answer({}), page(413, HTML)),
    "a line that breaks under load": ("send", answer({}), bad_servers.reset),
    "a server that stores anything": ("send", answer({}), bad_servers.stored()),
    "a firewall for one path": ("token", page(403, HTML)),
    "a server that dies": ("token", b""),
    "a firewall against polls": ("recv", answer({}), NO_RECEIVER, page(403, HTML)),
}


@pytest.mark.parametrize("case", LETS_SOME_PASS)
def test_a_way_that_lets_some_requests_pass(fails, case):
    hop, *script = LETS_SOME_PASS[case]
    with Scripted(*script) as bus:
        fails(hop, "", "", bus.url)


def cut(seconds, then):
    """A proxy that loses patience."""

    def behave(sock):
        sock.settimeout(seconds)
        with contextlib.suppress(socket.timeout):
            sock.recv(1)
        sock.sendall(then)

    return behave


@pytest.mark.parametrize("then", [b"", page(504, HTML)], ids=["nothing", "504"])
def test_a_long_poll_that_is_cut(fails, then):
    with Scripted(answer({}), NO_RECEIVER, mail(), cut(1, then)) as bus:
        fails("hold", r"cut after 1\.\d s", "75 s.*wait=1 works$", bus.url, "--hold", "5")


def test_a_long_poll_that_is_answered_early_is_a_warning(examine):
    with Scripted(answer({}), NO_RECEIVER, mail()) as bus:
        assert examine(bus.url, "--hold", "5")[0]["hold"][0] == "warn"


def test_the_path_of_the_database_is_told_if_the_bus_is_the_one_at_the_usual_place(examine, tmp_path):
    place = tmp_path / "it's" / "agent-bus"
    place.mkdir(parents=True)
    with Server(place / "bus.db") as server:
        told = examine(server.url, XDG_STATE_HOME=str(place.parent))[0]["file"][1]
        path, command = told.split("; to look inside: ")
        assert shlex.split(command) == ["sqlite3", path, "select * from readable"] and path == server.db
        with contextlib.closing(sqlite3.connect(path)) as database:
            assert database.execute(shlex.split(command)[2]).fetchall() == []
        assert "not at the usual place" in examine(server.url, XDG_STATE_HOME=str(tmp_path))[0]["file"][1]


def test_a_disk_that_is_nearly_full_is_told_where_the_bus_runs(examine, tmp_path):
    (tmp_path / "agent-bus").mkdir()
    with Server(tmp_path / "agent-bus" / "bus.db") as server:
        assert examine(server.url, XDG_STATE_HOME=str(tmp_path))[0]["file"][0] == "ok"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 << 20))
            verdict, _, advice = examine(server.url, XDG_STATE_HOME=str(tmp_path))[0]["file"]
    assert verdict == "warn" and advice.startswith("its disk has 3.0 MiB free") and "prune" in advice


NO_ROOM = ("-S", "-c", SERVER.replace("sys.exit", "bus_server.RESERVE_BYTES = 1 << 60; sys.exit"))


def test_a_bus_whose_disk_takes_no_message_fails_wherever_its_database_is(fails, tmp_path):
    with Server(tmp_path / "bus.db", program=NO_ROOM) as server:
        fails("send", "^disk: .* MiB free: nothing was stored", "make room .* prune --older 7d", server.url)


def test_the_doctor_and_the_bus_mean_the_same_room():
    assert sys.modules[bus_doctor.Bus.__module__].ROOM_BYTES == bus_server.RESERVE_BYTES


def test_a_wrong_token_is_told_with_the_place_that_it_is_from(fails, tmp_path):
    (tmp_path / "agent-bus").mkdir()
    file = tmp_path / "agent-bus" / "default.env"
    file.touch(0o600)
    with Server(tmp_path / "bus.db") as bus:
        invite(bus, "spark")
        file.write_text(f"AGENT_BUS_URL={bus.url}\nAGENT_BUS_TOKEN={NOBODYS}\n")
        fails("token", f"from {re.escape(str(file))}", "where the bus runs", bus.url, XDG_CONFIG_HOME=str(tmp_path))
        fails("token", "from the environment", "where the bus runs", bus.url, AGENT_BUS_TOKEN=NOBODYS)


def test_a_proxy_that_cannot_be_reached_may_be_left_out(fails):
    fails("tcp", "refuses", "no_proxy=bus.example", "http://bus.example", http_proxy=refusing())


def test_a_variable_in_the_file_that_nothing_reads_is_named(examine, bus, tmp_path):
    (tmp_path / "agent-bus").mkdir()
    file = tmp_path / "agent-bus" / "default.env"
    file.touch(0o600)
    file.write_text(f"AGENT_BUS_URL={bus.url}\nAGENT_BUS_TOKN=x\nEDITOR=vi\nAGENT_BUS_CHANNEL=ops\n")
    verdict, _, advice = examine(bus.url, XDG_CONFIG_HOME=str(tmp_path))[0]["url"]
    told = f"{file} sets AGENT_BUS_TOKN, which nothing reads: did you mean AGENT_BUS_TOKEN?"
    assert (verdict, advice) == ("warn", told)


FRONT = {"ok": True, "now": 1, "bus": "b", "position": 7, "fronts": 2, "ledger": {"leads": "pg1", "waits_for": ""}}
EACH = "ok    fronts each has come to entry 7"


def way(url, **says):
    """A front that was examined, and says the same when it is asked again."""
    found = bus_doctor.Bus(url, 0)
    found.front = {**FRONT, **says}
    found.look = lambda: found.front
    return found


@pytest.mark.parametrize("odd", [{"ledger": 3}, {"ledger": {"leads": 1}, "position": 1, "fronts": 1}, {"ledger": []}])
def test_who_says_of_itself_what_no_front_does_is_no_bus(odd, monkeypatch, capsys):
    monkeypatch.setattr(bus_doctor, "HOPS", {"ledger": bus_doctor.Bus.ledger})
    other = way("http://a")
    other.front, other.first = odd, False
    assert not bus_doctor.examine(other)
    assert capsys.readouterr().out.startswith("FAIL  ledger the answer is not that of a bus\n")


@pytest.mark.parametrize(
    "others, said",
    [
        ({}, [EACH]),
        ({"position": 5}, ["warn  fronts http://b is at entry 5; another was at 7 0 s before"]),
        ({"fronts": 3}, [EACH, "warn  fronts 3 live, and 2 were asked"]),
        (
            {"ledger": {"leads": "pg2", "waits_for": ""}},
            [EACH, "warn  fronts they are told of different leaders: pg1, pg2"],
        ),
    ],
    ids=["equal", "behind", "more", "leaders"],
)
def test_the_fronts_of_a_bus_are_compared(others, said, monkeypatch, capsys):
    monkeypatch.setattr(bus_doctor, "CATCH_UP", 0.0)
    bus_doctor.compare([way("http://a"), way("http://b", **others)])
    assert [line for line in capsys.readouterr().out.splitlines() if "->" not in line] == said


def test_a_front_says_which_machine_leads_and_what_a_message_waits_for():
    alone = way("http://a")
    alone.first = False
    found, advice = alone.ledger()
    assert found == "pg1 leads; this front is at entry 7, of 2 that live; a message is on pg1 alone" and advice
    safe = way("http://a", ledger={"leads": "pg1", "waits_for": "ANY 1 (m2,m3)"})
    safe.first = False
    assert safe.ledger().endswith("; a message is stored when it is on pg1 and on ANY 1 (m2,m3)")
