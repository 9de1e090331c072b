"""bus_listener.sh under test, and a bus that follows a script: what its tests share."""
import contextlib
import http.server
import json
import os
import pathlib
import shutil
import signal
import subprocess
import threading
import urllib.request
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.kit.processes import PATIENCE, ROOT, wait_until

SCRIPT = ROOT / "bus_listener.sh"
TICK = 1795205226000007  # a fraction that begins with zeros


def send(url, *bodies, to="spark", **fields):
    batch = [{"from": "dell", "to": to, "msg": body, **fields} for body in bodies]
    urllib.request.urlopen(urllib.request.Request(url + "/send", json.dumps(batch).encode()), timeout=PATIENCE).close()


class Listener:
    """One bus_listener.sh that polls fast, in a process group of its own: a kill takes curl and jq along, or not."""

    def __init__(self, home, url, **env):
        self.home = pathlib.Path(home)
        self.home.mkdir(exist_ok=True)
        fast = {"AGENT_NAME": "spark", "AGENT_BUS_URL": url, "AGENT_BUS_STATE_DIR": str(home), "INTERVAL": "0.05"}
        ours = ("AGENT_", "LOG", "FULL", "HEARTBEAT", "PID_FILE", "BLOCK")
        self.env = {**{k: v for k, v in os.environ.items() if not k.startswith(ours)}, **fast, **env}
        self.stderr = self.home / "stderr"
        self.process = None

    def file(self, suffix):
        return self.home / "listener" / f"spark.{suffix}"

    def start(self, **popen):
        with self.stderr.open("ab") as stderr:
            self.process = subprocess.Popen(
                [SCRIPT], env=self.env, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True, **popen
            )
        return self

    def kill(self, group=True):
        """kill -9, of the shell alone or of all it runs."""
        (os.killpg if group else os.kill)(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)

    def stop(self):
        self.process.terminate()
        return self.process.wait(PATIENCE)

    def said(self):
        return self.stderr.read_text().splitlines()

    def messages(self):
        return [json.loads(line) for line in self.lines("jsonl")]

    def log(self):
        return [line.split("\t") for line in self.lines("log") if not line.startswith("#")]

    def remarks(self):
        return [line for line in self.lines("log") if line.startswith("#")]

    def lines(self, suffix):
        """Whole ones only, and ended by a newline only."""
        path = self.file(suffix)
        return path.read_text().split("\n")[:-1] if path.exists() else []

    def wait_for_line(self, n):
        """The n-th of FULL."""
        wait_until(lambda: len(self.lines("jsonl")) >= n)

    def wait_to_say(self, words):
        return wait_until(lambda: any(words in line for line in self.said()) and self.said())

    def wait_for_copy_of(self, other):
        wait_until(lambda: [self.lines("jsonl"), self.lines("log")] == [other.lines("jsonl"), other.lines("log")])

    def has_logged(self, *bodies):
        wait_until(lambda: len(self.log()) >= len(bodies))
        assert [message["msg"] for message in self.messages()] == list(bodies)
        assert [line[1] for line in self.log()] == [message["id"] for message in self.messages()]


@pytest.fixture
def listen(tmp_path):
    """Makes listeners, and ends them."""
    made = []

    def make(url, home="home", **env):
        made.append(Listener(tmp_path / home, url, **env))
        return made[-1]

    yield make
    for listener in made:
        if listener.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(listener.process.pid, signal.SIGKILL)
            listener.process.wait(PATIENCE)


class Scripted(http.server.ThreadingHTTPServer):
    """Gives the n-th poll the n-th of its raw answers, and the last one to all after it; `polls` is what was asked."""

    daemon_threads = True

    def __init__(self, *answers):
        super().__init__(("127.0.0.1", 0), ScriptedAnswer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.answers, self.polls = answers, []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def polled(self, times):
        """The queries of the polls so far, at least `times`."""
        wait_until(lambda: len(self.polls) >= times)
        return self.polls


class ScriptedAnswer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path, server = urlsplit(self.path), self.server
        query = {word: values[0] for word, values in parse_qs(path.query).items()}
        answer = server.answers[min(len(server.polls), len(server.answers) - 1)]
        server.polls.append({"path": path.path, "agent": self.headers["User-Agent"], **query})
        if callable(answer):
            answer(self)
        else:
            self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def scripted():
    made = []

    def make(*answers):
        made.append(Scripted(*answers))
        return made[-1]

    yield make
    for server in made:
        server.shutdown()
        server.server_close()


def answer(body, status="200 OK", *headers, length=None):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {length or len(body)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def message(tick, **fields):
    usual = {"ts": tick / 1e6, "id": f"{tick:x}", "from": "dell", "to": "spark", "channel": "default", "msg": "hi"}
    return {**usual, **fields}


def mail(*messages, bus="bus-1", now=TICK / 1e6, **fields):
    return answer({"messages": messages, "now": now, "bus": bus, **fields})


NO_MAIL = mail()


def held(request):
    """The poll is parked until its listener ends: one that has shown what a test wants takes no CPU."""
    request.rfile.read(1)


def path_with(tmp_path, tools):
    """A PATH where only these tools are."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for tool in tools.split():
        (directory / tool).symlink_to(shutil.which(tool))
    return str(directory)
