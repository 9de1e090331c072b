"""A client of the whole contract: a key for every send, repeats dropped by id, cursors kept as the bus wrote them."""
import http.client
import json
import time
import urllib.request
from urllib.parse import urlencode

TIMEOUT = 35  # s; longer than the 25 that a poll is held
PAUSE = 0.02  # s after an error
ERRORS = (OSError, http.client.HTTPException, ValueError)


def receive(url, name, words=False, pause=time.sleep):
    """Each message for `name` once, as they arrive, for ever; or until `pause`, called on errors, says true.

    It starts at `last`, the bus's memory of it. After an error it goes on from the cursor it kept itself; with `words`
    it has kept none, as if it had been killed, and relies on the bus again.
    """
    since, seen = "last", set()
    while True:
        query = urlencode({"to": name, "since": since, "block": "true"})
        try:
            with urllib.request.urlopen(f"{url}/recv?{query}", timeout=TIMEOUT) as response:
                answer = json.load(response, parse_float=str)
        except ERRORS:
            if pause(PAUSE):
                return
            since = "last" if words else since
            continue
        for message in answer["messages"]:
            if message["id"] not in seen:
                seen.add(message["id"])
                yield message
        since = answer["now"]


def send(url, sender, to, msg, pause=time.sleep):
    """The ts of the message, which is sent under one key until the bus acknowledges it, or `pause` says to give up."""
    body = json.dumps({"from": sender, "to": to, "msg": msg, "key": f"key-of-{msg}".replace(" ", "-")}).encode()
    while True:
        try:
            with urllib.request.urlopen(f"{url}/send", body, timeout=TIMEOUT) as response:
                return json.load(response)["ts"]
        except ERRORS:
            if pause(PAUSE):
                return None
