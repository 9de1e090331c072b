"""A peer: a bus with Starlette and SQLite, one commit for each send, as a Python team would write it.

Its commits are not fsynced (synchronous=OFF): it is what that shape reaches when the disk is left out.
"""
import json
import os
import sqlite3
import time

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

database = sqlite3.connect(os.environ["DATABASE"], isolation_level=None)
database.executescript(
    "PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF;"
    "CREATE TABLE messages(id INTEGER PRIMARY KEY, ts REAL, channel TEXT, sender TEXT, recipient TEXT, msg TEXT)"
)


async def send(request: Request) -> JSONResponse:
    fields = json.loads(await request.body())
    channel, now = fields.get("channel", "default"), time.time()
    values = (now, channel, fields["from"], fields["to"], fields["msg"])
    database.execute("INSERT INTO messages(ts, channel, sender, recipient, msg) VALUES (?, ?, ?, ?, ?)", values)
    return JSONResponse({"ok": True, "ts": now, "channel": channel})


app = Starlette(routes=[Route("/send", send, methods=["POST"])])
