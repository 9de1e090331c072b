#!/usr/bin/env python3
"""A bus tells a person, by a webhook, that an agent has an urgent message. The webhook is a server of this example.

    python3 examples/pager.py

What it shows: a file of rules for `bus_server.py --notify`, what `--notify-dry-run` says of it, and what a webhook
gets: names and numbers, and never the text of a message. It starts a bus of its own.
"""
import argparse
import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading

# Python 3.8 prints this text. Older ones show the line in a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "pager.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))  # the clients, unless they are installed
import bus_send

ROOT = pathlib.Path(__file__).resolve().parent.parent
PATIENCE = 60  # s until we give up
heard, came = [], threading.Event()


class Webhook(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        heard.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.send_response(200)
        self.end_headers()
        came.set()

    def log_message(self, *_):
        pass


def serve(folder, *options):
    command = [sys.executable, str(ROOT / "bus_server.py"), "--port", "0", "--db", f"{folder}/bus.db", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def main():
    argparse.ArgumentParser(description="A webhook is told that an agent has an urgent message.").parse_args()
    with http.server.HTTPServer(("127.0.0.1", 0), Webhook) as webhook, tempfile.TemporaryDirectory() as folder:
        threading.Thread(target=webhook.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{webhook.server_port}"
        rule = {"rule": "page-me", "when": "urgent", "to": "lead", "template": "slack", "url": f"http://{host}/SECRET"}
        rules = pathlib.Path(folder, "rules.json")
        rules.touch(0o600)
        rules.write_text(json.dumps({"hosts": [host], "rules": [rule]}))
        dry = serve(folder, "--notify-dry-run", str(rules)).communicate()[0]
        print(dry.replace(host, "HOST"), end="", flush=True)
        bus = serve(folder, "--notify", str(rules))
        try:
            url = re.fullmatch("listening on (.*)\n", bus.stdout.readline())[1]
            bus_send.send("lead", "the disk of gb10 is full", sender="gb10", priority="high", url=url)
            came.wait(PATIENCE)
        finally:
            bus.terminate()
            bus.communicate()
        print("the webhook got:", *heard)
        webhook.shutdown()
    return 0 if heard else 1


if __name__ == "__main__":
    for variable in [name for name in os.environ if name.startswith("AGENT_BUS_")]:
        del os.environ[variable]  # it is a bus of its own
    try:
        sys.exit(main())
    except (bus_send.Refused, bus_send.Unreachable, ValueError, OSError) as error:
        sys.exit(f"pager: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
