"""Opening and connecting: from the options of bus_server.py to a front of a ledger that has caught up.

bus_server.py loads this file if it is started with --ledger, and only then.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sqlite3
from typing import NoReturn
from urllib.parse import urlsplit

import bus_server
from bus_server import Bus, Refused, Request, Unusable

from . import Ledger, Unknown, tokens
from .copies import Copies
from .front import LOOK, Front
from .mirror import Differs, Mirror
from .recall import Recalls

ENGINES = {"postgresql": "postgres", "postgres": "postgres"}  # the scheme of the URL: the file in this folder


def open_state(options: argparse.Namespace) -> Mirror:
    """The copy of the ledger at --db, up to date. Unusable, if the ledger cannot be reached or used."""
    if options.db == ":memory:":
        raise Unusable("with --ledger, --db must be a file: a front begins again where its file ends")
    return follow(options, connect(options.ledger, options.ledger_single))


def connect(where: str, single: bool) -> Ledger:
    """The ledger at a URL. `single`: it may keep its entries on one machine."""
    url = urlsplit(where)
    if url.scheme not in ENGINES:
        wrong = f"not begin with {url.scheme}:" if url.scheme else "this has no ://"
        raise Unusable(f"--ledger must be a URL like postgresql://HOST/DATABASE, and {wrong}")
    if url.password and where != os.environ.get("AGENT_BUS_LEDGER"):
        raise Unusable("--ledger has a password, which every user of this machine can see: set AGENT_BUS_LEDGER to it")
    try:
        engine = importlib.import_module(f"{__package__}.{ENGINES[url.scheme]}")
    except ImportError as error:
        raise Unusable(f"--ledger needs psycopg ({error}): pip install 'agent-bus[postgres]'") from None
    ledger: Ledger = engine.connect(where, single)
    return ledger


def follow(options: argparse.Namespace, ledger: Ledger) -> Mirror:
    mirror = Mirror(options.db, ledger)
    try:
        mirror.add_all_tables(options.extensions)
        mirror.check_ledger()
        mirror.catch_up()
        tokens.write(bus_server.Tokens(options.db), list(tokens.stored(mirror.writing).values()))
    except Unknown as error:
        raise Unusable(f"cannot reach the ledger: {error}") from None
    except Differs as error:
        raise Unusable(str(error)) from None
    except (sqlite3.Error, OSError) as error:
        raise Unusable(f"cannot use the database {options.db}: {error}") from None
    return mirror


def start(bus: Bus, options: argparse.Namespace) -> None:
    """Make this bus a front, when its extensions have started."""
    assert isinstance(bus.state, Mirror)
    bus.ledger = front = Front(bus, bus.state)
    Copies(front)
    common = tokens.Common(bus)
    front.elsewhere[tokens.Grants.kind] = common.came
    front.first = common.first
    bus.loop.every(LOOK, common.look)
    replies = options.extensions.get("replies")
    if replies:
        Recalls(front, replies.was_fetched, replies.TOO_LATE)
    if not getattr(options, "files_dir", None):  # an option of files.py
        for method, path in list(bus.routes):
            if path == "/blob/":
                bus.route(method, path, no_files, sink=no_files)


def no_files(request: Request) -> NoReturn:
    """Each front would have only its own."""
    raise Refused(501, "this bus of several fronts has no files: its operator can give --files-dir to all fronts")
