"""A shell on a terminal, as a person has it, and what a whole machine shows of it meanwhile."""
import contextlib
import os
import pathlib
import pty
import shutil
import subprocess
import sys
import threading

from tests.kit.processes import PATIENCE, wait_until
from tests.kit.serving import Beside

PROMPT = "ready> "
RC = f"PS1='{PROMPT}'\nHISTFILE=~/.history\nHISTSIZE=100\nSAVEHIST=100\nHISTFILESIZE=100\n"


def machine(place, *programs, python=sys.executable):
    """A folder to be the PATH, with these programs and python3 in it, and nothing else."""
    place = pathlib.Path(place)
    place.mkdir()
    for program in programs:
        (place / program).symlink_to(shutil.which(program))
    if python:
        (place / "python3").symlink_to(os.path.realpath(python))
    return str(place)


class Terminal:
    """`prefix` is a command that runs the shell, as `ip netns exec NAME`. `screen` is all that was shown."""

    def __init__(self, shell, home, path, prefix=(), **env):
        self.home, self.screen = pathlib.Path(home), ""
        self.home.mkdir(exist_ok=True)
        for rc in (".bashrc", ".zshrc"):
            (self.home / rc).write_text(RC)
        self.ours, theirs = pty.openpty()
        env = {"HOME": str(home), "PATH": path, "TERM": "dumb", **env}
        command = [shutil.which("setsid"), "-c", *prefix, shutil.which(shell), "-i"]  # -c: with a controlling terminal
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, cwd=home)
        os.close(theirs)
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        with contextlib.suppress(OSError):  # the shell has ended
            while data := os.read(self.ours, 65536):
                self.screen += data.decode(errors="replace")

    def __enter__(self):
        self.wait_for(PROMPT)
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        os.close(self.ours)

    def wait_for(self, *texts):
        """Wait until one of these is shown after what was typed last; what is shown since."""
        wait_until(lambda: any(text in self.screen for text in texts))
        return self.screen

    def type(self, line):
        """The screen is empty then, but for what follows."""
        self.screen = ""
        os.write(self.ours, line.encode() + b"\n")

    def run(self, line):
        """Type a line, and wait for the next prompt; what was shown."""
        self.type(line)
        return self.wait_for(PROMPT)

    def leave(self):
        """End the shell; its history."""
        self.type("exit")
        self.process.wait(PATIENCE)
        return (self.home / ".history").read_text()


class Watch(Beside):
    """Looks at the arguments and the environments of all processes, again and again, for a text."""

    def __init__(self, text):
        super().__init__()
        self.text, self.seen, self.looks = text.encode(), [], 0

    def run(self):
        while not self.over.wait(0.02):  # s; the others need the processor, too
            for process in pathlib.Path("/proc").glob("[0-9]*"):
                for file in ("cmdline", "environ"):
                    with contextlib.suppress(OSError):
                        if self.text in (process / file).read_bytes():
                            self.seen.append((process / "cmdline").read_bytes())
            self.looks += 1
