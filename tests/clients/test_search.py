"""tools/bus_search.py and tools/bus_redact.py: what an agent finds, and what an operator takes away."""
import json
import os
import subprocess
import sys

import pytest

import bus_send
from tests.clients.test_clients import run
from tests.kit.bad_servers import NOON, Scripted, answer, message
from tests.kit.processes import PATIENCE, ROOT

pytestmark = pytest.mark.usefixtures("home")


def search(url, *arguments):
    return run("tools/bus_search.py", *arguments, env={"AGENT_BUS_URL": url})


def redact(url, *arguments):
    return run("tools/bus_redact.py", *arguments, env={"AGENT_BUS_URL": url})


def texts(url, *arguments):
    code, out, err = search(url, "--json", *arguments)
    assert code == 0, err
    return [json.loads(line)["msg"] for line in out.splitlines()]


@pytest.mark.parametrize("wrong", ["text", 1.5, ["text", 1.5], {"a": 1}])
def test_an_answer_of_another_shape_is_shown_as_far_as_it_goes(wrong):
    with Scripted(answer({"ok": True, "redacted": wrong, "fetched_by": wrong, "warning": wrong})) as server:
        code, out, err = redact(server.url, "660ba678a1b40")
    assert code == 0 and "660ba678a1b40 is redacted; fetched by: " in out and "Traceback" not in err


def test_messages_are_found_by_words_and_filters(bus):
    for sender, to, text in [("a", "dell", "the disk is full"), ("b", "nano", "is the disk full?"), ("a", "x", "T1")]:
        bus_send.send(to, text, url=bus.url, sender=sender)
    assert texts(bus.url, "full", "disk") == ["is the disk full?", "the disk is full"]
    assert texts(bus.url, '"disk is"') == ["the disk is full"] and texts(bus.url, "disk", "--to", "nano,x") == [
        "is the disk full?"
    ]
    assert texts(bus.url, "disk", "--from", "a", "--since", "1h") == ["the disk is full"]
    assert texts(bus.url, "disk", "--channel", "default", "--max", "1") == ["is the disk full?"]
    code, out, err = search(bus.url, "disk", "--max", "1", "--short")
    assert code == 0 and out.count("\n") == 1 and "b > nano: is the disk full?" in out
    assert err == "bus_search: 1 found, the newest first; there may be more: --all shows all of them\n"
    assert texts(bus.url, "disk", "--max", "1", "--all") == ["is the disk full?", "the disk is full"]
    assert search(bus.url, "zeppelin") == (3, "", "bus_search: no message that you may read has these words\n")


def test_an_operator_has_the_index_made_anew(bus):
    code, out, err = search(bus.url, "--rebuild")
    assert (code, out) == (0, "") and "anew" in err


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "give the WORDS to look for"),
        (["x", "--rebuild"], "omit them"),
        (["x", "--max", "0"], "1 or more"),
        (["x", "--from", "two words"], "is not a name"),
        (["x", "--since", "soon"], "since is 'soon'"),
    ],
)
def test_a_wrong_search_is_one_sentence(bus, arguments, words):
    code, out, err = search(bus.url, *arguments)
    assert (code, out) == (2, "") and words in err


def test_what_the_bus_refuses_is_told(bus):
    code, out, err = search(bus.url, "***")
    assert (code, out) == (1, "") and "q has no word to look for" in err
    code, out, err = redact(bus.url, "660ba678a1b40")
    assert (code, out) == (1, "") and "there is no message '660ba678a1b40'" in err


def test_a_bus_that_names_the_same_page_again_is_not_asked_for_ever():
    same = answer({"messages": [message(1)], "next": NOON, "now": NOON, "bus": "b1"})
    with Scripted(same, same, same) as server:
        code, out, _ = search(server.url, "hi", "--all", "--json")
        assert code == 0 and len(out.splitlines()) == 2 and len(server.asked) == 2


def test_a_message_is_redacted_and_who_has_fetched_it_is_told(bus):
    sent = bus_send.send(["dell", "nano"], "the password is swordfish", url=bus.url, sender="spark")
    bus.get("/recv?to=dell&since=0")
    code, out, err = redact(bus.url, sent["id"])
    assert code == 0 and out.splitlines() == [
        f"{sent['ids']['dell']} to dell: fetched",
        f"{sent['ids']['nano']} to nano: queued",
        f"{sent['id']} is redacted; fetched by: dell",
    ]
    assert err.startswith("bus_redact: revoke the secret: backups, outboxes")
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(ROOT / "tools" / "bus_redact.py"), sent["id"]]
        env = {**os.environ, "AGENT_BUS_URL": bus.url}
        again = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=env, text=True, timeout=PATIENCE)
    assert (again.returncode, again.stderr) == (0, err), "it is redacted, whoever can read that"
    assert b"swordfish" not in bus.get("/log")
    answer = json.loads(redact(bus.url, sent["id"], "--json")[1])
    assert answer["overwritten"] is True and answer["fetched_by"] == ["dell"]
