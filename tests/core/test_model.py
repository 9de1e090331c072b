"""The bus against the model: random conversations, in which the clock steps and the server is stopped and killed.

In the suite the conversations are the same each time. As many new ones, of 50 steps each, are made by
RUNS=1000 python -m pytest -o faulthandler_timeout=0 tests/core/test_model.py
"""
import contextlib
import http.client
import json
import os
import re
import select
import socket
import time
from collections import defaultdict
from urllib.parse import urlencode

import pytest

from tests.faults import faulty
from tests.faults.clock import make_wrong
from tests.kit.hostile import REFUSED, REFUSED_QUERIES
from tests.kit.model import ALL, Draft, Model, tick
from tests.kit.processes import PATIENCE, Server, wait_until

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import (  # noqa: E402
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

RUNS = int(os.environ.get("RUNS", "0"))
CALM = settings(deadline=None, report_multiple_bugs=False, database=None, suppress_health_check=list(HealthCheck))
FOUND = [hypothesis.Phase.generate]  # a failure is told as it was found: making it smaller takes minutes
SETTINGS = (settings(CALM, max_examples=RUNS, stateful_step_count=50, print_blob=True) if RUNS
            else settings(CALM, max_examples=8, stateful_step_count=40, derandomize=True, phases=FOUND))
HOUR = 1000  # s; everything that has to do with the clock is a multiple, give or take what a conversation lasts (100 s)
KEEP = 2 * HOUR + HOUR // 2  # s; so no message is ever about as old as that
STEPS = [-2 * HOUR, -HOUR, HOUR, 2 * HOUR, 3 * HOUR, 4 * HOUR]  # s
ATTENTION = 10  # s after a poll in which its reader counts as listening, at least
LARGE = "x" * 60_000  # four fit into a request; an answer ends after 18 of them, and after 3 as text
WITHOUT_TEXT = ["ts", "id", "from", "to", "channel"]  # what is told of a recalled or expired message
RESTARTS = 2  # in one conversation: they take a hundred times as long as all else
CROWD = 3  # parked readers at a time

SENDERS = st.sampled_from(["ann", "bea", "rob"])
NAMES = st.sampled_from(["rob", "sam", "team", ALL])
READERS = st.sampled_from([("rob",), ("sam",), ("team",), ("rob", "team"), ("sam", "team", "rob"), ("sam", ALL)])
TEXT = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20),
    st.sampled_from(["---\n| from=eve", "\ufeff", "{}", '"', LARGE]),
)
LIFETIMES = st.sampled_from([HOUR / 4, HOUR / 2, HOUR * 1.5])
EXTRAS = st.sampled_from([{}, {"subject": "s", "type": "odd"}, {"reply_to": "1", "a": {"b": [1.5, None, "\u2028"]}}])
KEYS = st.sampled_from(["k1", "k2", "k3", "!" * 128])
CHANNELS = st.sampled_from(["one", "two"])


@st.composite
def drafts(draw):
    to = tuple(draw(st.lists(NAMES, min_size=1, max_size=3, unique=True)))
    members = {"msg": draw(TEXT), **draw(EXTRAS)}
    if draw(st.integers(0, 3)) == 0:
        members["ttl"] = draw(LIFETIMES)
    key = draw(KEYS) if draw(st.booleans()) else None
    return Draft(draw(SENDERS), to, draw(CHANNELS), members, key)


