"""What several tests of the page share: a browser, a tab, and buses with something on them."""
import pytest

from tests.kit.near import Near
from tests.kit.notes import FIND_PLACE, NOTES, NOTES_PLACE, NOTHING, extended
from tests.kit.page import CHROMIUM, DESK, HURRIED, fill, go_to, place_for_tabs, send, show, tab
from tests.kit.peers import mint


@pytest.fixture(scope="package")
def browser():
    """One for all files of a worker: it takes 2 s of CPU to start and to end."""
    from playwright.sync_api import sync_playwright  # of an extra that need not be there

    with sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP evil.example 127.0.0.1"]
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def context(browser):
    with place_for_tabs(browser) as context:
        yield context


@pytest.fixture
def page(context):
    """A tab of each test's own. What keeps something for longer than a tab needs more: `opened(browser)`."""
    with tab(context) as page:
        yield page


@pytest.fixture
def hurried(page):
    """The page in a tab that waits 0.3 s where others wait for some seconds."""
    page.add_init_script(HURRIED)
    return page


@pytest.fixture
def near(tmp_path):
    """A bus of each test's own, with nothing on it, in a thread."""
    with Near(tmp_path / "bus.db") as bus:
        yield bus


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
    """A bus with some talk, a deaf agent, a queue with a failed job, and hostile messages. Nothing changes it."""
    with Near(tmp_path_factory.mktemp("busy") / "bus.db", "--max-attempts", "1") as bus:
        fill(bus)
        yield bus


@pytest.fixture(scope="module")
def walked(busy, context):
    with tab(context) as page:
        yield show(page, busy)


@pytest.fixture
def walk(walked):
    """The page of the busy bus in a tab that is loaded once for a file: for who only looks, and changes the view."""
    walked.set_viewport_size(DESK)
    go_to(walked, "#/agents/nobody")  # so each test has a view that is drawn anew
    yield walked
    errors, walked.errors = walked.errors, []
    assert not errors


@pytest.fixture(scope="module")
def closed(tmp_path_factory):
    path = tmp_path_factory.mktemp("closed") / "bus.db"
    tokens = mint(path, maria=["--operator"], ann=[], sensor=["--send-only"])
    with Near(path) as bus:
        bus.tokens = tokens
        send(bus, "maria", "ann", "for ann", bus.tokens["maria"])
        send(bus, "maria", "bob", "for bob", bus.tokens["maria"])
        send(bus, "sensor", "bob", "21 degrees", bus.tokens["sensor"])
        yield bus


@pytest.fixture
def noted(tmp_path):
    with extended(tmp_path, notes=(NOTES, NOTES_PLACE), seek=(NOTHING, FIND_PLACE)) as bus:
        send(bus, "ann", "bob", "hello")
        yield bus
