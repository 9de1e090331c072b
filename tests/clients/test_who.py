"""`agent-bus who`: who is there, who listens, and what waits."""
import json
import re
import resource
import urllib.request

import pytest

from tests.clients.test_agent_bus import HOSTILE, RAW, SCRIPT, mails, on_terminal
from tests.clients.test_clients import run
from tests.clients.test_words import on_a_terminal
from tests.kit.bad_servers import DATE, NOON, Scripted, answer, page
from tests.kit.processes import in_time
from tools import bus_who

pytestmark = pytest.mark.usefixtures("home")


def poll(url, name, channel="default"):
    urllib.request.urlopen(f"{url}/recv?to={name}&channel={channel}").close()


def test_who_shows_each_name_once_and_who_listens_first(agent):
    poll(agent.url, "bob")
    poll(agent.url, "ann", "ops")
    mails(agent.url, "1", "2")
    code, out, err = agent("who")
    assert (code, err) == (0, "")
    head, *rows, last = out.splitlines()
    assert head.split() == ["NAME", "SEEN", "UNREAD", "OLDEST"]
    assert last == "2 of 3 listen, or did a moment ago. UNREAD leaves out mail to all"
    seen = [("bob", "listening", "2", "<1m"), ("ops/ann", "listening", "0"), ("spark", "sent", "<1m", "0")]
    assert sorted(tuple(row.split()) for row in rows) == seen and rows[2].startswith("spark ")
    assert [each["name"] for each in json.loads(agent("who", "--json", "--channel", "ops")[1])] == ["ann"]
    assert "2 of 2" in agent("who", "--online")[1]
    urllib.request.urlopen(f"{agent.url}/claim", b'{"to": "bob", "worker": "w"}').close()
    assert re.search("^bob +listening +2 +<1m +1 +0$", agent("who")[1], re.MULTILINE)


def agents(*rows, **more):
    plain = {"channel": "default", "online": False, "last_seen": NOON - 7200, "unread": 0}
    return answer({"agents": [{**plain, **row} for row in rows], "bus": "b1", **more}, f"Date: {DATE}")


def who(*answers, arguments=()):
    with Scripted(*answers) as server:
        code, out, err = run(SCRIPT, "who", *arguments, env={"AGENT_BUS_URL": server.url})
        assert (code, err) == (0, ""), err
        return out, server.asked


def test_who_shows_what_waits_how_long_and_the_state_of_a_queue():
    rows = (
        {"name": "dell", "online": True, "unread": 3, "oldest": NOON - 600},
        {"name": "builds", "work": {"in_hand": 2, "dead": 4, "workers": 1}, "unread": 9, "oldest": NOON - 30},
        {"name": "ci", "last_seen": None, "unread": None},
        {"name": "sensor", "last_seen": None, "sent": NOON - 300},
        {"name": "rare", "last_seen": NOON - 86400, "sent": NOON - 10800},
        {"name": "reader", "last_seen": NOON - 3600, "sent": NOON - 7200},
    )
    out, _ = who(agents(*rows))
    assert [re.split("  +", row.strip()) for row in out.splitlines()[:-1]] == [
        ["NAME", "SEEN", "UNREAD", "OLDEST", "IN HAND", "DEAD"],
        ["dell", "listening", "3", "10m"],
        ["sensor", "sent 5m", "0"],
        ["reader", "1h", "0"],
        ["builds", "2h", "9", "<1m", "2", "4"],
        ["rare", "sent 3h", "0"],
        ["ci", "never", "-"],
    ]


def test_who_shows_what_an_agent_says_of_itself_in_a_column_of_its_own():
    rows = (
        {"name": "dell", "status": {"text": "tests", "state": "busy", "cwd": "/w", "at": NOON - 180}},
        {"name": "nano", "status": {"cwd": "/work", "branch": "main", "at": NOON}},
        {"name": "eve", "status": {"text": HOSTILE * 9, "at": "soon"}},
        {"name": "ci", "status": "busy"},
        {"name": "gb10"},
    )
    out, _ = who(agents(*rows))
    lines = out.splitlines()
    doing = [re.split("  +", row.strip())[3:] for row in lines[:3]]
    assert doing == [["DOING"], ["busy 3m: tests"], ["<1m: /work main"]]
    assert not RAW.search(out) and len(lines) == 7 and max(map(len, lines)) <= 80 and lines[3].endswith("…")
    assert lines[4].endswith(" 0") and lines[5].endswith(" 0")


