"""A Sheet, a plain array column by column, is what its messages are one by one: on disk, on the wire, for readers."""
import json
import types

import pytest

import bus_server
from bus_server import (
    EVERYONE,
    NAMES_PER_SEND,
    Batch,
    Bus,
    Log,
    Refused,
    Send,
    acknowledged,
    draft,
    parse_json,
    sheet,
)

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

START = 1_764_338_191_999_950  # us; soon the second changes, and so do all digits of a tick but the first
ROWS = "SELECT * FROM messages ORDER BY tick"
TEXTS = st.text(max_size=20) | st.text('"\\\'\x7f:,{}[]u0 \n\té', max_size=8) | st.sampled_from(["", '"', "\\", "'"])
NAMES = st.sampled_from(["dell", "agent-1", "a" * 64, EVERYONE])
ONE = st.fixed_dictionaries({"from": st.sampled_from(["spark", "Eve"]), "to": NAMES, "msg": TEXTS})


def plain(**members):
    return {"from": "spark", "to": "dell", "msg": "x", **members}


def committed(sends):
    """What is on disk after one batch of these, what is visible, and what each sender is told."""
    log = Log(":memory:", lambda: START)
    mailboxes = bus_server.Mailboxes(lambda: 0.0, (), log.clock)
    bus = types.SimpleNamespace(store=log, mailboxes=mailboxes, last=START)
    for name in ("dell", "agent-1"):
        mailboxes.box("default", name).pending = 0, 0
    batch = Batch()
    batch.sends = sends
    log.stamp(batch)
    log.commit(batch)
    mailboxes.add(batch.visible)
    for each in batch.sheets:
        mailboxes.add_sheet(each)
    visible = sorted([*batch.visible, *(message for each in batch.sheets for message in each.messages())])
    boxes = {place: (box.newest, box.n, box.pending) for place, box in mailboxes.boxes.items()}
    log.bus = "the same"
    answers = [acknowledged(bus, send, {}) for send in sends]
    rows, counts = log.reading.execute(ROWS).fetchall(), log.counts
    assert [log.checked(row) for row in log.reading.execute(f"{bus_server.SELECT} ORDER BY tick").fetchall()] == visible
    log.close()
    return rows, visible, answers, counts, boxes, mailboxes.highest


@given(st.lists(ONE, min_size=1, max_size=150), st.booleans(), st.booleans(), st.sampled_from(["x", None]))
@settings(deadline=None, max_examples=300)
def test_a_sheet_is_its_messages_one_by_one(messages, ascii_only, one_sender, channel):
    if one_sender:
        messages = [{**each, "from": "spark"} for each in messages]
    if channel:
        messages = [{**each, "channel": channel} for each in messages]
    body = json.dumps(messages, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    found = sheet(body)
    try:
        drafts = [draft(each, None) for each in parse_json(body)]
    except Refused:
        assert found is None
        return
    if found is None:
        assert len({each["from"] for each in messages}) > 1
        return
    alone = draft(plain(to=["dell", "new"], msg="before and after"), "k")
    other = draft(plain(), None)
    around = [Send(None, [alone], False), Send(None, [other], False)]
    by_columns = committed([around[0], Send(None, [], True, sheet=found), around[1]])
    around = [Send(None, [alone], False), Send(None, [other], False)]
    assert by_columns == committed([around[0], Send(None, drafts, True), around[1]])


def raw(*texts):
    return f"[{', '.join(texts)}]".encode()


A = json.dumps(plain())


@pytest.mark.parametrize("body", [
    raw(A), raw(A, A), raw(A, json.dumps(plain(msg="é"))), raw(A) + b"\r\n", raw(json.dumps(plain(channel="c"))),
    raw('{"msg":"a","to" :\n"dell", "from":"spark"}', A), raw(json.dumps(plain(msg=r'\" \\" : {"to": [')), A),
    json.dumps([plain(to=f"n{number}") for number in range(NAMES_PER_SEND + 1)]).encode(),
])  # fmt: skip
def test_a_plain_array_is_a_sheet(body):
    assert sheet(body).texts == [draft(each, None).text for each in parse_json(body)]


NO_NAME = None, 1, True, [], ["dell"], {}, {"a": "b"}, {"a": 1}
NOT_PLAIN = [{member: value} for member in ("from", "to", "msg", "channel") for value in NO_NAME] + [
    {"key": "k"}, {"key": None}, {"ttl": 5}, {"reply_to": "5"}, {"type": "t"}, {"ts": 1}, {"from": "Eve"},
    {"from": "root"}, {"to": "no name"}, {"channel": ""}, {"to": ""},
]  # fmt: skip
TWICE = [  # what a message says beside from and to
    '"msg": "x", "msg": "x"', '"msg": 1, "msg": "x"', '"msg": "x", "msg": 1', '"msg": 1, "msg": 1',
    '"msg": [], "msg": "x"', r'"msg": "\"", "msg": "x"', r'"msg": "\\", "msg": "x"',
    r'"msg": "\\\"", "msg": "x"', r'"\u006dsg": "x", "msg": "x"',
    '"msg": "x", "msg": {"msg": 1, "msg": 2}', '"from": 1, "msg": "x"', '"to": "dell", "msg": "x"',
]  # fmt: skip


@pytest.mark.parametrize("body", [
    b"", b"[]", b"[[]]", b"[1]", b'["from"]', b'[["from", "to", "msg"]]', b"[{}]", b"[null]", b"[" * 2000, b'"from"',
    A.encode(), raw(A) + b"x", raw(A)[:-1], raw(A, "{}"), raw(A, "3"), raw(A, '"abc"'), b"[" + b"1" * 5000 + b"]",
    *(raw(A).replace(b"x", wrong) for wrong in (b"\0", b"\xff", b"\n", rb"\u0000", rb"\ud800")),
    *(raw(A, json.dumps(plain(**members))) for members in NOT_PLAIN),
    *(raw('{"from": "spark", "to": "dell", ' + members + "}", A) for members in TWICE),
])  # fmt: skip
def test_what_is_not_plain_and_valid_is_no_sheet(body):
    assert sheet(body) is None


def test_more_messages_than_one_request_may_store_are_no_sheet():
    assert sheet(json.dumps([plain()] * bus_server.COPIES_PER_SEND).encode())
    assert sheet(json.dumps([plain()] * (bus_server.COPIES_PER_SEND + 1)).encode()) is None


@pytest.mark.parametrize("grant, schemas, query, fields", [
    ("Eve", None, "", {}), ("", {"t": 1}, "", {}), ("", None, "to=dell", {}), ("", None, "", {"idempotency-key": "k"}),
])  # fmt: skip
def test_what_is_said_of_all_messages_makes_an_array_no_sheet(grant, schemas, query, fields):
    bus = types.SimpleNamespace(draining=False, schemas=schemas)
    request = types.SimpleNamespace(
        body=raw(A), parsed=types.SimpleNamespace(query=query), fields=fields, grant=types.SimpleNamespace(name=grant)
    )
    assert Bus.sheet(bus, request) is None
    bus.schemas, request.parsed.query, request.fields, request.grant.name = None, "", {}, "spark"
    assert Bus.sheet(bus, request)


def test_a_full_disk_refuses_a_sheet_and_stores_nothing():
    log = Log(":memory:", lambda: START)
    log.has_room = lambda: False
    batch = Batch()
    batch.sends = [Send(None, [], True, sheet=sheet(raw(A, A)))]
    log.stamp(batch)
    log.commit(batch)
    assert batch.sends[0].refused.status == 507 and not batch.sheets
    assert log.reading.execute(ROWS).fetchall() == []
    log.close()
