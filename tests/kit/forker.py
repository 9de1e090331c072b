"""The process that forked.py forks programs off: it has imported what they import, and keeps their compiled forms.

It runs as `python -I -S forker.py DESCRIPTOR`. Each packet on that socket brings four descriptors: a socket that brings
the order and takes the pid and the exit status, and stdin, stdout and stderr of the program. Its forks leave this file
and run the program as `__main__`, so it ends as Python ends a program.
"""
import atexit
import base64  # noqa: F401
import contextlib
import datetime  # noqa: F401
import decimal  # noqa: F401
import email.utils  # noqa: F401
import encodings.idna  # noqa: F401
import gc
import getpass  # noqa: F401
import glob
import hashlib  # noqa: F401
import http.client  # noqa: F401
import importlib
import io
import json
import os
import random  # noqa: F401
import selectors
import shutil  # noqa: F401
import signal
import socket
import ssl  # noqa: F401
import struct
import subprocess  # noqa: F401
import sys
import tempfile  # noqa: F401
import textwrap  # noqa: F401
import threading
import time
import types

LENGTH = struct.Struct("!I")
CODES = {}  # what runs: its compiled form, and the modules that it keeps
COMPILED = {}  # by its text


def code_of(order):
    """The compiled form of a program, and of the text after -c the modules that it imports, which are ours."""
    path, text = order["path"], order["code"]
    key = (path, text, path and os.stat(path).st_mtime_ns)
    if key not in CODES:
        kept = {}
        if order["imports"]:
            folder, name = order["imports"]
            sys.path.insert(0, folder)
            kept[name] = importlib.import_module(name)
            remember_extensions(kept[name])
            sys.path.remove(folder)
            del sys.modules[name]
        if text is None:
            with open(path, "rb") as file:
                text = file.read()
        if text not in COMPILED:
            COMPILED[text] = compile(text, path or "<string>", "exec")
        CODES[key] = placed(COMPILED[text], path or "<string>"), kept
        gc.collect()
        gc.freeze()  # so that the forks leave the pages alone
    return CODES[key]


def placed(code, path):
    """A copy of a program, in another folder: with the bus, to compile it anew takes as long as all else."""
    if code.co_filename == path:
        return code
    constants = (placed(each, path) if isinstance(each, types.CodeType) else each for each in code.co_consts)
    return code.replace(co_filename=path, co_consts=tuple(constants))


def remember_extensions(bus_server):
    """A bus that is forked off loads what lies in bus_extensions/ as it is here, where it was loaded once."""
    module_at, made = bus_server.module_at, {}
    folder = os.path.join(os.path.dirname(bus_server.__file__), "bus_extensions", "")

    def ours():
        files = {name: getattr(each, "__file__", None) or "" for name, each in sys.modules.items()}
        return {name for name, file in files.items() if file.startswith(folder)}

    def from_here(file, name):
        if (str(file), name) not in made:
            return module_at(file, name)
        sys.modules.update(made[str(file), name])
        return sys.modules[name]

    there = {name: sys.modules[name] for name in ours()}  # a test may have imported some
    for path in sorted(glob.glob(f"{folder}[a-z]*.py")):
        name, before = f"bus_extensions.{os.path.basename(path)[:-3]}", ours()
        module_at(path, name)
        made[path, name] = {each: sys.modules[each] for each in {name} | (ours() - before)}
    for name in ours():
        del sys.modules[name]
    sys.modules.update(there)
    bus_server.module_at = from_here


def received(connection):
    """An order: JSON, after its length."""
    data = b""
    while len(data) < LENGTH.size or len(data) < LENGTH.size + LENGTH.unpack_from(data)[0]:
        part = connection.recv(1 << 20)
        if not part:
            raise EOFError
        data += part
    return json.loads(data[LENGTH.size :])


def stream(descriptor, mode, unbuffered):
    """sys.stdin, sys.stdout or sys.stderr, as Python makes it; None if the descriptor is closed."""
    try:
        raw = open(descriptor, mode, buffering=0, closefd=False)  # noqa: SIM115
    except OSError:
        return None
    is_terminal = raw.isatty()
    binary = io.BufferedReader(raw) if "r" in mode else raw if unbuffered else io.BufferedWriter(raw)
    errors = "backslashreplace" if descriptor == 2 else USUAL.errors
    line = descriptor == 2 or is_terminal
    made = io.TextIOWrapper(binary, USUAL.encoding, errors, line_buffering=line, write_through=unbuffered)
    made.mode = mode[0]
    return made


def become(order, streams):
    """In the fork: take the place of a process that was just started."""
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number, inheritable=True)
    os.closerange(3, 4096)
    if order["session"]:
        os.setsid()
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    time.tzset()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in order["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    sys.stdin, sys.stdout = stream(0, "rb", False), stream(1, "wb", order["unbuffered"])
    sys.stderr = stream(2, "wb", order["unbuffered"])
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    sys.argv[:] = order["argv"]
    sys.path[:0] = order["folders"]
    sys.path += order["site"]


class Forker:
    def __init__(self, control):
        self.control, self.running = control, {}  # pid: the socket that takes its status
        self.selector = selectors.DefaultSelector()
        self.awake, wakes = socket.socketpair()
        for each in (self.awake, wakes):
            each.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
        self.wakes = wakes
        self.selector.register(control, selectors.EVENT_READ)
        self.selector.register(self.awake, selectors.EVENT_READ)

    def next_program(self):
        """Fork for each order. Returns in the forks only: what to run, and what it is called."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.awake:
                    self.reap()
                elif run := self.take():
                    return run

    def reap(self):
        self.awake.recv(1 << 16)
        while self.running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            with self.running.pop(pid) as connection, contextlib.suppress(OSError):  # if nobody waits for it any more
                connection.sendall(LENGTH.pack(status))

    def take(self):
        data, descriptors, *_ = socket.recv_fds(self.control, 1, 4)
        if not data:
            os._exit(0)
        connection, streams = socket.socket(fileno=descriptors[0]), descriptors[1:]
        order = received(connection)
        code, kept = code_of(order)
        pid = os.fork()
        if not pid:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for each in (self.control, self.awake, self.wakes, connection, *self.running.values()):
                each.detach()
            become(order, streams)
            sys.modules.update(kept)
            return code, order["path"]
        for descriptor in streams:
            os.close(descriptor)
        self.running[pid] = connection
        connection.sendall(LENGTH.pack(pid))
        return None


def ended(code, names):
    """Run the program: its exit code. Whatever it left is freed here, as its frames are."""
    try:
        exec(code, names)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 255
        print(error.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    else:
        return 0
    return 1


def finish(status):
    """End as Python ends, except that it does not take apart each module: this would be most of the work."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for each in (sys.stdout, sys.stderr):
        try:
            each is None or each.closed or each.flush()
        except (OSError, ValueError) as error:
            each is sys.stderr or print(f"Exception ignored in: {each!r}\n{error!r}", file=sys.stderr, flush=True)
            status = 120
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    USUAL = sys.stdin
    code, path = Forker(socket.socket(fileno=int(sys.argv[1]))).next_program()
    own = sys.modules["__main__"]  # kept, or its names would go
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if path:
        main.__file__ = path
    finish(ended(code, main.__dict__))
