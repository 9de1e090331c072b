"""What one front knows of readers, of their marks and cursors, is known at the others."""
import bus_server
from bus_server import Mark, Marks, Raise, Receipt, Remove
from tests.kit.ledger import SECOND, ask, do, put, request, same, settle, turns


def test_marks_are_maxima(fronts):
    """Each front knows other marks of the same names; what comes later may be older."""
    a, b = fronts("a"), fronts("b")
    low, middle, high = (put(a, msg=str(number))[0] for number in range(3))
    settle(a, b)
    do(a, Marks([Mark("default", "bob", True, high, high, high)], [], {"aa": 7}))
    do(b, Marks([Mark("default", "bob", False, middle, middle, middle)], [], {"aa": 5}))
    do(b, Marks([Mark("default", "bob", False, None, low, low), Mark("default", "eve", False, None, 0, 5)], [], {}))
    same(a, b)
    for bus in (a, b):
        asked = "SELECT own, read, fetched, seen FROM mailboxes WHERE name = ?"
        assert bus.state.ask(asked, "bob") == (1, high, high, high)
        assert bus.state.ask(asked, "eve") == (0, None, 0, 5)
        assert bus.state.ask("SELECT used FROM uses") == (7,)
    box = b.mailboxes.boxes["default", "bob"]
    assert (box.own, box.read, box.fetched, box.seen) == (True, high, high, high), "what the other front noted"


def test_an_older_mark_of_another_front_sets_nothing_back_in_memory(fronts):
    a, b = fronts("a"), fronts("b")
    low, high = (put(a, msg=str(number))[0] for number in range(2))
    settle(b)
    for own, tick in ((True, high), (False, low), (False, None)):
        do(a, Marks([Mark("default", "bob", own, tick, tick or low, tick or low)], [], {}))
        settle(b)
    box = b.mailboxes.boxes["default", "bob"]
    assert (box.own, box.firm) == (True, True) and {box.read, box.fetched, box.seen, box.reached} == {high}
    assert ask(b, "GET", "/inbox?name=bob")[1]["recipients"]["default"]["bob"] == 0


def test_a_reader_of_another_front_listens_for_as_long_as_it_would_there(fronts, log):
    a, b = fronts("a"), fronts("b")
    now = log.wall.wall
    for name, ago in (("gone", 36), ("here", 5), ("here", 1)):
        do(a, Marks([Mark("default", name, True, 0, 0, now - ago * SECOND)], [], {}))
        settle(b)
        if ago == 5:
            assert b.mailboxes.boxes["default", "here"].until - b.mailboxes.clock() <= 30
    gone, here = (b.mailboxes.boxes["default", name] for name in ("gone", "here"))
    assert not b.mailboxes.online(gone) and b.mailboxes.online(here)
    assert here.listening == now - 5 * SECOND, "since its first poll"
    assert gone.firm and here.firm, "they have rows in the file"


def test_what_is_read_at_one_front_is_known_at_the_other(fronts):
    a, b = fronts("a"), fronts("b")
    [tick] = put(a)
    settle(b)
    watched = request(a, "GET", f"/message/{tick:x}?wait_fetched=25")
    settle(a)
    assert watched() is None and ask(b, "GET", "/inbox?name=bob")[1]["recipients"]["default"]["bob"] == 1
    assert len(ask(b, "GET", "/recv?to=bob&since=0")[1]["messages"]) == 1
    b.save_marks()
    settle(b, a)
    assert watched()[1]["state"] == "fetched"
    ask(b, "GET", f"/recv?to=bob&since={tick / SECOND:.6f}")
    b.save_marks()
    settle(b, a)
    assert ask(a, "GET", "/inbox?name=bob")[1]["recipients"]["default"]["bob"] == 0
    [agent] = ask(a, "GET", "/agents?name=bob")[1]["agents"]
    assert agent["online"] is True


def test_a_receipt_of_another_front_is_shown(fronts):
    a, b = fronts("a"), fronts("b")
    [tick] = put(a)
    settle(b)
    receipt = Receipt("default", "bob", bus_server.ACKNOWLEDGED, tick, "bob", tick)
    do(b, Marks([Mark("default", "bob", True, tick, tick, tick)], [receipt], {}))
    settle(a)
    assert ask(a, "GET", f"/message/{tick:x}")[1]["by"] == "bob"


def test_a_cursor_ahead_at_one_front_holds_at_the_other(fronts, log):
    """An old client whose clock is 100 s ahead polls at A; 10 ms later somebody sends at B."""
    a, b = fronts("a"), fronts("b")
    ahead = log.wall.wall + 100 * SECOND
    reader = request(a, "GET", f"/recv?to=bob&since={ahead / SECOND:.6f}&block=true")
    settle(a)
    log.wall.wall += SECOND // 100
    [tick] = put(b)
    assert tick > ahead
    settle(a)
    assert [each["id"] for each in reader()[1]["messages"]] == [f"{tick:x}"]


def test_a_cursor_that_another_front_gave_needs_no_entry(fronts, log):
    a, b = fronts("a"), fronts("b")
    a.state.ledger.hints = lambda position: []
    [tick] = put(a)
    before = log.written()
    assert b.last < tick
    answer = request(b, "GET", f"/recv?to=bob&since={tick / SECOND:.6f}")
    turns(b)
    assert answer()[1]["messages"] == []
    assert b.last == tick and log.written() == before


def test_a_cursor_ahead_is_an_entry_of_its_own(fronts, log):
    a = fronts()
    put(a)
    do(a, Raise(a.last + 5 * SECOND))
    put(a)
    assert a.last > log.wall.wall


def test_retention_and_forgotten_names_reach_the_other_front(fronts):
    a, b = fronts("a"), fronts("b")
    put(a)
    do(a, Marks([Mark("default", "idle", True, 1, 1, 1)], [], {}))
    settle(a, b)
    assert ("default", "idle") in b.mailboxes.boxes
    do(a, Remove(0, a.last + 1, False, [], 0))
    do(a, bus_server.Forget([["default", "idle"]]))
    settle(b)
    assert b.mailboxes.boxes["default", "bob"].removed == a.last and ("default", "idle") not in b.mailboxes.boxes
    assert ask(b, "GET", "/recv?to=bob&since=1")[1].get("gap"), "readers of the other front are told of the gap"
    same(a, b)


def test_readers_that_look_while_others_messages_are_removed_are_told_of_the_gap(fronts):
    a, b = fronts("a"), fronts("b")
    put(a)
    settle(b)
    take, seen = b.state.take, []
    b.state.take = lambda *what: (seen.append(b.ledger.removes()), take(*what))[1]
    do(a, Remove(0, a.last + 1, False, [], 0))
    settle(b)
    assert seen == [True] and not b.ledger.removes()
