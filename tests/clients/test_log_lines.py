"""`agent-bus log`: where it begins, one line a message, and colours."""
import json
import re
import signal

import pytest

from tests.clients.test_agent_bus import COLOUR, HOSTILE, RAW, SCRIPT, mails, on_terminal
from tests.clients.test_clients import home, program, run  # noqa: F401
from tests.kit.bad_servers import Scripted, mail, message
from tests.kit.processes import PATIENCE


def test_log_short_is_one_line_a_message(agent):
    (one,) = mails(agent.url, "first line\nsecond\n", subject="T1")
    mails(agent.url, HOSTILE, to="ann")
    code, out, err = agent("log", "--short", "--no-follow")
    assert (code, err) == (0, "") and not RAW.search(out)
    first, second = out.splitlines()
    assert re.fullmatch(rf"\d\d-\d\d \d\d:\d\d:\d\dZ {one} spark > bob: \[T1\] first line second", first)
    assert " spark > ann: \\x1b[31mred" in second


def test_log_last_is_the_end_of_the_log(agent):
    ids = mails(agent.url, *map(str, range(150)))

    def shown(*arguments):
        out = agent("log", "--json", "--no-follow", *arguments)[1]
        return [json.loads(line)["id"] for line in out.splitlines()]

    assert shown("--last", "20") == ids[-20:] and shown("--last", "149") == ids[1:]
    assert shown("--last", "500") == ids and shown("--last", "0") == []
    (other,) = mails(agent.url, "x", to="ann")
    assert shown("--last", "1", "--to", "bob") == ids[-1:] and shown("--last", "1") == [other]
    assert agent("log", "--last", "2", "--since", "1h")[0] == 2


def test_log_last_then_follows(agent):
    mails(agent.url, "1", "2", "3")
    process = program(SCRIPT, "log", "--last", "2", "--short", env={"AGENT_BUS_URL": agent.url})
    assert [process.stdout.readline()[-2:] for _ in range(2)] == [b"2\n", b"3\n"]
    mails(agent.url, "4")
    assert process.stdout.readline()[-2:] == b"4\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=PATIENCE) == (b"", b"")


def test_log_since_an_id_begins_with_that_message(agent):
    one, two, three = mails(agent.url, "1", "2", "3")
    out = agent("log", "--json", "--no-follow", "--since", two)[1]
    assert [json.loads(line)["id"] for line in out.splitlines()] == [two, three]
    assert one in agent("log", "--no-follow", "--since", "1h")[1]


@pytest.mark.parametrize("since", ["1795203598000", "660ba678a1b4", "660ba678a1b40f", "yesterday"])
def test_log_since_what_is_no_id_is_refused(since):
    """The first are milliseconds: as an id they would be of 1983."""
    code, out, err = run(SCRIPT, "log", "--since", since)
    assert (code, out) == (2, "") and "the id of a message" in err


def test_log_has_colours_on_a_terminal_only_and_not_against_the_wish_of_its_user(agent):
    mails(agent.url, HOSTILE, HOSTILE * 20)
    for form in ([], ["--short"]):
        arguments = ["log", "--no-follow", *form]
        shown = on_terminal(*arguments, AGENT_BUS_URL=agent.url)
        assert len(COLOUR.findall(shown)) == 4 and not RAW.search(COLOUR.sub("", shown))
        for env in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
            assert not RAW.search(on_terminal(*arguments, AGENT_BUS_URL=agent.url, **env))
        assert not RAW.search(agent(*arguments)[1])
    lines = COLOUR.sub("", shown).splitlines()
    assert len(lines) == 2 and max(map(len, lines)) == 80


def test_a_log_of_what_is_no_message_goes_on(home):  # noqa: F811
    with Scripted(mail('"text"', "7", message(1, "good"))) as server:
        env = {"AGENT_BUS_URL": server.url}
        code, out, err = run(SCRIPT, "log", "--short", "--no-follow", env=env)
    assert code == 0 and out.count("not a message") == 2 and "spark > dell: good" in out


def test_a_short_line_on_a_narrow_terminal_keeps_some_text_and_shows_where_it_is_cut(agent):
    mails(agent.url, "first of many words that do not fit " * 3)
    for columns in (40, 60, 80):
        env = {"AGENT_BUS_URL": agent.url, "NO_COLOR": "1"}
        (line,) = on_terminal("log", "--short", "--no-follow", columns=columns, **env).splitlines()
        assert len(line) == columns and "spark > bob: first of m" in line and line.endswith("…")
