import collections
import contextlib
import gc
import os
import shutil
import signal

import pytest

from tests.kit.authority import Authority
from tests.kit.processes import Server, no_settings

os.environ["XDG_CONFIG_HOME"] = os.devnull  # no configuration of whoever runs the tests
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each of some thousand processes compiles the bus for itself


@pytest.fixture
def bus(tmp_path):
    """A running bus with an empty database of its own."""
    with Server(tmp_path / "bus.db") as server:
        yield server


@pytest.fixture
def home(tmp_path, monkeypatch):
    """No setting of whoever runs the tests, and a state directory of each test's own."""
    no_settings(monkeypatch)
    monkeypatch.setenv("AGENT_BUS_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    if not shutil.which("openssl"):
        pytest.skip("openssl makes the certificates")
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def interruptible():
    """Ctrl-C and a hangup work in our children, also where we were started with `&` or nohup, which ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in zip((signal.SIGINT, signal.SIGHUP), before):
        signal.signal(number, handler)


HANGS = 480  # s; no test takes so long even on a busy machine, nor what it sets up or takes down


@contextlib.contextmanager
def told_if_it_hangs():
    """A step of a test that hangs fails, with the place where it hangs, and the next test is run.

    The signal reaches whatever this thread waits for, and no `except Exception` catches a failure of pytest.
    """

    def fail(_signal, _frame):
        pytest.fail(f"hangs: not over after {HANGS} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, HANGS, 30)  # and again, should what ends the test hang as well
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_setup():
    with told_if_it_hangs():
        yield


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_call():
    with told_if_it_hangs():
        yield


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_teardown():
    with told_if_it_hangs():
        yield


def pytest_collection_finish():
    """All tests, and the modules that they are in, stay to the end: no search for garbage looks through them again."""
    gc.collect()
    gc.freeze()


DIED = []  # of the workers of pytest-xdist


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(error):
    DIED.extend([error] if error else [])


def pytest_sessionfinish(session):
    if DIED:  # tests are left that nobody has run
        session.exitstatus = pytest.ExitCode.INTERRUPTED


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that none of several workers begins such a file when the others are done."""
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
