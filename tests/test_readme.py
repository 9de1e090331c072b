"""Every line of README's first two sections, pasted into bash and into zsh by a user with an empty home."""
import ast
import contextlib
import os
import re
import shutil
import signal
import sqlite3
import subprocess

import pytest

from tests.kit.processes import PATIENCE, ROOT, free_port, wait_until

README = (ROOT / "README.md").read_text()
TITLES = "The first minute", "A second machine"
FIRST, SECOND = (README.split(f"\n## {title}\n")[1].split("\n## ")[0] for title in TITLES)
SHELLS = [name for name in ("bash", "zsh") if shutil.which(name)]


def lines(text):
    return [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]


class User:
    """An interactive shell for each line, as somebody has who pastes it; the bus has a port that is free here."""

    def __init__(self, shell, home):
        self.port = free_port()
        self.shell = [shutil.which(shell), "-f" if shell == "zsh" else "--norc", "-i", "-c"]
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "PYENV_ROOT") if name in os.environ}
        url = f"http://127.0.0.1:{self.port}"
        self.env = {**kept, "HOME": str(home), "AGENT_BUS_URL": url, "PYTHONUNBUFFERED": "1"}
        self.seen = home / "seen"
        self.running = []

    def pastes(self, line):
        """Exit code, stdout and stderr."""
        line = line.replace("8080", str(self.port))
        done = subprocess.run([*self.shell, line], env=self.env, cwd=ROOT, capture_output=True, text=True,
                              timeout=PATIENCE, stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    def leaves_running(self, line):
        line = f"{line} --port {self.port}" if line.endswith("bus_server.py") else line
        with self.seen.open("ab") as out:
            self.running.append(subprocess.Popen([*self.shell, line], env=self.env, cwd=ROOT, stdout=out, stderr=out,
                                                 stdin=subprocess.DEVNULL, start_new_session=True))  # fmt: skip

    def sees(self, text):
        return wait_until(lambda: text in self.seen.read_text())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.running:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(PATIENCE)


@pytest.mark.parametrize("shell", SHELLS)
def test_every_line_of_the_first_minute_does_what_readme_says(tmp_path, shell):
    serve, _ = lines(README.split("\n## ")[0])
    receive, send, *others = lines(FIRST)
    with User(shell, tmp_path) as user:
        user.leaves_running(serve)
        user.sees(f"http://127.0.0.1:{user.port}")
        user.leaves_running(receive)
        user.sees("listening as bob on ")
        code, out, err = user.pastes(send)
        assert code == 0, (out, err)
        user.sees("| T1 done, 4/4 are honeypots\n---\n")
        assert len(others) == 5
        for line in others:
            code, out, err = user.pastes(line)
            assert code == 0, (line, out, err)
            if "since=last" in line:
                since = re.search(r"Bus-Now: (\S+)", out)[1]
                assert user.pastes(line.replace("since=last", f"since={since}"))[1].endswith("\n\n")


@pytest.mark.parametrize("shell", SHELLS)
def test_the_line_of_readme_looks_into_the_database_that_the_bus_has(tmp_path, shell):
    """Case 29. sqlite3 makes a new, empty file of a path that does not exist."""
    serve, _ = lines(README.split("\n## ")[0])
    [(path, query)] = re.findall(r"`sqlite3 (\S+) '([^']+)'`", README)
    with User(shell, tmp_path) as user:
        user.leaves_running(serve)
        user.sees(f"messages are in {tmp_path}{path.removeprefix('~')}\n")
        assert user.pastes(lines(FIRST)[1])[0] == 0
        code, out, _ = user.pastes(f"printf %s {path}")
        with contextlib.closing(sqlite3.connect(f"file:{out}?mode=ro", uri=True)) as database:
            assert code == 0 and len(database.execute(query).fetchall()) == 1


@pytest.mark.parametrize("shell", SHELLS)
def test_the_invitation_of_readme_is_one_line_and_a_token(tmp_path, shell):
    serve, _ = lines(README.split("\n## ")[0])
    invite, tunnel = lines(SECOND)
    assert tunnel.startswith("ssh -N ")  # it needs a host
    with User(shell, tmp_path) as user:
        user.leaves_running(serve)
        user.sees(f"http://127.0.0.1:{user.port}")
        code, out, err = user.pastes(invite)
        assert code == 0 and "bus_join.py" in out and re.search("abt_[0-9a-f]{8}_", out), (out, err)
        for command in re.findall(r"`(python3 bus_server.py .*?)`", FIRST + SECOND):
            assert user.pastes(command)[0] == 0, command


def test_every_python_of_a_document_is_there():
    """Debian and macOS have python3 and no python; a clone has one in its .venv."""
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    wrong = re.compile(r"(?:^|`)python [-\w].*", re.MULTILINE)
    assert not [(path.name, line) for path in documents for line in wrong.findall(path.read_text())]


def test_no_line_of_readme_has_a_comment():
    """An interactive zsh takes it for arguments."""
    assert not [line for line in lines(README) if "#" in line]


def test_no_line_that_a_user_may_copy_has_a_comment():
    """Nor has one in another document, or at the beginning of a program."""
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    found = [(path.name, line) for path in documents for line in lines(path.read_text()) if re.search(r"\s#\s", line)]
    for program in [*ROOT.glob("tools/*.py"), *ROOT.glob("examples/*.py")]:
        text = ast.get_docstring(ast.parse(program.read_text())) or ""
        found += [(program.name, line) for line in text.splitlines() if re.match(r"    .*\s#\s", line)]
    assert not found