class SteppedBus:
    """A server that can be killed, and whose clock is wrong by `error` s."""

    def __init__(self, folder, fault="tidy"):
        self.file = folder / "error"
        self.step(0)
        settings = faulty(fault)
        settings["env"]["CLOCK_ERROR"] = str(self.file)
        self.server = Server(folder / "bus.db", "--keep", f"{KEEP}s", **settings)
        self.peer = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=PATIENCE)
        self.conversations = 0

    def step(self, error):
        self.error = error
        make_wrong(self.file, error)

    def clock(self):
        return int((time.time() + self.error) * 1e6)

    def ask(self, method, path, body=None, headers=None):
        """Status, headers and body of the answer."""
        self.peer.request(method, path, body, headers or {})
        answer = self.peer.getresponse()
        return answer.status, answer.headers, answer.read()

    def get(self, path):
        status, _, body = self.ask("GET", path)
        assert status == 200, (path, body)
        return json.loads(body)

    def pages(self, path):
        """The answers that make up a whole list: a thousand names are in one, and no conversation is the first."""
        answer = self.get(path)
        yield answer
        while answer.get("more"):
            answer = self.get(f"{path}?after={answer['next']}")
            yield answer

    def start_again(self, end):
        self.peer.close()
        end(self.server)
        self.server.start()


