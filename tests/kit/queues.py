"""A queue and its workers, a question and its answer: what the tests of these extensions ask of a bus."""
import concurrent.futures
import contextlib
import http.client
import json

from tests.kit.peers import metric, run


def ask(bus, method, path, body=None, timeout=70):
    peer = http.client.HTTPConnection("127.0.0.1", bus.port, timeout=timeout)
    with contextlib.closing(peer):
        peer.request(method, path, body if body is None or isinstance(body, str) else json.dumps(body))
        answer = peer.getresponse()
        return answer.status, json.loads(answer.read())


def post(bus, path, **body):
    status, answer = ask(bus, "POST", path, body)
    assert status == 200, answer
    return answer


def send(bus, to="builds", msg="x", sender="alice", **members):
    return post(bus, "/send", **{"from": sender, "to": to, "msg": msg, **members})["id"]


def claim(bus, **members):
    return post(bus, "/claim", **{"to": "builds", "wait": 0, **members})["messages"]


def settle(bus, verb, job, **members):
    return ask(bus, "POST", f"/{verb}", {"id": job["id"], "lease": job["lease"], **members})[0]


def mail(bus, name):
    return [message["msg"] for message in ask(bus, "GET", f"/recv?to={name}&max=1000")[1]["messages"]]


def state(bus, ident, **query):
    path = f"/message/{ident}?" + "&".join(f"{field}={value}" for field, value in query.items())
    return ask(bus, "GET", path)[1]["state"]


@contextlib.contextmanager
def background(work, *arguments, **members):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        yield pool.submit(work, *arguments, **members)


def parked(bus):
    return metric(bus, "parked")


def prune(bus):
    """What the command said of everything that it may remove without being told to."""
    return run("prune", "--older", "0", "--db", bus.db)[1]
