"""tools/bus_later.py, `agent-bus later`: a message is sent later; such messages are listed and taken back."""

import json
import re
import time
from email.utils import formatdate

import pytest

from tests.clients.test_agent_bus import HOSTILE, RAW, on_terminal
from tests.clients.test_clients import program, refusing
from tests.kit.bad_servers import Scripted, answer
from tests.kit.processes import PATIENCE, ROOT, wait_until

pytestmark = pytest.mark.usefixtures("home")


def texts(bus, to):
    return [each["msg"] for each in json.loads(bus.get(f"/recv?to={to}&since=0"))["messages"]]


def listed(agent, *arguments):
    code, out, err = agent("later", "--list", *arguments)
    assert (code, err) == (0, "")
    return out.splitlines()


def test_a_message_is_sent_after_a_time_with_all_that_a_send_has(agent):
    every = ("later", "ann", "Is", "T1", "done?", "--subject", "T1", "--ttl", "1h", "--after")
    code, out, err = agent(*every, "2h")
    given = json.loads(out)
    assert (code, err) == (0, "") and given["ok"] and re.fullmatch("[0-9a-f]{16}", given["id"])
    assert listed(agent) == [
        f"waiting {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(given['at']))} id={given['id']} from=bob to=ann "
        'msg="Is T1 done?"'
    ]
    [shown] = [json.loads(line) for line in listed(agent, "--json")]
    assert (shown["message"]["subject"], shown["message"]["ttl"]) == ("T1", 3600)
    assert agent(*every, "1s")[0] == 0
    wait_until(lambda: texts(agent.bus, "ann") == ["Is T1 done?"])
    wait_until(lambda: [json.loads(line)["id"] for line in listed(agent, "--json")] == [given["id"]])


def test_a_schedule_is_taken_back(agent):
    id = json.loads(agent("later", "ann", "--cron", "0 9 * * 1-5", stdin=b"on stdin")[1])["id"]
    assert listed(agent)[0].endswith(' from=bob to=ann cron="0 9 * * 1-5" msg="on stdin"')
    assert agent("later", "--cancel", id) == (0, "", f"agent_bus.py later: {id} is taken back\n")
    code, out, err = agent("later", "--cancel", id)
    assert (code, out) == (1, "") and "no schedule of yours has this id" in err and listed(agent) == []


@pytest.mark.parametrize(
    "at, zone, utc",
    [
        ("2050-12-01T09:00Z", "Asia/Tokyo", "2050-12-01T09:00:00Z"),
        ("2050-12-01T09:00", "Asia/Tokyo", "2050-12-01T00:00:00Z"),
        ("2050-12-01 09:00+02:00", "UTC", "2050-12-01T07:00:00Z"),
        ("2553498000", "UTC", "2050-12-01T09:00:00Z"),
    ],
)
def test_a_time_without_an_offset_is_the_local_one(agent, at, zone, utc):
    shown = on_terminal("later", "ann", "x", "--at", at, AGENT_BUS_URL=agent.url, AGENT_NAME="bob", TZ=zone)
    assert re.fullmatch(f"it will be sent at {utc}; its id for --cancel is [0-9a-f]{{16}}\n", shown)
    assert len(shown.rstrip()) <= 80


def test_a_time_that_is_over_is_said_to_be(agent):
    shown = on_terminal("later", "ann", "x", "--at", "2020-01-01T00:00Z", AGENT_BUS_URL=agent.url, AGENT_NAME="bob")
    assert shown == "it is sent at once, because 2020-01-01T00:00:00Z is over\n"


@pytest.mark.parametrize("ahead", [600, -600], ids=["ahead", "behind"])  # s, our clock
@pytest.mark.parametrize("left", [60, -60], ids=["it waits", "it is over"])  # s, by the clock of the bus
def test_whether_a_time_is_over_is_judged_by_the_clock_of_the_bus(ahead, left):
    now = int(time.time()) - ahead
    scheduled = {"ok": True, "id": "5970df518cebaf17", "at": now + left}
    with Scripted(answer(scheduled, f"Date: {formatdate(now, usegmt=True)}")) as server:
        shown = on_terminal("later", "ann", "x", "--after", "1m", AGENT_BUS_URL=server.url, AGENT_NAME="bob")
    assert shown.startswith("it will be sent at " if left > 0 else "it is sent at once, because ")
    assert ("its id for --cancel is 5970df518cebaf17" in shown) == (left > 0)


def test_without_a_bus_it_says_so_before_it_tries_again():
    env = {"AGENT_BUS_URL": refusing(), "AGENT_NAME": "bob"}
    process = program(ROOT / "tools" / "bus_later.py", "ann", "x", "--after", "1h", env=env)
    try:
        assert b"(Connection refused); still trying, up to 30 s. Is bus_server running" in process.stderr.readline()
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE)


def test_one_sees_its_own_and_may_ask_for_those_of_another(agent):
    for sender in ("bob", "ann"):
        agent("later", "carl", sender, "--after", "1h", "--from", sender)
    assert [line.rpartition("msg=")[2] for line in listed(agent)] == ["bob"]
    assert [line.rpartition("msg=")[2] for line in listed(agent, "--from", "ann")] == ["ann"]


def test_a_list_of_many_is_whole_and_shows_no_control_character(agent):
    for number in range(3):
        agent("later", "carl", HOSTILE, "--after", f"{900 - number}s")
    shown = agent("later", "--list")[1]
    assert shown.count("\n") == 3 and not RAW.search(shown)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "give TO and one of --after, --at and --cron"),
        (["ann", "x"], "give TO and one of --after, --at and --cron"),
        (["--after", "1h"], "give TO and one of --after, --at and --cron"),
        (["ann", "x", "--after", "1h", "--list"], "not allowed with"),
        (["ann", "x", "--after", "soon"], "is not a time like 90s, 5m, 1h or 3d"),
        (["ann", "x", "--at", "tomorrow"], "'tomorrow' is not a time like 2026-12-01T09:00"),
        (["ann", "", "--after", "1h"], "the message is empty"),
    ],
)
def test_a_wrong_call_is_one_sentence(agent, arguments, words):
    code, out, err = agent("later", *arguments)
    assert (code, out) == (2, "") and words in err and "Traceback" not in err


def test_what_the_bus_refuses_is_its_sentence(agent):
    code, _, err = agent("later", "ann", "x", "--cron", "daily")
    assert code == 1 and "cron must be five fields" in err and err.count("\n") == 1
