"""Popen and run for programs of ours that begin warm: processes like others, for a fifth of the CPU time.

Python needs 110 ms to start a client, most of it to compile and to import. Here they are forked off a process that has
done this (forker.py). They have a pid, descriptors, an environment and signals of their own, and end as all processes
do. What a fresh interpreter does by itself (its options, its path, its locale) is not theirs: a command that needs it,
or that is no program of ours, is started by the real Popen.
"""
import atexit
import json
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys
import threading

from tests.kit.forker import LENGTH

FORKER = pathlib.Path(__file__).with_name("forker.py")
OPTIONS = {"-I", "-S", "-u", "-IS"}
TAKEN = {"env", "cwd", "stdin", "stdout", "stderr", "start_new_session", "text", "encoding", "errors", "bufsize",
         "universal_newlines"}  # fmt: skip
SITE = [folder for folder in sys.path if folder.endswith("-packages")]
SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE)


def coerced(env):
    """The environment as Python has it: with a locale of UTF-8, if it was that of C."""
    is_c = not env.get("LC_ALL") and (env.get("LC_CTYPE") or env.get("LANG") or "C") in ("C", "POSIX")
    return {**env, "LC_CTYPE": "C.UTF-8"} if is_c else env


def locale_of(env):
    return env.get("LC_ALL") or env.get("LC_CTYPE") or env.get("LANG")


def is_plain(env, isolated):
    """Would Python begin with these variables as the forker has begun?"""
    odd = {name for name in env if name.startswith(("PYTHON", "OPENSSL_", "LD_"))} - {"PYTHONUNBUFFERED"}
    return locale_of(env) == forker().locale and not (odd and not isolated)


class Ends(socket.socket):
    """What tells the exit status of a process. It is closed with its Popen, which nobody has to close."""

    def __del__(self):
        self.close()


class Forker:
    """The process that forks, for this one."""

    def __init__(self):
        self.owner, self.locale = os.getpid(), locale_of(coerced(os.environ))
        self.control, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-I", "-S", str(FORKER), str(its.fileno())]
        with its:
            self.process = subprocess.Popen(command, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL)
        atexit.register(self.close)

    def close(self):
        if os.getpid() == self.owner:
            self.control.close()
            self.process.wait()

    def fork(self, order, streams):
        """The pid of the new process, and the socket that tells its status."""
        ours, its = socket.socketpair()
        with its:
            socket.send_fds(self.control, [b"!"], [its.fileno(), *streams])
        data = json.dumps(order).encode()
        ours.sendall(LENGTH.pack(len(data)) + data)
        return LENGTH.unpack(ours.recv(LENGTH.size, socket.MSG_WAITALL))[0], Ends(fileno=ours.detach())


WARM = {}  # what may follow -c: the folder and the name of a module of ours that is imported before, or None
FORKERS, STARTING = [], threading.Lock()


def forker():
    """That of this process. It begins with the first use, with the environment of then."""
    with STARTING:
        if not FORKERS or FORKERS[-1].owner != os.getpid():
            FORKERS.append(Forker())
        return FORKERS[-1]


def order_of(command, options):
    """What the forker needs for a command; None if it is no program of ours, or wants more than a fork can do."""
    if isinstance(command, (str, bytes, os.PathLike)) or not hasattr(socket, "send_fds") or sys.platform != "linux":
        return None
    words = [os.fsdecode(word) for word in command]
    flags = set()
    while len(words) > 2 and words[1] in OPTIONS:
        flags |= set(words.pop(1)[1:])
    if words[0] != sys.executable or len(words) < 2 or not options.keys() <= TAKEN:
        return None
    order = {"path": None, "code": None, "imports": None, "argv": words[1:], "folders": [],
             "site": [] if "S" in flags else SITE, "isolated": "I" in flags,
             "session": options.get("start_new_session", False), "unbuffered": "u" in flags}  # fmt: skip
    if words[1] == "-c" and len(words) > 2 and words[2] in WARM:
        order |= {"code": words[2], "imports": WARM[words[2]], "argv": ["-c", *words[3:]]}
    elif words[1].endswith(".py") and os.path.isfile(words[1]):
        order["path"] = os.path.join(options.get("cwd") or "", words[1])
        order["folders"] = [] if "I" in flags else [os.path.dirname(os.path.realpath(order["path"]))]
    else:
        return None
    return order


class Popen(subprocess.Popen):
    """As subprocess.Popen. `ends` is the socket that tells the exit status, if the process is a fork."""

    def __init__(self, command, **options):
        self.order, self.ends, self.taking = order_of(command, options), None, threading.Lock()
        super().__init__(command, **options)

    def _execute_child(self, *given):
        cwd, env, pipes = given[5], given[6], given[10:16]  # of each stream: the end for reading, that for writing
        env = {os.fsdecode(name): os.fsdecode(value) for name, value in (os.environ if env is None else env).items()}
        env = coerced(env)
        if self.order is None or not is_plain(env, self.order["isolated"]):
            return super()._execute_child(*given)
        order = {
            **self.order,
            "env": env,
            "cwd": os.path.abspath(cwd or os.getcwd()),
            "ignored": [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN],
            "unbuffered": self.order["unbuffered"] or bool(env.get("PYTHONUNBUFFERED")) and not self.order["isolated"],
        }
        theirs = pipes[0], pipes[3], pipes[5]
        self.pid, self.ends = forker().fork(order, [number if end == -1 else end for number, end in enumerate(theirs)])
        self._child_created = True
        return self._close_pipe_fds(*pipes)

    def _internal_poll(self, *given, **more):
        if self.ends is None:
            return super()._internal_poll(*given, **more)
        self.take(0)
        return self.returncode

    def _wait(self, timeout):
        if self.ends is None:
            return super()._wait(timeout)
        if not self.take(timeout):
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def take(self, timeout):
        """Wait for the exit status: is it there?"""
        if self.returncode is None:
            came = select.poll()
            came.register(self.ends, select.POLLIN)
            if not came.poll(timeout and timeout * 1000):
                return False
            with self.taking:
                if self.returncode is None:
                    status = self.ends.recv(LENGTH.size, socket.MSG_WAITALL)
                    self.returncode = os.waitstatus_to_exitcode(*LENGTH.unpack(status))
        return True


def run(command, *, input=None, capture_output=False, timeout=None, check=False, **options):
    """As subprocess.run."""
    if input is not None:
        options["stdin"] = subprocess.PIPE
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, **options) as process:
        try:
            out, err = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    check and done.check_returncode()
    return done
