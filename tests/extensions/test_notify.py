"""Notices by webhook: PROTOCOL.md section 28. The webhook is an HTTP server of this test."""

import http.server
import json
import pathlib
import re
import socket
import sys
import threading
import time
from unittest import mock

import pytest

import bus_server
from bus_server import Unusable, command_line
from tests.core.test_identity import ask
from tests.extensions.test_later import made_without
from tests.faults.test_kinds_bounds import Guest
from tests.kit import inside
from tests.kit.clock import Clock
from tests.kit.peers import metric, mint, run
from tests.kit.processes import Server, wait_until
from tests.kit.wire import a_bus, come_true

BEGIN = 1795203600 * 1000000  # us
MINUTE = 60 * 1000000
SECRET = "s3cret"


class Webhook(http.server.ThreadingHTTPServer):
    """Takes what is posted, and answers with `status`. `heard` is a list of (path, headers, body)."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Hearing)
        self.heard, self.status = [], 200
        self.host = f"127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Hearing(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.heard.append((self.path, self.headers, body.decode()))
        self.send_response(self.server.status)
        self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self):
        raise AssertionError("a redirect was followed")

    def log_message(self, *_):
        pass


@pytest.fixture
def webhook():
    with Webhook() as webhook:
        yield webhook


def rule(webhook, when, name="one", template="slack", **members):
    to = {} if when == "urgent" else {"to": "bob"}
    return {"rule": name, "when": when, **to, "template": template, "url": f"http://{webhook.host}/{SECRET}", **members}


def written(folder, webhook, *rules, mode=0o600):
    path = pathlib.Path(folder, "rules.json")
    path.write_text(json.dumps({"hosts": [webhook.host], "rules": rules}))
    path.chmod(mode)
    return str(path)


def part(bus):
    """The Notices of a bus."""
    return bus.routes["GET", "/notices"].call.__self__


class Notified:
    """A bus inside the test with these rules. Its wall clock is the test's; look() looks at the rules, and no timer."""

    def __init__(self, folder, webhook, *rules):
        self.context = a_bus(time.monotonic, folder / "bus.db", "--notify", written(folder, webhook, *rules))
        self.webhook = webhook

    def __enter__(self):
        every = bus_server.Loop.every

        def no_look(loop, period, action):
            if type(getattr(action, "__self__", None)).__name__ != "Notices":
                every(loop, period, action)

        with mock.patch.object(bus_server.Loop, "every", no_look):
            self.bus = self.context.__enter__()
        self.wall = self.bus.view.clock = self.bus.clock.wall = self.bus.mailboxes.wall = Clock(BEGIN)
        self.guest, self.notices = Guest(self.bus), part(self.bus)
        return self

    def __exit__(self, *error):
        self.context.__exit__(*error)

    def look(self, minutes=0, soon=True):
        """What the webhook heard since the last look; `soon`: as if a minute had passed since the last request."""
        self.wall.now += minutes * MINUTE
        for watch in self.notices.watches if soon else ():
            watch.due = 0.0
        before = len(self.webhook.heard)
        for watch in self.notices.watches:
            self.notices.check(watch)
        self.notices.send()
        come_true(lambda: not self.notices.sending)
        return [body for _, _, body in self.webhook.heard[before:]]

    def state(self):
        return self.guest.asks("GET", "/notices").json()


@pytest.fixture
def notified(tmp_path, webhook):
    """Makes one for rules without the place of the webhook: (when, members)."""
    made = []

    def make(*rules):
        given = [rule(webhook, when, f"rule-{number}", **members) for number, (when, members) in enumerate(rules)]
        made.append(Notified(tmp_path, webhook, *given))
        return made[-1].__enter__()

    yield make
    for each in made:
        each.__exit__(None, None, None)


def text(body):
    return json.loads(body)["text"]


# What is told


def test_unread_mail_is_told_after_its_minutes_once_until_it_was_read(notified):
    bus = notified(("unread", {"minutes": 10}))
    bus.guest.sends("bob", "the secret plan")
    bus.guest.sends("bob", "another")
    assert bus.look(9) == []
    [body] = bus.look(2)
    assert text(body) == "agent-bus: bob has 2 unread messages, the oldest for 11 minutes"
    bus.guest.sends("bob")
    assert bus.look(60) == []
    now = bus.guest.asks("GET", "/recv?to=bob").json()["now"]
    bus.guest.asks("GET", f"/recv?to=bob&since={now}")
    assert bus.look() == []
    bus.guest.sends("bob")
    assert [text(body) for body in bus.look(10)] == ["agent-bus: bob has 1 unread message, the oldest for 10 minutes"]


