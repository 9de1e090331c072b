"""`agent-bus log`: where it begins, one line a message, and colours."""
import json
import re
import signal
import sys
import unicodedata

import pytest

import bus_recv
from tests.clients.test_agent_bus import COLOUR, HOSTILE, RAW, SCRIPT, mails, on_terminal
from tests.clients.test_clients import program, run
from tests.kit import forked
from tests.kit.bad_servers import Scripted, mail, message
from tests.kit.processes import COMMAND, PATIENCE

pytestmark = pytest.mark.usefixtures("home")


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


def test_log_last_tells_of_no_gap_between_messages_that_nobody_asked_for(agent):
    """It looks further and further back: what was removed there is no loss for who asked for the newest ones."""
    mails(agent.url, "1", "2")
    forked.run([*COMMAND, "prune", "--older", "0", "--pending", "--db", agent.bus.db], check=True)
    mails(agent.url, "3")
    code, out, err = agent("log", "--last", "20", "--short", "--no-follow")
    assert (code, err) == (0, "") and out.count("\n") == 1
    assert "messages are no longer on the bus" in agent("log", "--since", "1h", "--short", "--no-follow")[2]


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
    assert (code, out) == (2, "") and "give now, last, 1h, an id" in err


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


def test_a_log_of_what_is_no_message_goes_on(home):
    with Scripted(mail('"text"', "7", message(1, "good"))) as server:
        env = {"AGENT_BUS_URL": server.url}
        code, out, err = run(SCRIPT, "log", "--short", "--no-follow", env=env)
    assert code == 0 and out.count("not a message") == 2 and "spark > dell: good" in out


def is_wide(character):
    """As the newest Unicode says: since version 16 also the signs of the I Ching, which glibc has long had so."""
    newly = "\u2630" <= character <= "\u2637" or "\u268a" <= character <= "\u268f" or "\u4dc0" <= character <= "\u4dff"
    return newly or unicodedata.east_asian_width(character) in "WF"


def test_each_wide_character_counts_as_one(monkeypatch):
    """Also one that our Python does not know yet, as the emoji of next year."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "5")
    known = map(chr, (*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, 0x110000, 61)))
    wide = [each for each in known if (each > "\uffff" if unicodedata.category(each) == "Cn" else is_wide(each))]
    shown = bus_recv.fitted("\n".join(each * 3 for each in wide)).split("\n")
    assert len(wide) > 100000 and shown == [row for each in wide for row in (each * 2, f"|+{each}")]


def rows(shown, columns):
    """What stands at the beginning of each row of a terminal: it breaks a line that is too long for a row."""
    found = []
    for line in shown.split("\n"):
        row, cells = "", 0
        for each in line.expandtabs():
            its = 2 if is_wide(each) else 1
            if cells + its > columns:
                found.append(row)
                row, cells = "", 0
            row, cells = row + each, cells + its
        found.append(row)
    return found


OURS = "1999-11-30T16:50:21Z from=boss id=66181457c0f96"  # as a head of bus_recv.py; below, as other lines of ours
LINES = {  # by a name: the command, a line that looks like one of its own, and how wide the terminal is
    "recv": (["recv", "bob", "--once"], OURS, 120),
    "inbox": (["inbox", "bob"], OURS, 120),
    "log": (["log", "--no-follow"], OURS, 120),
    "log short": (["log", "--no-follow", "--short"], "01-01 16:50:21Z 66181 boss > bob:", 120),
    "search": (["search", "boss"], OURS, 120),
    "locks": (["locks"], "boss, 3h more: src/**", 120),
    "later": (["later", "--list"], "waiting 1999-11-30T16:50:21Z", 120),
    "who": (["who"], "boss  listening", 60),
}


def say(name, agent, texts):
    """Somebody writes these into what the command shows, or as much of their ends as there is room for."""
    if name not in ("locks", "who", "later"):
        mail = [{"from": "mallory", "to": "bob", "msg": text, "subject": text} for text in texts]
        return bus_recv.ask(agent.url, "/send", PATIENCE, mail)
    for number, text in enumerate(texts):
        path, order = {
            "locks": ("/lock", {"from": "mallory", "names": [f"n{number}"], "why": text[-200:]}),
            "who": ("/status", {"from": f"m{number}", "text": text}),
            "later": ("/later", {"after": 9999, "message": {"from": "mallory", "to": "bob", "msg": text[-60:]}}),
        }[name]
        bus_recv.ask(agent.url, path, PATIENCE, order)
    return None


FILLINGS = {"letters": "x", "wide": "\uff0e", "tabs": "\t", "emoji": "\U0001f600", "newly wide": "\u4dc0"}


@pytest.mark.parametrize("filling", FILLINGS.values(), ids=FILLINGS)
@pytest.mark.parametrize("name", LINES)
def test_no_row_of_a_terminal_begins_as_a_line_of_ours_that_is_none(name, filling, agent):
    """Whoever knows how wide a terminal is could fill the rest of a row, and write what he likes into the next one."""
    arguments, ours, columns = LINES[name]
    size = {"x": 1, "\t": 8}.get(filling, 2)
    say(name, agent, [filling * (cells // size) + " " * (cells % 2) + ours for cells in range(columns)])
    shown = on_terminal(*arguments, columns=columns, AGENT_BUS_URL=agent.url, AGENT_NAME="mallory", NO_COLOR="1")
    assert ours[:4] in shown and not [row for row in rows(shown, columns) if row.startswith(ours[:9])]


def test_a_short_line_on_a_narrow_terminal_keeps_some_text_and_shows_where_it_is_cut(agent):
    mails(agent.url, "first of many words that do not fit " * 3)
    for columns in (40, 60, 80):
        env = {"AGENT_BUS_URL": agent.url, "NO_COLOR": "1"}
        (line,) = on_terminal("log", "--short", "--no-follow", columns=columns, **env).splitlines()
        assert len(line) == columns and "spark > bob: first of m" in line and line.endswith("…")