def test_who_asks_for_every_page_and_shows_no_control_character():
    out, asked = who(agents({"name": "a"}, more=True, next="default/a"), agents({"name": HOSTILE, "channel": HOSTILE}))
    assert asked[1].query == {"after": "default/a"} and len(out.splitlines()) == 4 and not RAW.search(out)


def test_who_of_300_agents_takes_a_fifth_of_a_second_and_fits_a_terminal(bus):
    for n in range(299):
        poll(bus.url, f"agent-{n}")
    poll(bus.url, "x" * 64, "long-channel")
    env = {"AGENT_BUS_URL": bus.url}
    took = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = on_terminal("who", **env)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    lines = shown.splitlines()
    assert len(lines) == 302 and lines[-1].startswith("300 of 300 listen, or") and max(map(len, lines)) <= 80
    assert f"long-channel/{'x' * 64} " in run(SCRIPT, "who", env=env)[1]  # in a pipe it is whole
    assert min(took) < in_time(0.2)


def test_who_watches_and_endures_an_outage(monkeypatch, capfd):
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(bus_who.time, "sleep", sleep)
    with Scripted(agents({"name": "a"}), page(502, "a proxy"), agents({"name": "b"})) as server:
        monkeypatch.setenv("AGENT_BUS_URL", server.url)
        assert bus_who.main(["--watch"]) == 130
    out, err = capfd.readouterr()
    assert re.findall("^[ab] ", out, re.MULTILINE) == ["a ", "b "] and err.count("trying again") == 1
    assert slept == [bus_who.EVERY_SECONDS] * 3


def test_on_a_narrow_terminal_the_names_stay_whole_and_the_last_columns_go():
    name, long = "fix-the-parser", "x" * 64
    rows = [{"name": name, "unread": 3, "oldest": NOON - 600, "status": {"text": "tests of the parser", "at": NOON}}]
    wide = [(60, [{"name": long}], "OLDEST"), (80, [{"name": long}], "DOING")]
    for columns, more, last in ((30, [], "UNREAD"), (40, [], "OLDEST"), *wide):
        with Scripted(agents(*rows, *more)) as server:
            head, first, *_ = on_terminal("who", columns=columns, AGENT_BUS_URL=server.url).splitlines()
            assert first.startswith(f"{name} ") and head.endswith(last) and len(first) <= columns
            assert first.endswith("…") == (columns == 80)


def test_of_a_channel_with_nobody_it_says_which_channels_there_are(agent):
    assert agent("who")[1].endswith("\nnobody has listened or sent on this bus yet\n")
    poll(agent.url, "bob")
    poll(agent.url, "ann", "ops")
    none = "\nnobody has listened or sent on the channel nope yet; there is default, ops\n"
    assert agent("who", "--channel", "nope")[1].endswith(none)
    assert agent("who", "--channel", "nope", "--json")[1] == "[]\n"
    mails(agent.url, "1", channel="still")
    assert agent("who", "--channel", "still", "--online")[1].endswith("\nnobody listens now on the channel still\n")


def test_a_mistyped_name_without_mail_gets_the_one_that_may_be_meant(agent):
    """`inbox bobb` said that nothing is unread for bobb, while the mail of bob waited."""
    poll(agent.url, "bob")
    poll(agent.url, "bobbi", "ops")
    for typo in ("bobb", "BOB"):
        code, _, err = agent("inbox", typo)
        assert (code, err) == (3, f"agent_bus.py inbox: nothing is unread for {typo}; did you mean bob?\n")
    assert agent("inbox", "carol")[2].endswith("nothing is unread for carol\n")
    for wrong in (["--to", "bbob"], ["--from", "bbob"], ["--to", "all,bbob"]):
        shown = on_a_terminal("tools/agent_bus.py", "log", "--no-follow", *wrong, AGENT_BUS_URL=agent.url)
        assert shown == "agent_bus.py log: there are no such messages; did you mean bob or bobbi?\n"
    shown = on_a_terminal("tools/agent_bus.py", "log", "--no-follow", "--to", "bob", AGENT_BUS_URL=agent.url)
    assert shown == "agent_bus.py log: there are no such messages\n"


def test_the_inbox_of_a_channel_with_nobody_says_which_channels_there_are(agent):
    poll(agent.url, "bob")
    poll(agent.url, "ann", "ops")
    code, out, err = agent("inbox", "bob", "--channel", "typo")
    assert (code, out) == (3, "") and "nothing is unread for bob on the channel typo, where nobody is: " in err
    assert err.endswith("there is default, ops\n")
    assert agent("inbox", "ann", "--channel", "ops")[2].endswith("nothing is unread for ann on the channel ops\n")
    assert agent("inbox", "bob")[2].endswith("nothing is unread for bob\n")
