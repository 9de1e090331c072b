"""A client of the whole contract: a key for every send, repeats dropped by id, cursors kept as the bus wrote them."""
import http.client
import json
import time
import urllib.request
from urllib.parse import quote, urlencode

TIMEOUT = 35  # s; longer than the 25 that a poll is held
PAUSE = 0.02  # s after an error
ERRORS = (OSError, http.client.HTTPException, ValueError)  # no answer, or a status but 200; half of one; no JSON


def receive(url, name, forgetful=False, pause=time.sleep, timeout=TIMEOUT):
    """Each message for `name` once, as they arrive, for ever; or until `pause`, called on errors, says true.

    It starts where the bus says that this name was last, and after an error goes on from the cursor that it kept. A
    forgetful one has kept the ids alone, and asks the bus again.
    """
    since, seen = "last", set()
    while True:
        query = urlencode({"to": name, "since": since, "block": "true"})
        try:
            with urllib.request.urlopen(f"{url}/recv?{query}", timeout=timeout) as response:
                answer = json.load(response, parse_float=str)
        except ERRORS:
            if pause(PAUSE):
                return
            since = "last" if forgetful else since
            continue
        for message in answer["messages"]:
            if message["id"] not in seen:
                seen.add(message["id"])
                yield message
        since = answer["now"]


def keyed(sender, to, msg):
    """The body of a send; its key is how the text begins, which a sender uses once."""
    return json.dumps({"from": sender, "to": to, "msg": msg, "key": quote(msg)[:128]}).encode()


def send(url, sender, to, msg, pause=time.sleep, timeout=TIMEOUT, body=keyed):
    """The ts of the message, which is sent under one key until the bus acknowledges it."""
    while True:
        try:
            with urllib.request.urlopen(f"{url}/send", body(sender, to, msg), timeout=timeout) as response:
                return json.load(response)["ts"]
        except ERRORS:
            if pause(PAUSE):
                return None
