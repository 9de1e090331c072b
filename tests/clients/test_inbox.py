"""`agent-bus inbox` and `ack`: unread mail is shown and not taken, and marked as read up to an id."""
import json
import re

import pytest

import bus_recv
import bus_send
from tests.clients.test_agent_bus import HOSTILE, RAW, mails
from tests.kit.processes import ROOT

pytestmark = pytest.mark.usefixtures("home")


def test_the_inbox_shows_unread_mail_and_takes_none(agent):
    one, two = mails(agent.url, "one", "two")
    for _ in range(2):
        code, out, err = agent("inbox")
        assert code == 0 and re.findall(r"^\| (.*)", out, re.MULTILINE) == ["one", "two"]
        assert "2 unread for bob" in err and err.endswith(f" ack {two} bob\n")
    assert [json.loads(agent.bus.get(f"/message/{id}"))["state"] for id in (one, two)] == ["queued"] * 2
    assert not [each for each in json.loads(agent.bus.get("/agents"))["agents"] if each["online"]]
    assert [json.loads(line)["id"] for line in agent("inbox", "--json")[1].splitlines()] == [one, two]
    assert re.findall(r"^\| (.*)", agent("recv", "bob", "--once")[1], re.MULTILINE) == ["one", "two"]
    code, out, err = agent("inbox")
    assert (code, out) == (3, "") and "nothing is unread for bob" in err


def test_of_a_dead_letter_the_inbox_and_the_log_say_why_it_is_one(agent):
    why = {"dead_of": "12ab", "attempts": 5, "reason": "it\nfailed"}
    bus_send.send("jobs.dead", "one", url=agent.url, sender="spark", fields=why)
    bus_send.send("jobs", "two", url=agent.url, sender="spark", fields=why)
    line = '| one\n-- the job 12ab was given up after attempt 5: "it\\nfailed"\n---\n'
    assert agent("inbox", "jobs.dead")[1].endswith(line) and line in agent("log", "--last", "2", "--no-follow")[1]
    assert "given up" not in agent("inbox", "jobs")[1]


def test_the_inbox_of_a_queue_says_that_it_is_one_and_what_is_left_to_do(agent):
    """Its messages stay there when they are done, and no `ack` of ours moves it."""
    mails(agent.url, "one", "two", "three", to="builds")
    for _ in range(2):
        job = bus_recv.ask(agent.url, "/claim", 5, {"to": "builds", "worker": "w"})[0]["messages"][0]
    bus_recv.ask(agent.url, "/ack", 5, {"id": job["id"], "lease": job["lease"]})
    code, out, err = agent("inbox", "builds")
    assert code == 0 and out.count("---\n") == 3
    told = "Of all, 1 wait for a worker, 1 are in hand, 0 were given up; the others are done\n"
    assert err.endswith(f"builds is a queue, and these are its messages. {told}")
    mails(agent.url, *map(str, range(100)), to="builds")
    assert "these are the oldest of its messages. Of all, 101 wait for" in agent("inbox", "builds")[2]


def given_back(bus, name, number):
    for _ in range(number):
        job = bus_recv.ask(bus.url, "/claim", 5, {"to": name, "worker": "w"})[0]["messages"][0]
        bus_recv.ask(bus.url, "/nack", 5, {"id": job["id"], "lease": job["lease"], "delay": 60})


@pytest.mark.parametrize("number, jobs", [(2, "2 jobs wait"), (1, "1 job waits")])
def test_the_inbox_and_an_ack_say_that_jobs_wait_which_others_are_told_are_unread(agent, number, jobs):
    ids = mails(agent.url, "one", "two", "three")
    agent("recv", "bob", "--once")
    given_back(agent.bus, "bob", number)
    assert json.loads(agent.bus.get("/agents?name=bob"))["agents"][0]["unread"] == number
    says = f"{jobs} for a worker (python3 {ROOT}/tools/agent_bus.py work bob)\n"
    assert agent("inbox") == (3, "", f"agent_bus.py inbox: nothing is unread for bob; {says}")
    assert agent("ack", ids[-1])[2].endswith(f"; 0 unread; {says}")
    assert agent("ack", mails(agent.url, "one", to="ann")[0], "ann")[2].endswith("; 0 unread\n")


def test_ack_marks_as_read_up_to_an_id_and_the_bus_knows(agent):
    one, two, three = mails(agent.url, "one", "two", "three")
    code, out, err = agent("ack", two)
    assert (code, out) == (0, "") and "1 unread" in err
    states = [json.loads(agent.bus.get(f"/message/{id}"))["state"] for id in (one, two)]
    assert states == ["acknowledged"] * 2
    assert re.findall(r"^\| (.*)", agent("inbox", "bob")[1], re.MULTILINE) == ["three"]
    assert agent("ack", one)[0] == 0
    code, _, err = agent("ack", f"{int(one, 16) - 1:x}")
    assert code == 2 and err == (f"agent_bus.py ack: there is no message {int(one, 16) - 1:x} on this bus: "
                                 "take the id from the inbox\n")  # fmt: skip
    assert agent("ack", "fffffffffffff")[0] == 2 and agent("ack", "fffffffffffff")[2].count("\n") == 1