class BusAgainstModel(RuleBasedStateMachine):
    """One conversation on two channels of its own."""

    def __init__(self, bus):
        super().__init__()
        self.bus = bus
        bus.conversations += 1
        self.begin = tick(str(bus.get("/healthz")["now"]))
        bus.step(max(bus.error, self.begin // 10**6 - int(time.time())) + KEEP + HOUR)
        self.model = Model(self.begin, KEEP * 10**6, bus.clock)
        self.polled = {}  # (channel, name): when, by a clock that nobody steps; since the start of the server
        self.next = {}  # (channel, names): the `now` of their last answer, as text
        self.parked = []  # (socket, names, channel, max)
        self.ends = 0
        self.sent = []  # what was accepted: how, body and drafts

    def channel(self, name):
        return f"{name}-{self.bus.conversations}"

    # Sending

    def request(self, several, how="json"):
        """One POST /send of these drafts: path, body, headers."""
        headers = {}
        messages = []
        for each in several:
            to = list(each.to) if len(each.to) > 1 else each.to[0]
            messages.append({"from": each.sender, "to": to, "channel": self.channel(each.channel), **each.members})
            if each.key and how == "json":
                messages[-1]["key"] = each.key
        if how != "json" and several[0].key:
            headers["Idempotency-Key"] = several[0].key
        if how == "raw":
            [message] = messages
            message["to"] = ",".join(several[0].to)
            body = message.pop("msg").encode()
            return f"/send?{urlencode(message)}", body, headers
        return "/send", json.dumps(messages if len(messages) > 1 else messages[0]).encode(), headers

    def send(self, several, how="json", unknown=False):
        """Post the drafts and compare the answer; `unknown`: it may have been stored already, by a server that died."""
        status, known = self.model.verdict(several)
        answer_status, _, body = self.bus.ask("POST", *self.request(several, how))
        assert answer_status == status, body
        answer = json.loads(body)
        if status != 200:
            assert list(answer) == ["error"]
            return
        results = answer["results"] if len(several) > 1 else [answer]
        assert len(results) == len(several) and answer["ok"] is True
        fresh = []
        for draft, first, result in zip(several, known, results):
            ticks = [int(each, 16) for each in result.get("ids", {"": result["id"]}).values()]
            assert list(result.get("ids", draft.to)) == list(draft.to)
            assert result["duplicate"] is bool(first) or unknown
            assert result["channel"] == self.channel(draft.channel) and tick(str(result["ts"])) == ticks[-1]
            if first:
                assert ticks == [each.tick for each in first]
            else:
                fresh += self.model.store(draft, ticks)
        self.wake(fresh)
        for draft, result in zip(several, results):
            self.check_receiver(draft, result["receiver"])
        assert tick(str(answer["now"])) == self.model.newest
        self.sent.append((several, how))

    def check_receiver(self, draft, told):
        """The truth about who will read it."""
        channel = draft.channel
        if draft.to == (ALL,) or ALL in draft.to:
            certain = {place[1] for place, mark in self.model.least.items()
                       if mark.reader and mark.firm and place[0] == channel}
            possible = {place[1] for place, mark in self.model.most.items() if mark.reader and place[0] == channel}
            fewest, most = [len(each - {draft.sender}) for each in (certain, possible)]
            assert fewest <= told["online"] + told["offline"] <= most and {*told} - {"unknown"} == {"online", "offline"}
            return
        online = [self.is_online((channel, to)) for to in draft.to]
        unread = [self.model.unread((channel, to)) for to in draft.to]
        assert sum(low for low, _ in unread) <= told["unread"] <= sum(high for _, high in unread)
        assert online.count(True) <= told["online"] <= len(online) - online.count(False)
        if len(draft.to) > 1:
            assert told["online"] + told["offline"] == len(draft.to)
        elif told["last_seen"] is None:
            assert not self.model.least[channel, draft.to[0]].certain()
        else:
            assert self.model.most[channel, draft.to[0]].polled

    def is_online(self, place):
        """None is unknown: its attention may have ended."""
        if place not in self.polled:
            return False
        return True if time.monotonic() < self.polled[place] + ATTENTION else None

    @rule(draft=drafts(), how=st.sampled_from(["json", "json", "header", "raw"]))
    def send_one(self, draft, how):
        if how == "raw":
            simple = {member: value for member, value in draft.members.items() if isinstance(value, str)}
            draft = draft._replace(members={**simple, "msg": simple["msg"] or "x"})
        self.send([draft], how)

    @rule(several=st.lists(drafts(), min_size=2, max_size=4, unique_by=lambda each: each.key or object()))
    def send_an_array(self, several):
        self.send(several)

    @rule(several=st.lists(drafts(), min_size=1, max_size=3), poison=st.sampled_from(["{}", "1", '{"from": "ann"}']))
    def send_an_array_with_a_bad_one(self, several, poison):
        good = [self.request([each])[1].decode() for each in several]
        status, _, body = self.bus.ask("POST", "/send", f"[{', '.join([*good, poison])}]")
        assert status == 400 and list(json.loads(body)) == ["error"]

    @precondition(lambda self: self.sent)
    @rule(which=st.integers(0, 99))
    def retry(self, which):
        several, how = self.sent[which % len(self.sent)]
        if all(each.key for each in several):
            self.send(several, how)

    @precondition(lambda self: self.sent)
    @rule(which=st.integers(0, 99))
    def retry_with_the_members_in_another_order(self, which):
        several, how = self.sent[which % len(self.sent)]
        if all(each.key for each in several):
            turned = [each._replace(members=dict(reversed(each.members.items()))) for each in several]
            self.send(turned, how)

    # Reading

    def place(self, names, channel):
        return f"to={','.join(names)}&channel={self.channel(channel)}"

    def poll(self, names, channel):
        self.model.poll(names, channel)
        for name in {*names, ALL}:
            self.polled[channel, name] = time.monotonic()

    def read(self, names, channel, since, cursors, limit=100, plain=False):
        """One poll. `since` is how the cursor is written, `cursors` are what it may stand for."""
        query = f"/recv?{self.place(names, channel)}&since={since}&max={limit}"
        status, headers, body = self.bus.ask("GET", query, headers={"Accept": "text/plain"} if plain else {})
        if self.model.too_far_ahead(min(cursors)):  # and nothing of it is noted
            assert status == 400, body
            return
        self.poll(names, channel)
        self.model.present(names, channel, cursors)
        assert status == 200, body
        if plain:
            self.check_plain(names, channel, min(cursors), limit, headers, body.decode())
        else:
            self.check_answer(names, channel, cursors, limit, json.loads(body))

    def check_answer(self, names, channel, cursors, limit, answer):
        got = answer["messages"]
        candidates = {since: self.model.visible(names, channel, since) for since in cursors}
        matching = [since for since, visible in candidates.items()
                    if [self.delivered(each) for each in visible][:len(got)] == got]
        assert matching, (got, candidates)
        since = max(matching, key=lambda each: -len(candidates[each]))
        visible = candidates[since]
        whole = len(got) == min(limit, len(visible)) or sum(len(each["msg"]) for each in got) > 900_000
        assert whole or len(matching) > 1, (got, visible)
        reached = int(got[-1]["id"], 16) if got else since
        if len(cursors) == 1:
            if len(got) < len(visible):
                assert answer["more"]
            assert not answer["more"] or self.model.addressed(names, channel, reached)
            gap = self.model.gap(names, channel, since)
            assert ("gap" in answer) == bool(gap) and (not gap or tick(str(answer["gap"]["to"])) == gap), answer
        now = reached if answer["more"] else self.model.newest
        assert tick(str(answer["now"])) == now
        self.next[channel, names] = repr(answer["now"])
        if got:
            self.model.fetch(names, channel, reached, matching)

    def delivered(self, message):
        return {**message.as_delivered(), "channel": self.channel(message.draft.channel)}

    def check_plain(self, names, channel, since, limit, headers, text):
        expected = self.model.visible(names, channel, since)[:limit]
        found = re.findall(r"^\d{4}\S+Z from=(\S+) id=(\S+)", text, re.MULTILINE)
        assert found == [(each.draft.sender, f"{each.tick:x}") for each in expected][:len(found)]
        assert len(found) == len(expected) or len(text) > 120_000
        assert text.startswith("-- messages from ") == bool(self.model.gap(names, channel, since))
        reached = int(found[-1][1], 16) if found else since
        more = json.loads(headers["Bus-More"])
        assert tick(headers["Bus-Now"]) == (reached if more else self.model.newest)
        assert more or len(found) == len(self.model.visible(names, channel, since))
        self.next[channel, names] = headers["Bus-Now"]
        if found:
            self.model.fetch(names, channel, reached, [since])

    @rule(names=READERS, channel=CHANNELS, which=st.integers(0, 99), limit=st.sampled_from([1, 2, 1000]),
          form=st.sampled_from(["{:.6f}", "{:.17g}", "{!r}", "{:.9f}", "{:.0f}"]), plain=st.booleans())
    def read_above_a_message(self, names, channel, which, limit, form, plain):
        ticks = [0, self.begin, *(each.tick for each in self.model.kept), self.model.newest]
        since = ticks[which % len(ticks)]
        text = form.format(since / 1e6)
        if form == "{:.0f}":
            since = tick(text)
        self.read(names, channel, text, {since}, limit, plain)

    @rule(names=READERS, channel=CHANNELS, limit=st.sampled_from([1, 3, 1000]), plain=st.booleans())
    def read_on(self, names, channel, limit, plain):
        """As every client does: present the `now` of the last answer."""
        text = self.next.get((channel, names), "0")
        self.read(names, channel, text, {tick(text)}, limit, plain)

    @rule(names=READERS, channel=CHANNELS)
    def read_from_last(self, names, channel):
        self.read(names, channel, "last", self.model.resumed(names, channel))

    @rule(names=READERS, channel=CHANNELS)
    def read_now(self, names, channel):
        answer = self.bus.get(f"/recv?{self.place(names, channel)}&since=now&block=true")
        self.poll(names, channel)
        assert (answer["messages"], answer["more"]) == ([], False) and tick(str(answer["now"])) == self.model.newest

    @rule(names=READERS, channel=CHANNELS, ahead=st.sampled_from([1, 200, 400]))
    def read_with_a_fast_clock(self, names, channel, ahead):
        since = self.bus.clock() + ahead * 10**6
        self.read(names, channel, f"{since / 1e6:.6f}", {since})

    @rule(names=READERS, channel=CHANNELS)
    def read_with_the_cursor_of_another_bus(self, names, channel):
        answer = self.bus.get(f"/recv?{self.place(names, channel)}&since=0&block=true&bus=0123456789abcdef")
        assert answer["messages"] == [] and answer["bus"] != "0123456789abcdef"

    @precondition(lambda self: len(self.parked) < CROWD)
    @rule(names=READERS, channel=CHANNELS, limit=st.sampled_from([1, 100]))
    def park(self, names, channel, limit):
        """A reader that has everything waits for more."""
        since = self.model.newest
        if self.model.gap(names, channel, since):
            return
        peer = socket.create_connection(("127.0.0.1", self.bus.server.port), timeout=PATIENCE)
        query = f"{self.place(names, channel)}&since={since / 1e6:.6f}&block=true&wait=60&max={limit}"
        peer.sendall(f"GET /recv?{query} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        self.parked.append((peer, names, channel, limit))
        wait_until(lambda: self.has_polled(names, channel))
        self.poll(names, channel)
        self.model.present(names, channel, {since})

    def has_polled(self, names, channel):
        """The poll we sent last is known to the bus: it has presented its cursor."""
        agents = self.bus.get(f"/agents?name={names[0]}&channel={self.channel(channel)}")["agents"]
        return any(each["online"] and tick(str(each["cursor"])) >= self.model.newest for each in agents)

    def wake(self, fresh):
        """Each parked reader that one of these messages is for has its answer."""
        waiting, self.parked = self.parked, []
        for peer, names, channel, limit in waiting:
            since = fresh[0].tick - 1 if fresh else 0
            if not fresh or not self.model.visible(names, channel, since):
                assert not select.select([peer], [], [], 0)[0], "woken by what is not for it"
                self.parked.append((peer, names, channel, limit))
                continue
            self.check_answer(names, channel, {since}, limit, self.last_words(peer))

    def last_words(self, peer):
        with peer:
            text = b"".join(iter(lambda: peer.recv(65536), b""))
        return json.loads(text.partition(b"\r\n\r\n")[2])

    @precondition(lambda self: self.model.kept)
    @rule(which=st.integers(0, 99))
    def recall(self, which):
        message = self.model.kept[which % len(self.model.kept)]
        status, _, body = self.bus.ask("POST", f"/recall?id={message.tick:x}", b"")
        assert status in self.model.recall(message), body
        if status == 200:
            self.model.recalled(message)

    # Looking

    @rule()
    def look_at_the_agents(self):
        agents = {(each["channel"], each["name"]): each
                  for page in self.bus.pages("/agents") for each in page["agents"]}
        for place, mark in self.model.most.items():
            told = agents.get((self.channel(place[0]), place[1]))
            if told is None or not told["listens"]:
                assert place[1] == ALL or not self.model.least[place].certain()
                continue
            low, high = self.model.unread(place)
            assert mark.polled and low <= told["unread"] <= high
            assert self.is_online(place) in (None, told["online"])
            if vars(mark) == vars(self.model.least[place]):
                assert tick(str(told["cursor"])) == mark.seen()

    @invariant()
    def the_inbox_has_what_is_unread(self):
        recipients = defaultdict(dict)
        for page in self.bus.pages("/inbox"):
            for channel, counts in page["recipients"].items():
                recipients[channel].update(counts)
        for channel in ("one", "two"):
            counts = recipients[self.channel(channel)]
            assert ALL not in counts
            for name in {*counts, *(to for place, to in (each.place for each in self.model.kept) if place == channel)}:
                low, high = self.model.unread((channel, name))
                marks = vars(self.model.most[channel, name]), vars(self.model.least[channel, name])
                assert name == ALL or low <= counts.get(name, 0) <= high, (name, counts, marks)

    @precondition(lambda self: self.model.kept)
    @rule(which=st.integers(0, 99))
    def look_at_a_message(self, which):
        message = self.model.kept[which % len(self.model.kept)]
        answer = self.bus.get(f"/message/{message.tick:x}")
        whole = self.delivered(message)
        hidden = self.model.is_expired(message)
        assert answer["message"] == ({member: whole[member] for member in WITHOUT_TEXT} if hidden else whole)
        states = self.model.states(message)
        assert answer["state"] in states or len(states) > 1

    @rule(query=st.sampled_from(REFUSED_QUERIES), payload=st.sampled_from(REFUSED))
    def talk_nonsense(self, query, payload):
        assert self.bus.ask("GET", query)[0] == 400
        assert self.bus.ask("POST", "/send", payload.body)[0] == 400

    @rule(names=READERS, channel=CHANNELS)
    def ask_for_heads(self, names, channel):
        """HEAD never reads mail."""
        assert self.bus.ask("HEAD", f"/recv?{self.place(names, channel)}&since=0")[::2] == (200, b"")
        assert self.bus.ask("OPTIONS", "/recv")[0] == 204

    @invariant()
    def the_log_has_what_was_sent(self):
        """On all channels, since this conversation began."""
        expected = [self.delivered(each) for each in self.model.kept if not self.model.is_expired(each)]
        found, answer = [], {"now": self.begin / 1e6, "more": True}
        while answer["more"]:
            answer = self.bus.get(f"/log?since={answer['now']}&max=1000")
            found += answer["messages"]
        assert found == expected
        assert tick(str(answer["now"])) == self.model.newest

    # What happens to a bus

    @rule(by=st.sampled_from(STEPS))
    def step_the_clock(self, by):
        self.bus.step(self.bus.error + by)
        self.model.retain()
        removed = max(self.model.removed.values(), default=0)
        wait_until(lambda: not removed or self.removed() == removed)

    def removed(self):
        """How far the bus says that retention has come."""
        gap = self.bus.get(f"/log?since={self.begin / 1e6}&max=1").get("gap")
        return gap and tick(str(gap["to"]))

    may_end = precondition(lambda self: self.sent and self.ends < RESTARTS)

    @may_end
    @rule()
    def stop_and_start(self):
        self.bus.start_again(Server.stop)
        for peer, *_ in self.parked:
            assert self.last_words(peer)["messages"] == []
        self.model.stop()
        self.begin_anew()

    @may_end
    @rule()
    def kill_and_start(self):
        self.bus.start_again(Server.kill)
        self.model.kill()
        self.begin_anew()

    @may_end
    @rule(draft=drafts(), delay=st.sampled_from([0, 0.001, 0.003]))
    def kill_during_a_send(self, draft, delay):
        """Nobody knows whether it was stored, until it is retried."""
        several = [draft._replace(key=draft.key or "k4")]
        path, body, _ = self.request(several)
        with socket.create_connection(("127.0.0.1", self.bus.server.port), timeout=PATIENCE) as peer:
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            peer.sendall(head.encode() + body)
            time.sleep(delay)  # s; the kill comes before the commit, during it or after it
            self.bus.start_again(Server.kill)
        self.model.kill()
        self.begin_anew()
        self.send(several, unknown=True)

    def begin_anew(self):
        for peer, *_ in self.parked:
            peer.close()
        self.parked, self.polled = [], {}
        self.ends += 1

    def teardown(self):
        for peer, *_ in self.parked:
            peer.close()


def converse(folder, plan, **fault):
    """What the server said on stderr."""
    hypothesis.configuration.set_hypothesis_home_dir(folder / "hypothesis")
    bus = SteppedBus(folder, **fault)
    with bus.server, contextlib.closing(bus.peer):
        run_state_machine_as_test(lambda: BusAgainstModel(bus), settings=plan)
        return bus.server.log.read_text()


@pytest.mark.slow("8 random conversations, and each starts the server anew up to twice")
def test_the_bus_does_what_the_model_says(tmp_path):
    assert "Traceback" not in converse(tmp_path, SETTINGS)


@pytest.mark.slow("random conversations until one shows it: the control of the test above")
def test_a_bus_whose_ticks_are_the_clock_as_it_is_differs_from_the_model(tmp_path):
    with pytest.raises((AssertionError, hypothesis.errors.Flaky)):
        converse(tmp_path, settings(SETTINGS, phases=FOUND), fault="tidy,raw clock")
