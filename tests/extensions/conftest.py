"""What several tests of the page share: a browser, a tab, and buses with something on them."""
import pytest

from tests.core.test_identity import ask
from tests.kit.notes import FIND_PLACE, NOTES, NOTES_PLACE, NOTHING, extended
from tests.kit.page import CHROMIUM, fill, opened, send
from tests.kit.peers import Peer, invite
from tests.kit.processes import Server, wait_until


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright  # of an extra that need not be there

    with sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP evil.example 127.0.0.1"]
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    with opened(browser) as page:
        yield page


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
    """A bus with some talk, a deaf agent, a queue with a failed job, and hostile messages. Nothing changes it."""
    with Server(tmp_path_factory.mktemp("busy") / "bus.db", "--max-attempts", "1") as bus:
        fill(bus)
        yield bus


@pytest.fixture(scope="module")
def closed(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("closed") / "bus.db") as bus:
        grants = {"maria": ["--operator"], "ann": [], "sensor": ["--send-only"]}
        bus.tokens = {name: invite(bus, name, *options) for name, options in grants.items()}
        wait_until(lambda: ask(bus, "GET", "/agents")[0] == 401)
        send(bus, "maria", "ann", "for ann", bus.tokens["maria"])
        send(bus, "maria", "bob", "for bob", bus.tokens["maria"])
        send(bus, "sensor", "bob", "21 degrees", bus.tokens["sensor"])
        yield bus


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """A bus that 300 agents have polled; six of them have mail."""
    with Server(tmp_path_factory.mktemp("crowd") / "bus.db") as bus:
        with Peer(bus) as peer:
            for number in range(300):
                assert peer.send("GET", f"/recv?to=agent-{number:03}&since=0").answer().status == 200
        for number in range(6):
            send(bus, f"agent-{number:03}", f"agent-{number + 20:03}", "are you there?")
        yield bus


@pytest.fixture
def noted(tmp_path):
    with extended(tmp_path, notes=(NOTES, NOTES_PLACE), seek=(NOTHING, FIND_PLACE)) as bus:
        send(bus, "ann", "bob", "hello")
        yield bus