@pytest.mark.parametrize("channel", ["default", "lab"])
def test_an_ack_says_which_older_mail_it_has_marked_as_read_too(agent, channel):
    """A Monitor shows urgent mail before the rest of a backlog, so nobody may have seen the older messages."""
    older = mails(agent.url, "one", "two", channel=channel) + mails(agent.url, "three", to="all", channel=channel)
    mails(agent.url, "of another channel", channel="else")
    urgent, newer = mails(agent.url, "four", "five", channel=channel)
    where = [] if channel == "default" else ["--channel", channel]
    code, out, err = agent("ack", urgent, "bob", *where)
    look = " ".join(["log --to bob,all", *where, f"--since {older[0]} --no-follow"])
    told = f"3 older unread messages with it (to look: python3 {ROOT}/tools/agent_bus.py {look}); 1 unread"
    assert (code, out, err) == (0, "", f"agent_bus.py ack: {urgent} is read, and {told}\n")
    shown = re.findall(r"^\| (.*)", agent(*look.split())[1], re.MULTILINE)
    assert [text for text in shown if text != "of another channel"] == ["one", "two", "three", "four", "five"]
    assert channel == "default" or len(shown) == 5
    assert "is read, and all earlier messages; 0 unread" in agent("ack", newer, "bob", *where)[2]
    assert "is read, and all earlier messages; 0 unread" in agent("ack", urgent, "bob", *where)[2]
    mails(agent.url, "six", channel=channel)
    (last,) = mails(agent.url, "seven", channel=channel)
    assert "and 1 older unread message with it" in agent("ack", last, "bob", *where)[2]


def test_an_acknowledgement_is_nobodys_listening(agent):
    """Refused or not: a send to the name still says that nobody ever listened as it."""
    (one,) = mails(agent.url, "one", to="zed")
    assert agent("ack", "123", "zed")[0] == 2 and agent("ack", one, "zed")[0] == 0
    told = bus_send.send("zed", "two", url=agent.url, sender="spark")["receiver"]
    assert not told["online"] and not told["known"] and told["last_seen"] is None and told["unread"] == 1
    assert "listening" not in agent("who")[1]


def test_the_mail_of_another_name_or_channel_cannot_be_acknowledged(agent):
    (one,), (two,) = mails(agent.url, "one", to="zed"), mails(agent.url, "two", channel="lab")
    code, _, err = agent("ack", one, "nobody9")
    assert code == 2 and f"{one} is mail for zed, not for nobody9: take the id from the inbox" in err
    agent("ack", "1", "bob")  # bob's cursor is at the end now
    assert f"{two} is mail for bob on the channel lab, not for bob" in agent("ack", two)[2]
    everybody = bus_send.send("all", "hear", url=agent.url, sender="spark")["id"]
    assert agent("ack", everybody, "nobody9")[0] == 0


def test_the_line_that_the_inbox_prints_marks_its_mail_as_read(agent):
    mails(agent.url, "one", to="zed")
    mails(agent.url, "two", to="zed", channel="lab")
    for more in ([], ["--channel", "lab"]):
        line = agent("inbox", "zed", *more)[2].strip().split(f"python3 {ROOT}/tools/agent_bus.py ")[1]
        assert agent(*line.split())[0] == 0 and agent("inbox", "zed", *more)[0] == 3


def test_a_home_that_cannot_be_written_is_said_in_the_sentence_of_all_programs(agent, tmp_path):
    (tmp_path / "file").touch()
    (one,) = mails(agent.url, "one")
    env = {"HOME": str(tmp_path / "file"), "XDG_STATE_HOME": "", "AGENT_BUS_STATE_DIR": ""}
    code, _, err = agent("ack", one, **env)
    assert code == 2 and "cannot write " in err and "set AGENT_BUS_STATE_DIR to another place" in err
    for place in (env, {"AGENT_BUS_STATE_DIR": str(tmp_path / "file")}):
        assert f": {tmp_path}/file is a file, not a folder; set AGENT_BUS_STATE_DIR to" in agent("ack", one, **place)[2]


def test_ack_takes_an_id_that_is_not_among_the_oldest_hundred(agent):
    ids = mails(agent.url, *(str(number) for number in range(115)))
    (other,) = mails(agent.url, "x", to="carl")
    assert agent("ack", other)[0] == 2
    code, _, err = agent("ack", ids[110])
    assert code == 0 and "100 or more older unread messages with it" in err and "4 unread" in err
    mails(agent.url, *map(str, range(115, 230)))
    for read in (ids[3], ids[110]):
        assert "is read, and all earlier messages; 100 or more unread" in agent("ack", read)[2], "it was read before"


def test_the_inbox_needs_a_name(agent):
    code, _, err = agent("inbox", AGENT_NAME="")
    assert code == 2 and "AGENT_NAME" in err and "{look" not in err and err.startswith("usage: agent_bus.py inbox [-h]")


def test_an_inbox_of_hostile_mail_shows_no_control_character(agent):
    mails(agent.url, HOSTILE, subject=HOSTILE)
    for arguments in (["inbox"], ["inbox", "--json"]):
        assert not RAW.search(agent(*arguments)[1])
