"""Pictures of the page, for people to look at: python -m tests.extensions.page_pictures FOLDER [NAME...]

Each view and state is shown on a desk and on a phone, light and dark, in about two minutes. What must hold of them is
in test_page_*.py.
"""
import json
import pathlib
import sys
import tempfile

from playwright.sync_api import sync_playwright

import bus_server
from tests.core.test_identity import ask
from tests.kit.page import CHROMIUM, HOSTILE, opened, opens_a_message, send, show
from tests.kit.peers import Peer, mint
from tests.kit.processes import Server

SIZES = {"desk": (1360, 860), "phone": (390, 844)}
TALK = [
    ("planner", "dell", "start T2", "T2 is yours: the retry queue. Say when the tests are green."),
    ("dell", "planner", None, "42 tests pass, 1 skipped"),
    ("spark", "planner", "re: p95", "Port 8080 is taken on nano; I use 8081 until somebody frees it."),
    ("nano", "spark", None, "Which commit do you run?\n```\ngit log --oneline -1\n```"),
    ("planner", "oncall", "incident", "svc-report answers 502 since 14:02. Who looks?"),
    ("oncall", "planner", "incident", "I do. It was a full disk on report-3; 40 GB are free now."),
    ("mac", "planner", None, "p95 is 31 ms after the change, 44 ms before"),
    ("planner", "mac", "p95", "Good. Write it into the notes and take T5 next."),
]


def past(path, minutes=40):
    """Some talk of the last minutes."""
    state, now = bus_server.State(str(path)), bus_server.wall_clock()
    for number in range(7 * minutes):
        at = now - (minutes * 60 - number * 60 // 7) * 1_000_000
        sender, to, subject, text = TALK[number * number % 11 % len(TALK)]
        message = {"from": sender, "to": to, "msg": text, **({"subject": subject} if subject else {})}
        state.apply([bus_server.Put([bus_server.draft(message, None)])], bus_server.Now(at, at))
    state.close()


def lively(bus):
    """Who listens, who does not, jobs of which some have failed, and a thread."""
    for name in ("dell", "planner", "spark", "nano", "mac", "oncall"):
        bus.get(f"/recv?to={name}&since={json.loads(bus.get(f'/recv?to={name}&since=0&max=1000'))['now']}")
    for number in range(3):
        send(bus, "dell", "archivist", f"store run {number}, please")
    for number in range(6):
        send(bus, "mac", "builds", f"make bench run={number}")
    for _ in range(2):
        job = ask(bus, "POST", "/claim", {"to": "builds", "worker": "w1"})[1]["messages"][0]
        ask(bus, "POST", "/nack", {"id": job["id"], "lease": job["lease"], "reason": "exit 137: out of memory"})
    ask(bus, "POST", "/claim", {"to": "builds", "worker": "w1"})
    asked = send(bus, "oncall", "planner", "Which application is it, and since when?", subject="incident")
    reply = send(bus, "planner", "oncall", "svc-report, since 14:02", reply_to=asked["id"])
    send(bus, "oncall", "planner", "Restarted. It answers again.", reply_to=reply["id"])


def crowd(bus):
    with Peer(bus) as peer:
        for number in range(300):
            assert peer.send("GET", f"/recv?to=agent-{number:03}&since=0").answer().status == 200
    for number in range(9):
        send(bus, f"agent-{number:03}", f"idle-{number}", "are you there?")
        send(bus, f"agent-{number:03}", f"agent-{number + 9:03}", "the next one is yours")


def storm(bus):
    lively(bus)
    for _ in range(4):
        some = [{"from": "dell", "to": "spark", "msg": f"ack {number}"} for number in range(50)]
        assert ask(bus, "POST", "/send", some)[0] == 200


def hostile(bus):
    for number, text in enumerate(HOSTILE):
        send(bus, f"mallory-{number % 4}", "spark", text, subject=text[:40])


def says(page):
    page.keyboard.press("c")
    page.fill("#say-as", "maria")
    page.fill("#say-to", "all")


def loses(page):
    page.context.set_offline(True)
    page.route("**/log?*", lambda route: route.abort())
    page.wait_for_selector("#banner:has-text('out of reach')", timeout=60000)


# picture: (what is on the bus, where, what a person does there)
PICTURES = {
    "now": (lively, "#/", None),
    "messages": (lively, "#/messages", None),
    "thread": (lively, "#/messages", opens_a_message),
    "conversation": (lively, "#/messages/planner/oncall", None),
    "agents": (lively, "#/agents", None),
    "deaf": (lively, "#/agents/archivist", None),
    "work": (lively, "#/work", None),
    "mail": (lively, "#/mail", None),
    "say": (lively, "#/", says),
    "empty": (None, "#/", None),
    "crowd": (crowd, "#/", None),
    "storm": (storm, "#/", None),
    "hostile": (hostile, "#/messages", None),
    "token": ("tokens", None, None),
    "ordinary": ("tokens", "#token={ann}", None),
    "away": (lively, "#/", loses),
}


def main(folder, *names):
    target = pathlib.Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as driver, tempfile.TemporaryDirectory() as databases:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        buses = {}
        for name, (kind, where, act) in PICTURES.items():
            if names and name not in names:
                continue
            bus, tokens = buses.get(kind) or buses.setdefault(kind, begun(kind, pathlib.Path(databases), len(buses)))
            with opened(browser) as page:
                if where is None:
                    page.goto(f"{bus.url}/ui/")
                    page.wait_for_selector("#token")
                else:
                    show(page, bus, where.format(**tokens))
                page.wait_for_timeout(1500)
                if act:
                    act(page)
                for scheme in ("light", "dark"):
                    for size, (width, height) in SIZES.items():
                        page.emulate_media(color_scheme=scheme)
                        page.set_viewport_size({"width": width, "height": height})
                        page.wait_for_timeout(300)
                        page.screenshot(path=target / f"{name}-{size}-{scheme}.png")
        browser.close()
        for bus, _ in buses.values():
            bus.kill()


def begun(kind, folder, number):
    """A bus of this kind, and its tokens."""
    path, tokens = folder / f"{number}.db", {}
    if kind in (lively, storm):
        past(path)
    if kind == "tokens":
        tokens = mint(path, maria=["--operator"], ann=[])
    bus = Server(path, "--max-attempts", "1").start()
    if kind == "tokens":
        send(bus, "maria", "ann", "which way?", tokens["maria"])
    elif kind:
        kind(bus)
    return bus, tokens


if __name__ == "__main__":
    main(*sys.argv[1:])
