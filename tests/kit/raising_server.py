"""bus_server.py in which every function can be made to raise, once, when a test says so. Nothing else is wrong with it.

A client of 127.0.0.1:$FAULT_PORT sends a line of JSON, and gets what it names in "of": "calls", how often each was
called; "places", under which roots; "fired", whether it has raised.
{"root", "place", "error"}: the next call of `place` under `root` raises `error`; null: any root, or nothing any more.
That is a thread of its own, so that no place is reached by asking.

A root is what the loop runs: a timer, a hook of housekeeping, an action of soon(), a socket that is ready, a signal. A
place is a function of the bus or of an extension. Both are found while they run, so a new one is found as well.
$PATCH is Python that runs first, for what a test wants to be otherwise: shorter times, slow disks. `loaded(name, do)`
in it calls do(module) when an extension was loaded.
"""
import functools
import json
import os
import pathlib
import socket
import sys
import threading
import types
from collections import Counter

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import bus_server  # noqa: E402

ERRORS = {
    "RuntimeError": lambda: RuntimeError("raised on purpose"),
    "RecursionError": lambda: RecursionError("raised on purpose"),
    "EMFILE": lambda: OSError(24, "Too many open files (raised on purpose)"),
}
here = threading.local()
calls: Counter = Counter()
places: dict = {}  # (root, place): in the order they were first seen
armed: list = []  # (root, place, error); at most one
fired: list = []


def root():
    return getattr(here, "root", None)


def watched(name, function):
    """The function, which can raise instead of doing anything."""

    @functools.wraps(function)
    def call(*arguments, **options):
        calls[name] += 1
        if root():
            places.setdefault((root(), name), None)
        if armed and armed[0][1] == name and armed[0][0] in (None, root()):
            fired[:] = [armed.pop()]
            raise ERRORS[fired[-1][2]]()
        return function(*arguments, **options)

    return call


def called(action):
    """What a function is called, a bound method or a partial too."""
    while isinstance(action, functools.partial):
        action = action.func
    return getattr(action, "__qualname__", type(action).__qualname__).replace("<locals>.", "")


def rooted(action, name=None):
    """The action, in which all that is called counts as called under it."""
    name = name or called(action)

    @functools.wraps(action)
    def run(*arguments):
        before, here.root = root(), name
        try:
            calls[f"root {name}"] += 1
            return action(*arguments)
        finally:
            here.root = before

    return run


QUIET = {"main", "run_server", "command_line", "load", "load_extensions", "module_at", "parts_of"}


def watch_module(module):
    for name, value in list(vars(module).items()):
        if getattr(value, "__module__", None) != module.__name__ or name in QUIET:
            continue
        if isinstance(value, types.FunctionType):
            setattr(module, name, watched(name, value))
        elif isinstance(value, type) and not issubclass(value, (tuple, BaseException)):
            for method, function in list(vars(value).items()):
                if isinstance(function, types.FunctionType) and not method.startswith("__"):
                    setattr(value, method, watched(f"{value.__name__}.{method}", function))


def watch_loop(loop):
    """What the loop runs are the roots. Called before all else is watched, so that these are never places."""
    later, every, soon, aside, on_signal = loop.later, loop.every, loop.soon, loop.aside, loop.on_signal
    loop.later = lambda self, patience, action: later(
        self, patience, action if called(action).startswith("Loop.") else rooted(action)
    )
    loop.every = lambda self, period, action: every(self, period, rooted(action))
    loop.soon = lambda self, action: soon(self, rooted(action))
    loop.on_signal = lambda self, number, action: on_signal(self, number, rooted(action))

    def outside(self, work):
        before, here.root = root(), None  # what the writer does is no turn
        try:
            aside(self, work)
        finally:
            here.root = before

    loop.aside = outside


def watch_ready(kind):
    ready = kind.ready

    def call(self, events):
        return rooted(ready, f"{kind.__name__}.ready")(self, events)

    kind.ready = call


def serve_faults():
    """In a thread."""
    with socket.create_server(("127.0.0.1", int(os.environ["FAULT_PORT"]))) as door:
        while True:
            peer, _ = door.accept()
            with peer, peer.makefile("rwb") as stream:
                wanted = json.loads(stream.readline())
                if "place" in wanted:
                    fired.clear()
                    armed[:] = [tuple(wanted[each] for each in ("root", "place", "error"))] if wanted["place"] else []
                known = {"calls": dict(calls), "places": list(places), "fired": len(fired)}
                stream.write(json.dumps({name: known[name] for name in wanted["of"]}).encode())


on_load: dict = {}
loaded = on_load.__setitem__
exec(os.environ.get("PATCH", ""))
watch_loop(bus_server.Loop)
for kind in (bus_server.Plain, bus_server.Listener):
    watch_ready(kind)
loop = bus_server.Loop
bus_server.Loop = None  # its own functions are no places: whoever guards is not guarded
load, module_at, start_extensions = bus_server.load, bus_server.module_at, bus_server.start_extensions


def part_watched(file, name):
    """A further file of an extension. What the next ones import from it is watched as well."""
    module = module_at(file, name)
    if name.startswith("_"):
        watch_module(module)
    return module


def load_watched(file):
    module = load(file)
    on_load.get(file.stem, lambda module: None)(module)
    watch_module(module)
    return module


def start_and_serve(bus, options):
    says = start_extensions(bus, options)
    bus.on_tidy[:] = [rooted(each) for each in bus.on_tidy]
    return says


watch_module(bus_server)
bus_server.Loop = loop
bus_server.load, bus_server.module_at, bus_server.start_extensions = load_watched, part_watched, start_and_serve
threading.Thread(target=serve_faults, daemon=True).start()
code = bus_server.main()
if "PLACES" in os.environ:
    pathlib.Path(os.environ["PLACES"]).write_text(json.dumps(list(places)))
sys.exit(code)