def test_a_job_that_came_back_counts_as_unread(notified):
    bus = notified(("unread", {"minutes": 10, "to": "builds"}))
    bus.guest.sends("builds")
    [job] = bus.guest.asks("POST", "/claim", {"to": "builds", "wait": 0}).json()["messages"]
    assert bus.look(60) == []
    bus.guest.asks("POST", "/nack", {"id": job["id"], "lease": job["lease"]})
    [body] = bus.look(1)
    assert text(body).startswith("agent-bus: builds has 1 unread message, the oldest for ")


def test_expired_mail_is_not_told(notified):
    bus = notified(("unread", {"minutes": 10}))
    bus.guest.sends("bob", ttl=60)
    assert bus.look(20) == []


def test_dead_letters_are_told_and_more_of_them_again(notified):
    bus = notified(("dead", {"to": "builds"}))
    bus.guest.sends("builds.dead")
    assert [text(body) for body in bus.look()] == ["agent-bus: the queue builds has 1 dead letter"]
    assert bus.look() == []
    bus.guest.sends("builds.dead")
    assert [text(body) for body in bus.look()] == ["agent-bus: the queue builds has 2 dead letters"]


def test_a_silent_agent_is_told_once_until_it_listens_again(notified):
    bus = notified(("silent", {"minutes": 5}))
    assert bus.look(60) == []
    bus.guest.asks("GET", "/recv?to=bob")
    box = bus.bus.mailboxes.box("default", "bob")
    assert bus.look(6) == [], "it counts as listening for some seconds, which the test's clock did not pass"
    box.until = 0.0
    assert [text(body) for body in bus.look()] == ["agent-bus: bob has not listened for 6 minutes"]
    assert bus.look(60) == []
    bus.guest.asks("GET", "/recv?to=bob")
    assert bus.look() == []
    box.until = 0.0
    assert len(bus.look(7)) == 1


def test_urgent_messages_are_told_with_their_senders_and_without_their_text(notified):
    bus = notified(("urgent", {"to": "bob"}), ("urgent", {"template": "mattermost"}))
    for sender, to, members in (
        ("eve", "bob", {"priority": "high"}),
        ("dora", "bob", {"priority": "high", "subject": "the secret plan"}),
        ("eve", "carl", {"priority": "high"}),
        ("eve", "bob", {"priority": "low"}),
        ("mallory", "bob", {"more": {"priority": "high"}}),
        ("mallory", "bob", {"subject": 'x", "priority": "high"'}),
    ):
        bus.guest.sends(to, **{"from": sender, **members})
    told = sorted(text(body) for body in bus.look())
    assert told == [
        "3 urgent messages for agents from eve, dora",
        "agent-bus: 2 urgent messages for bob from eve, dora",
    ]
    assert bus.look() == []
    for number in range(20):
        bus.guest.sends("bob", **{"from": f"a{number}", "priority": "high"})
    assert all("a9 and others" in body and "a10" not in body for body in bus.look())


NESTED = {"more": {"priority": "high"}}


@pytest.mark.parametrize("members, is_told", [
    ({**NESTED, "msg": "x" * 100_000}, False),
    ({**NESTED, "priority": "high", "msg": "x" * 100_000}, True),
    ({**NESTED, "msg": '\\", "priority": "high", "'}, False),
    ({**NESTED, "y": [[]] * 2000}, True),  # too much to look at all of it
])  # fmt: skip
def test_what_is_parsed_of_a_message_is_bounded_and_its_text_is_passed_over(notified, members, is_told):
    bus = notified(("urgent", {"to": "bob"}))
    bus.guest.sends("bob", **members)
    assert len(bus.look()) == is_told


