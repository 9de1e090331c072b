#!/usr/bin/env python3
"""Two agents on two hosts, with nothing between them but a wire: the bus is on one, and each has a token.

    sudo python3 examples/two_hosts.py

What it shows: the commands that two machines need, here in two network namespaces of this one, joined by a virtual
cable. On the first host: `invite`, and `bus_server.py --host ADDRESS`. On the second: the URL and its token, no more.
The wire is ours, so plain http is allowed (AGENT_BUS_PLAIN_HTTP); on any other use TLS, or a tunnel (docs/deploy.md).

It needs Linux, root and `ip` (iproute2), and ends with 77 where these are missing. It cleans up after itself.
"""
import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

# Python 3.8 prints this text. Older ones show the line in a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "two_hosts.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)
ROOT = pathlib.Path(__file__).resolve().parent.parent
ADDRESSES = "192.0.2.1", "192.0.2.2"  # of a net that is for examples, and that nobody has


def ip(*arguments, check=True):
    return subprocess.run(["ip", *arguments], capture_output=True, check=check).returncode


class Host:
    """A network namespace: a host as far as the network is concerned."""

    def __init__(self, name, address, directory):
        self.name, self.address = name, address
        self.env = {"PATH": os.environ["PATH"], "AGENT_BUS_STATE_DIR": f"{directory}/{name}"}
        self.env["AGENT_BUS_PLAIN_HTTP"] = "1"
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")

    def plug(self, cable):
        ip("link", "set", cable, "netns", self.name)
        ip("-n", self.name, "addr", "add", f"{self.address}/24", "dev", cable)
        ip("-n", self.name, "link", "set", cable, "up")

    def start(self, program, *arguments):
        command = ["ip", "netns", "exec", self.name, sys.executable, str(ROOT / program), *arguments]
        return subprocess.Popen(command, env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, program, *arguments, text=""):
        return self.start(program, *arguments).communicate(text)[0]


def talk(here, there, directory):
    """A question from one host, and the answer from the other."""
    db = f"{directory}/bus.db"
    for host, name in ((here, "spark"), (there, "dell")):
        invitation = here.run("bus_server.py", "invite", name, "--db", db)
        host.env["AGENT_BUS_TOKEN"] = re.search(r"abt_[0-9a-f]{8}_[\w-]{43}", invitation)[0]
    server = here.start("bus_server.py", "--host", here.address, "--port", "8080", "--db", db)
    try:
        url = server.stdout.readline().split()[-1]
        here.env["AGENT_BUS_URL"] = there.env["AGENT_BUS_URL"] = url
        asking = here.start("bus_send.py", "dell", "--ask", "--timeout", "30")
        asking.stdin.write("Is T1 done?")
        asking.stdin.close()
        asking.stdin = None
        block = there.run("bus_recv.py", "dell", "--once")
        print(block, end="")
        there.run("bus_send.py", "--reply-to", re.search("id=([0-9a-f]+)", block)[1], text="It is, on the other host.")
        answer = asking.communicate()[0]
        print(answer, end="")
        return 0 if answer else 1
    finally:
        server.terminate()
        server.communicate()


def main():
    argparse.ArgumentParser(description="Two agents on two hosts, which are network namespaces, talk.").parse_args()
    if sys.platform != "linux" or os.geteuid() or not shutil.which("ip"):
        print("two hosts need Linux, root and ip")
        return 77
    run = os.urandom(2).hex()
    names, cable = [f"bus-{run}-1", f"bus-{run}-2"], (f"bus{run}a", f"bus{run}b")
    with tempfile.TemporaryDirectory() as directory:
        try:
            if ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1], check=False):
                print("this kernel gives us no virtual cable")
                return 77
            hosts = [Host(name, address, directory) for name, address in zip(names, ADDRESSES)]
            for host, end in zip(hosts, cable):
                host.plug(end)
            return talk(*hosts, directory)
        finally:
            for name in names:
                ip("netns", "del", name, check=False)
            ip("link", "del", cable[0], check=False)  # unless it has gone with a namespace


if __name__ == "__main__":
    sys.exit(main())
