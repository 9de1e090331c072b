"""The client that is already in the field: section "the first contract" of PROTOCOL.md to the letter, and nothing else.

It knows no id, key, tick or token, calculates with floats, and starts at its own clock, which may be wrong by `skew`.
"""
import http.client
import json
import time
import urllib.request
from urllib.parse import urlencode

TIMEOUT = 35  # s; longer than a bus of the first contract holds a poll (30)
PAUSE = 0.05  # s after an error; in the field it is a second or more
ERRORS = (OSError, http.client.HTTPException, ValueError)  # no answer, or a status but 200; half of one; no JSON


def opened(url, body=None):
    """An answer; with the certificates of this test: an opener that is kept has those of an earlier one."""
    return urllib.request.build_opener().open(url, body, TIMEOUT)


def receive(url, name, since=None, skew=0.0, pause=time.sleep):
    """The messages for `name` after `since`, as they come, for ever; or until `pause`, called on errors, says true."""
    since = time.time() + skew if since is None else since
    while True:
        query = urlencode({"to": name, "since": since, "block": "true", "max": 100})
        try:
            with opened(f"{url}/recv?{query}") as response:
                answer = json.load(response)
        except ERRORS:
            if pause(PAUSE):
                return
            continue
        yield from answer["messages"]
        since = max(since, *(message["ts"] for message in answer["messages"]), answer["now"])


def send(url, sender, to, msg, pause=time.sleep):
    """The ts of the message; None, after a `pause`, if the bus did not acknowledge it: then nobody knows."""
    body = json.dumps({"from": sender, "to": to, "msg": msg}).encode()
    try:
        with opened(f"{url}/send", body) as response:
            return json.load(response)["ts"]
    except ERRORS:
        pause(PAUSE)
        return None