def test_a_message_for_many_is_judged_once_and_in_slices(notified, monkeypatch):
    """Else one send holds the loop for as long as it takes to parse its text for each of its names."""
    bus = notified(("urgent", {}))
    module, [watch], texts = sys.modules[type(bus.notices).__module__], bus.notices.watches, []
    really = module.is_urgent
    monkeypatch.setattr(module, "is_urgent", lambda given: texts.append(given) or really(given))
    to = [f"bob{number}" for number in range(64)]
    monkeypatch.setattr(bus.bus.loop, "BUDGET", 60)  # s; each is judged in one slice
    bus.guest.sends(to, priority="high")
    bus.guest.sends(to, "y", **NESTED)
    come_true(lambda: watch.urgent == 64 and len(texts) >= 2)
    come_true(lambda: not bus.bus.loop.actions)
    assert len(texts) == 2
    monkeypatch.setattr(bus.bus.loop, "BUDGET", 0)
    bus.guest.sends(to, priority="high")
    assert watch.urgent < 128
    come_true(lambda: watch.urgent == 128)


# The request


def test_each_template_is_what_its_webhook_takes(notified, webhook):
    forms = {"ntfy": {"token": "tk_1"}, "slack": {}, "mattermost": {}, "telegram": {"chat_id": "-100"}}
    bus = notified(*[("unread", {"minutes": 0, "template": name, **members}) for name, members in forms.items()])
    bus.guest.sends("bob")
    bus.look()
    come_true(lambda: len(webhook.heard) == 4)
    said = "bob has 1 unread message, the oldest for 0 minutes"
    bodies = {body for _, _, body in webhook.heard}
    assert f"agent-bus: {said}" in bodies
    assert sorted(json.dumps(json.loads(body)) for body in bodies if body[0] == "{") == sorted(
        json.dumps(each)
        for each in (
            {"text": f"agent-bus: {said}"},
            {"username": "agent-bus", "text": said},
            {"chat_id": "-100", "text": f"agent-bus: {said}"},
        )
    )
    for path, headers, body in webhook.heard:
        assert path == f"/{SECRET}" and headers["Host"] == webhook.host and int(headers["Content-Length"]) == len(body)
        assert headers["Authorization"] == (None if body[0] == "{" else "Bearer tk_1")


def test_a_rule_sends_once_a_minute_at_most(notified):
    bus = notified(("dead", {"to": "builds"}))
    bus.guest.sends("builds.dead")
    assert len(bus.look()) == 1
    [watch] = bus.notices.watches
    assert 55 < watch.due - time.monotonic() <= 60
    bus.guest.sends("builds.dead")
    assert bus.look(soon=False) == [] and bus.state()["rules"][0]["waiting"] is True
    assert len(bus.look()) == 1 and bus.state()["rules"][0]["sent"] == 2


@pytest.mark.parametrize("status, reason", [(302, "answered 302, and no redirect is followed"), (500, "answered 500")])
def test_a_failure_is_tried_again_later_each_time_and_then_a_dead_letter(notified, webhook, status, reason, capfd):
    bus = notified(("unread", {"minutes": 0}))
    webhook.status = status
    bus.guest.sends("bob")
    waits = []
    for _ in range(5):
        assert len(bus.look()) == 1
        waits.append(round((bus.notices.watches[0].due - time.monotonic()) / 60))
    assert waits == [1, 2, 4, 8, 16]
    [letter], [state] = bus.state()["dead"], bus.state()["rules"]
    assert letter["rule"] == "rule-0" and letter["reason"] == f"{webhook.host} {reason}" and letter["at"] == BEGIN / 1e6
    assert letter["text"].startswith("bob has 1 unread") and (state["failed"], state["waiting"]) == (1, False)
    said = inside.said(capfd)
    assert "a notice of the rule rule-0 was not sent" in said and SECRET not in said + json.dumps(bus.state())
    assert 'notices_total{rule="rule-0",result="failed"} 1' in bus.guest.asks("GET", "/metrics").body.decode()


