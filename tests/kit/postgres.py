"""A PostgreSQL of the test's own: one server in a folder of its own, which listens on a socket there only."""
import contextlib
import glob
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile

from tests.kit.processes import PATIENCE, wait_until

PROGRAMS = sorted(glob.glob("/usr/lib/postgresql/*/bin")) or [os.path.dirname(shutil.which("initdb") or "")]


def reason_to_skip():
    if not os.path.exists(f"{PROGRAMS[-1]}/initdb"):
        return "PostgreSQL's initdb is not installed"
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "psycopg is not installed"
    return None


def runs(pid):
    """A process that has ended, and for which nobody has waited, has no command line."""
    with contextlib.suppress(OSError):
        return bool(pathlib.Path(f"/proc/{pid}/cmdline").read_bytes())
    return False


class Postgres:
    """PostgreSQL does not run as root; then it runs as the user that its package has made."""

    def __init__(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="agent-bus-pg-"))
        self.user = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
        if self.user:
            shutil.chown(self.folder, "postgres", "postgres")
        self.data, self.url = self.folder / "data", f"postgresql://postgres@/postgres?host={self.folder}"
        self.run("initdb", "-D", self.data, "-U", "postgres", "-A", "trust", "--no-sync", "--no-instructions")

    def run(self, program, *arguments):
        subprocess.run(
            [f"{PROGRAMS[-1]}/{program}", *arguments], check=True, capture_output=True, cwd=self.folder, **self.user
        )

    def start(self, **settings):
        settings = {"listen_addresses": "", "unix_socket_directories": self.folder, **settings}
        options = [f"--{name}={value}" for name, value in settings.items()]
        command = [f"{PROGRAMS[-1]}/postgres", "-D", self.data, *options]
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, **self.user)
        wait_until(self.is_ready)
        return self

    def is_ready(self):
        import psycopg

        with contextlib.suppress(psycopg.Error), psycopg.connect(self.url):
            return True
        assert self.process.poll() is None, (self.folder / "log").read_text()
        return False

    def ask(self, statement):
        import psycopg

        with psycopg.connect(self.url, autocommit=True) as connection:
            found = connection.execute(statement)
            return found.fetchall() if found.description else []

    def processes(self):
        children = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [self.process.pid, *map(int, children)]

    @contextlib.contextmanager
    def frozen(self):
        """Its processes stand still, and the kernel goes on to take what is sent to them."""
        stopped = self.processes()
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)

    @contextlib.contextmanager
    def second(self):
        """A machine named `second` that has what it is sent: a commit can wait for it."""
        (self.folder / "second").mkdir(exist_ok=True)
        if self.user:
            shutil.chown(self.folder / "second", "postgres", "postgres")
        named = f"host={self.folder} user=postgres application_name=second"
        command = [f"{PROGRAMS[-1]}/pg_receivewal", "-D", self.folder / "second", "--synchronous", "-d", named]
        with open(self.folder / "log", "ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, **self.user)
        try:
            yield
        finally:
            process.kill()
            process.wait(PATIENCE)

    def crash(self):
        """kill -9 of the server; its other processes end when they notice, and before that it cannot start again."""
        _, *others = self.processes()
        self.process.kill()
        self.process.wait(PATIENCE)
        wait_until(lambda: not any(map(runs, others)))

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        self.process.wait(PATIENCE)

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
