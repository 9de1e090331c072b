"""A model that does what a script says: a server on loopback that the real Claude Code takes for the Messages API.

    with ScriptedModel(lambda request: [words("done")]) as model:
        subprocess.run([claude, "-p", "go"], env={**os.environ, "ANTHROPIC_BASE_URL": model.url, ...})
    model.requests[0]["messages"]

A script is a function from a request (the JSON of the client) to the content blocks of the answer, made by `words` and
`tool_use`; `news(request)` is what the request tells that the one before did not. The script is called for one request
at a time, and only for those of the conversation: a request without tools (a title, a summary) is answered "ok".
Whoever starts a script that fails reads why in `model.failures`; the client is told to end its turn.
"""

import http.server
import itertools
import json
import threading
import traceback

NUMBERS = itertools.count(1)


def words(text):
    return {"type": "text", "text": text}


def tool_use(name, **arguments):
    return {"type": "tool_use", "id": f"toolu_{next(NUMBERS):08d}", "name": name, "input": arguments}


def blocks(message):
    """The content of a message as a list of blocks; a string is one of text."""
    content = message.get("content", [])
    return [words(content)] if isinstance(content, str) else content


def text_of(block):
    """What a model reads in a block: its text, or that of a tool's result."""
    if block.get("type") == "tool_result":
        return "\n".join(map(text_of, blocks(block)))
    return block.get("text", "")


def news(request):
    """What the client added since the model spoke last, as one text: prompts, results of tools, notifications."""
    new = []
    for message in reversed(request.get("messages", [])):
        if message.get("role") == "assistant":
            break
        new.append("\n".join(map(text_of, blocks(message))))
    return "\n".join(reversed(new))


def events(model, content):
    """The server-sent events of one answer, as (name, data)."""
    usage = {"input_tokens": 1, "output_tokens": 1}
    message = {"id": f"msg_{next(NUMBERS):08d}", "type": "message", "role": "assistant", "model": model, "content": []}
    ends = {"stop_reason": None, "stop_sequence": None}
    yield "message_start", {"message": {**message, **ends, "usage": usage}}
    for index, block in enumerate(content):
        if block["type"] == "tool_use":
            empty, whole = {**block, "input": {}}, json.dumps(block["input"])
            half = len(whole) // 2  # a client must put the pieces together
            deltas = [{"type": "input_json_delta", "partial_json": part} for part in (whole[:half], whole[half:])]
        else:
            empty, deltas = words(""), [{"type": "text_delta", "text": block["text"]}]
        yield "content_block_start", {"index": index, "content_block": empty}
        for delta in deltas:
            yield "content_block_delta", {"index": index, "delta": delta}
        yield "content_block_stop", {"index": index}
    reason = "tool_use" if any(block["type"] == "tool_use" for block in content) else "end_turn"
    yield "message_delta", {"delta": {**ends, "stop_reason": reason}, "usage": usage}
    yield "message_stop", {}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        self.answer(b"{}", "application/json")

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path.partition("?")[0] != "/v1/messages":
            return self.answer(b"{}", "application/json")
        request = json.loads(body)
        content = self.server.model.next_blocks(request)
        stream = "".join(
            f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n"
            for name, data in events(request.get("model"), content)
        )
        return self.answer(stream.encode(), "text/event-stream")

    def answer(self, body, kind):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


class Listener(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """A client that hangs up is no error: it is ended at the end of each test."""


class ScriptedModel:
    """`requests` has those of the conversation in order, `others` the rest; both belong to the server's threads."""

    def __init__(self, script):
        self.script, self.requests, self.others, self.failures = script, [], [], []
        self.turn = threading.Lock()
        self.listener = Listener(("127.0.0.1", 0), Handler)
        self.listener.model = self
        self.url = f"http://127.0.0.1:{self.listener.server_port}"

    def next_blocks(self, request):
        if not request.get("tools"):
            self.others.append(request)
            return [words("ok")]
        with self.turn:
            self.requests.append(request)
            try:
                return self.script(request)
            except Exception:
                self.failures.append(traceback.format_exc())
                return [words("the script failed")]

    def heard(self):
        """All that the client ever told, in order, as one text."""
        return "\n".join(map(news, list(self.requests)))

    def __enter__(self):
        threading.Thread(target=self.listener.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.listener.shutdown()
        self.listener.server_close()