@pytest.mark.parametrize("when, to", [("unread", "bob"), ("dead", "builds"), ("urgent", "bob")])
def test_what_lasts_is_told_when_a_webhook_works_again(notified, webhook, when, to):
    """Its first notice is dead. The next one waits for 16 minutes; when it was sent, there is no other."""
    bus = notified((when, {"to": to, **({"minutes": 0} if when == "unread" else {})}))
    webhook.status = 500
    bus.guest.sends("builds.dead" if when == "dead" else to, priority="high")
    assert [len(bus.look()) for _ in range(5)] == [1] * 5
    assert bus.state()["rules"][0]["failed"] == 1 and bus.look(soon=False) == []
    assert 15 * 60 < bus.notices.watches[0].due - time.monotonic() <= 16 * 60
    webhook.status = 200
    [body] = bus.look()
    assert re.search(" has 1 | 1 urgent message for bob from [a-z]+$", text(body)) and bus.look(60) == []


def silence(peer):
    """It takes the request and says nothing."""


def drip(peer):
    for _ in range(1000):
        peer.sendall(b"H")
        if drip.over.wait(0.02):
            return


def gibberish(peer):
    peer.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")


@pytest.mark.parametrize("answers, reason", [
    (silence, "no answer in time"), (drip, "no answer in time"), (gibberish, "does not speak HTTP"), (None, "refused"),
])  # fmt: skip
def test_a_peer_that_is_no_webhook_is_given_up_in_time(bus, tmp_path, monkeypatch, answers, reason):
    rules = rules_of()
    monkeypatch.setattr(rules, "TIMEOUT", 0.3)
    drip.over = threading.Event()
    door = socket.create_server(("127.0.0.1", 0))
    host = f"127.0.0.1:{door.getsockname()[1]}"

    def serve():
        peer, _ = door.accept()
        peer.recv(65536)
        answers(peer)
        drip.over.wait(20)
        peer.close()

    thread = threading.Thread(target=serve) if answers else None
    if thread:
        thread.start()
    else:
        door.close()
    given = {"rule": "one", "when": "unread", "to": "bob", "template": "ntfy", "url": f"http://{host}/{SECRET}"}
    began = time.monotonic()
    if answers is gibberish:
        drip.over.set()
    with pytest.raises(rules.Failed) as failed:
        rules.post(rules.rule_of(given, {host}), "x")
    assert reason in str(failed.value) and SECRET not in str(failed.value) and time.monotonic() - began < 10
    drip.over.set()
    if thread:
        thread.join()
        door.close()


def test_the_loop_serves_others_while_a_webhook_is_slow(tmp_path, webhook):
    begun, held = threading.Event(), threading.Event()
    webhook.RequestHandlerClass = type(
        "Slow", (Hearing,), {"do_POST": lambda self: (begun.set(), held.wait(20), Hearing.do_POST(self))}
    )
    rules = written(tmp_path, webhook, rule(webhook, "unread", minutes=0))
    with Server(tmp_path / "bus.db", "--notify", rules) as bus:
        assert ask(bus, "POST", "/send", {"from": "ann", "to": "bob", "msg": "x"})[0] == 200
        assert begun.wait(20)
        began = time.monotonic()
        assert ask(bus, "GET", "/notices")[1]["rules"][0]["waiting"] and webhook.heard == []
        assert time.monotonic() - began < rules_of().TIMEOUT / 2, "the loop waited until the request was given up"
        held.set()
        wait_until(lambda: ask(bus, "GET", "/notices")[1]["rules"][0]["sent"] == 1)
        assert webhook.heard and metric(bus, 'notices_total{rule="one",result="sent"}') == 1
        assert SECRET not in bus.log.read_text() and bus.stop() == 0


# The file


def rules_of():
    """The second file of the extension, as it is loaded."""
    command_line(["--db", ":memory:"])
    return sys.modules["_notify_rules"]


class Nowhere:
    host = "ntfy.sh"


WRONG = [
    ({"rule": "a b"}, "rule must be a name"),
    ({"when": "never"}, "rule one: when must be one of unread, dead, silent, urgent"),
    ({"when": ["unread"]}, "when must be one of"),
    ({"template": "pager"}, "template must be one of ntfy, slack, mattermost, telegram"),
    ({"to": None}, "to must be a name"),
    ({"to": "all"}, "to must be the name of one agent or queue"),
    ({"to": "x" * 60}, "at most 59 characters"),
    ({"channel": "a b"}, "channel must be a name"),
    ({"minutes": "5"}, "minutes must be a number from 0"),
    ({"minutes": -1}, "minutes must be a number from 0"),
    ({"url": None}, "url must be http:// or https:// with a host"),
    ({"url": "file:///etc/passwd"}, "url must be http:// or https:// with a host"),
    ({"url": "https://user@ntfy.sh/x"}, "without the name of a user"),
    ({"url": "https://ntfy.sh:99999/x"}, "url must be"),
    ({"url": "https://ntfy.sh/x y"}, "url must be"),
    ({"url": "https://169.254.169.254/latest"}, "169.254.169.254 is not in hosts"),
    ({"url": "https://ntfy.sh:8443/x"}, "ntfy.sh:8443 is not in hosts"),
    ({"template": "telegram"}, "telegram needs a chat_id"),
    ({"token": "a\r\nX: y"}, "must be ASCII without a blank"),
    ({"text": "x"}, "a rule is an object with members of rule, when"),
]


@pytest.mark.parametrize("members, sentence", WRONG)
def test_a_wrong_rule_gets_its_sentence(tmp_path, members, sentence):
    given = {**rule(Nowhere, "unread"), "url": "https://ntfy.sh/s3cret", **members}
    with pytest.raises(Unusable) as unusable:
        rules_of().read(written(tmp_path, Nowhere, given))
    assert sentence in str(unusable.value) and SECRET not in str(unusable.value)


@pytest.mark.parametrize("content, sentence", [
    ("{", "cannot use the rules in"), ("[]", 'it must be {"hosts": [...], "rules": [...]}'),
    ('{"rules": []}', "it must be"), ('{"hosts": "x", "rules": []}', "it must be"),
])  # fmt: skip
def test_a_file_that_has_no_rules_is_told(tmp_path, content, sentence):
    path = tmp_path / "rules.json"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(Unusable) as unusable:
        rules_of().read(str(path))
    assert sentence in str(unusable.value)


def test_two_rules_of_one_name_and_too_many_rules_are_told(tmp_path):
    each = {**rule(Nowhere, "unread"), "url": "https://ntfy.sh/x"}
    for rules, sentence in (([each, each], "2 rules have the name one"), ([each] * 101, "at most 100 rules")):
        with pytest.raises(Unusable) as unusable:
            rules_of().read(written(tmp_path, Nowhere, *rules))
        assert sentence in str(unusable.value)


def test_a_start_with_a_file_that_others_can_read_or_with_none_is_refused(tmp_path):
    path = written(tmp_path, Nowhere, mode=0o644)
    for given, sentence in ((path, f"chmod 600 {path}"), (str(tmp_path / "none"), "cannot read the rules in")):
        for option in ("--notify", "--notify-dry-run"):
            code, _, err = run("--db", str(tmp_path / "bus.db"), "--port", "0", option, given)
            assert code == 2 and sentence in err and "Traceback" not in err


def test_a_dry_run_says_what_each_rule_waits_for_and_sends_nothing(tmp_path, webhook):
    path = written(tmp_path, webhook, rule(webhook, "unread", "lead"), rule(webhook, "urgent", "any", template="ntfy"))
    code, out, err = run("--notify-dry-run", path)
    assert (code, err) == (0, "") and webhook.heard == [] and SECRET not in out
    assert (
        f"lead: when mail for bob is unread for 10 minutes, on the channel default: to {webhook.host}, as for slack"
        in out
    )
    assert '    application/json: {"text": "agent-bus: (names and numbers)"}\nany: when a message for anybody' in out


# Who sees it, and what it costs


def test_notices_are_for_an_operator(tmp_path):
    tokens = mint(tmp_path / "bus.db", alice=[], admin=["--operator"])
    with a_bus(time.monotonic, tmp_path / "bus.db") as bus:
        assert Guest(bus, tokens["admin"]).asks("GET", "/notices").json()["rules"] == []
        assert Guest(bus, tokens["alice"]).begins("GET", "/notices").answer().status == 403
        assert Guest(bus).begins("GET", "/notices").answer().status == 401


def test_a_bus_without_rules_does_nothing_more_for_a_send_and_has_no_timer():
    counts = []
    for lacks in ((), ("notify",)):
        bus = made_without(*lacks)
        counts.append(
            [len(bus.loop.timers), *(len(getattr(bus, seam)) for seam in ("checks", "on_announced", "metrics"))]
        )
        inside.close(bus)
    assert counts[0] == counts[1]
