"""What `invite` says before it makes a token, what it asks, and which line it prints for which bus."""
import json
import os
import pathlib
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time

import pytest

from tests.core.test_identity import ask
from tests.kit import forked
from tests.kit.joining import TOKEN, invited, secure, tls, two_keys
from tests.kit.peers import command, set_expires
from tests.kit.processes import PATIENCE, ROOT, Server, no_settings, wait_until
from tests.kit.terminal import Terminal, machine
from tools import bus_invite


@pytest.fixture(autouse=True)
def no_bus_elsewhere(monkeypatch):
    no_settings(monkeypatch)
    monkeypatch.setenv("AGENT_BUS_URL", "http://127.0.0.1:9")


# ── Which bus, and what becomes of it ────────────────────────────────────────────────────────────────────────────────


def test_the_first_token_is_said_to_close_the_bus_and_how_to_open_it_again(tmp_path):
    with Server(tmp_path / "bus.db") as bus:
        _, _, said = invited(bus, "dell")
        assert f"A token of dell for the bus at {bus.url}, whose database is {bus.db}\n" in said
        undo = f"To undo this: stop the bus, delete {bus.db}.tokens, and start the bus."
        asks = "There is no terminal, so you are not asked."
        closes = f"The first token closes the bus: from now on every agent needs one. {asks} {undo}\n"
        assert f"{closes}A token of dell for the bus at" in said, "the first words on stderr"
        assert ask(bus, "GET", "/agents")[0] == 401
        said = invited(bus, "nano")[2]
        assert f"A token of nano for the bus at {bus.url}" in said and "closes the bus" not in said
        bus.stop()
        os.remove(f"{bus.db}.tokens")
        bus.start()
        assert ask(bus, "GET", "/agents")[0] == 200


@pytest.mark.parametrize("kind", ["plain", "tls"])
def test_the_names_that_listen_are_said_to_have_no_token(kind, tmp_path, authority):
    with Server(tmp_path / "bus.db", *(tls(authority.self_signed("IP:127.0.0.1")) if kind == "tls" else [])) as bus:
        names = ["alice", "bob", "dell"]
        bus = bus if kind == "plain" else secure(bus)
        polls = [(bus.url, f"/recv?to={name}&block=true&wait=2") for name in names]
        readers = [threading.Thread(target=bus_invite.said, args=poll) for poll in polls]
        for reader in readers:
            reader.start()
        wait_until(lambda: len(bus_invite.said(bus.url, "/agents?online=true")["agents"]) == 3)
        assert "These names listen now, and have no token: alice, bob\n" in invited(bus, "dell")[2]
        assert "listen now" not in invited(bus, "nano")[2]
        for reader in readers:
            reader.join(PATIENCE)


def test_a_bus_with_another_database_is_named_before_the_wrong_one_is_closed(tmp_path, monkeypatch):
    with Server(tmp_path / "theirs.db") as bus:
        monkeypatch.setenv("AGENT_BUS_URL", bus.url)
        said = command(Server(tmp_path / "bus.db"), "invite", "zz")
        assert f"for the bus that does not run now, whose database is {tmp_path}/bus.db" in said
        how = "If your bus has started, correct --db."
        assert f"its first start. {how} The bus at {bus.url} has another database.\n" in said
        assert "The token is good as soon as the bus runs" in said and "invite again" in said and "curl" not in said
        assert "To get one now, invite again with --url" in " ".join(said.split())
        assert all(variable in said for variable in ("AGENT_BUS_URL", "AGENT_BUS_TOKEN", "AGENT_BUS_CA"))
        assert ask(bus, "GET", "/agents")[0] == 200
        assert "another database" not in command(bus, "invite", "zz")


@pytest.mark.parametrize("db", ["bsu.db", "nowhere/bus.db"])
def test_a_database_that_does_not_exist_is_said_to_be_none_before_anything_is_made(db, tmp_path):
    with Terminal("bash", tmp_path / "home", machine(tmp_path / "bin")) as terminal:
        folder = tmp_path / "bus"
        folder.mkdir()
        terminal.type(f"python3 {ROOT}/bus_server.py invite dell --db {folder}/{db}")
        if db == "bsu.db":
            said = terminal.wait_for("Make the token? [y/N] ")
            assert "The bus makes this database at its first start." in said and "not asked" not in said
            terminal.run("")
        else:
            terminal.wait_for(f"bus_server: there is no folder {folder}/nowhere: correct --db")
        assert not list(folder.iterdir())
    with Server(tmp_path / "bus.db") as bus:
        assert "first start" not in command(bus, "invite", "dell")


def test_a_relative_path_is_said_whole(tmp_path):
    line = [sys.executable, str(ROOT / "bus_server.py"), "invite", "dell", "--db", "bus.db"]
    done = forked.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert f"whose database is {tmp_path}/bus.db" in done.stderr and f"delete {tmp_path}/bus.db.tokens" in done.stderr
    assert TOKEN.search(done.stdout)


def test_its_words_fit_a_terminal_and_what_is_to_be_copied_stays_whole(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    text = bus_invite.invitation("dell", "abt_0", "http://127.0.0.1:8080", "")
    lines = text.split("\n")
    assert max(len(line) for line in lines if line[:1] != " ") <= 80
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    plain = bus_invite.invitation("dell", "abt_0", "http://127.0.0.1:8080", "")
    assert plain != text and plain.split() == text.split()
    assert [line for line in lines if line[:1] == " "] == [line for line in plain.split("\n") if line[:1] == " "]


@pytest.mark.parametrize("answer", ["", "n", "y"])
def test_on_a_terminal_it_asks_before_it_closes_a_bus(answer, tmp_path):
    with Server(tmp_path / "bus.db") as bus, Terminal("bash", tmp_path / "home", machine(tmp_path / "bin")) as terminal:
        line = f"python3 {ROOT}/bus_server.py invite dell --db {bus.db}"
        terminal.type(line)
        assert f"for the bus at {bus.url}" in terminal.wait_for("Make the token? [y/N] ")
        said = terminal.run(answer)
        assert bool(TOKEN.search(said)) == (answer == "y") == os.path.exists(f"{bus.db}.tokens")
        assert ("bus_server: no token was made" in said) == (answer != "y")
        assert TOKEN.search(terminal.run(f"{line}{'' if answer == 'y' else ' --yes'}")), "not asked: closed, or --yes"


def test_on_a_terminal_it_asks_if_no_bus_runs_with_the_database(tmp_path):
    command(Server(tmp_path / "bus.db"), "invite", "op")
    with Terminal("bash", tmp_path / "home", machine(tmp_path / "bin")) as terminal:
        terminal.type(f"python3 {ROOT}/bus_server.py invite dell --db {tmp_path}/bus.db")
        terminal.wait_for("Make the token? [y/N] ")


def test_a_second_invite_says_that_the_name_has_a_token_already(tmp_path):
    bus, first = Server(tmp_path / "bus.db"), ""
    for number in range(2):
        said = command(bus, "invite", "dell")
        assert (f"dell has the token {first} already, made {time.strftime('%Y-')}" in said) == bool(number)
        first = TOKEN.search(said)[0][:12]


def test_a_token_that_has_expired_is_no_token_that_the_name_has(tmp_path):
    bus = Server(tmp_path / "bus.db")
    first = TOKEN.search(command(bus, "invite", "dell", "--expires", "1d"))[0][:12]
    set_expires(bus, "dell", int(time.time()) - 60)
    assert "already" not in command(bus, "invite", "dell")
    assert re.search(f"^{first} .* expired$", command(bus, "tokens"), re.M)


@pytest.mark.parametrize("options, hours", [
    ("--page", 12), ("--page --expires 2h", 2), ("--page --expires 0", None), ("--expires 3h", 3), ("", None),
    ("--expires 0", None),
])  # fmt: skip
def test_a_token_is_valid_for_as_long_as_the_help_says(options, hours, tmp_path):
    bus, now = Server(tmp_path / "bus.db"), time.time()
    said = command(bus, "invite", "ann", "--url", "http://h:80", *options.split())
    ends = json.loads((tmp_path / "bus.db.tokens").read_text().splitlines()[-1])["expires"]
    assert ends is None if hours is None else abs(ends - now - hours * 3600) < PATIENCE
    until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(ends)) if ends else "you revoke it"
    assert (f"This one works until {until}." in " ".join(said.split())) == ("--page" in options)


def test_the_texts_name_the_option_as_the_help_does():
    for file in ("README.md", "tools/agent_bus.py", "bus_extensions/page/app.js"):
        assert re.findall("--operator --page (--[a-z]+)", (ROOT / file).read_text()) == ["--expires"], file
    assert "--for" not in command(Server("bus.db"), "invite", "--help")


def test_bus_server_alone_makes_a_token_too(tmp_path):
    shutil.copy(ROOT / "bus_server.py", tmp_path)
    line = [sys.executable, "-I", str(tmp_path / "bus_server.py"), "invite", "dell", "--db", str(tmp_path / "bus.db")]
    done = forked.run(line, capture_output=True, text=True, timeout=PATIENCE)
    assert TOKEN.search(done.stdout) and done.returncode == 0, done.stderr


# ── The line ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_url_without_a_scheme_is_refused(tmp_path):
    said = command(Server(tmp_path / "bus.db"), "invite", "x", "--url", "bus.lan:8080", code=2)
    assert "--url 'bus.lan:8080' is not the URL of a bus: write it like https://bus.lan:8080" in said
    assert not os.path.exists(tmp_path / "bus.db.tokens")


def test_a_bus_on_this_machine_only_is_said_to_be_one_and_how_another_machine_reaches_it(tmp_path):
    with Server(tmp_path / "bus.db") as bus:
        line, _, said = invited(bus, "dell")
        assert f"{bus.url} works on the machine of the bus only" in said
        assert f"    ssh -N -L {bus.port}:127.0.0.1:{bus.port} HOST\n" in said and "--host and --tls-cert" in said
        for what, text in ((line, said), ("/ui/#token=", command(bus, "invite", "maria", "--page"))):
            steps = ("works on the machine of the bus only", "\n1. ", "    ssh -N -L ", "\n2. ", what, "Instead of 1.")
            assert [*map(text.index, steps)] == sorted(map(text.index, steps)), "the tunnel comes first"
        assert f"$(curl -gfsS --noproxy '*' {bus.url}/bus_join.py)" in line and "AGENT_BUS_PLAIN_HTTP" not in line


def test_plain_http_to_another_host_is_said_to_be_for_networks_that_encrypt(tmp_path):
    line, _, said = invited(Server(tmp_path / "bus.db"), "dell", "--url", "http://10.8.0.1:8080/")
    assert "http://10.8.0.1:8080 is not encrypted" in said and "only where the network itself" in said
    assert line.startswith("j=$(curl -gfsS http")
    assert " && AGENT_BUS_PLAIN_HTTP=1 python3 -Ic " in line and " http://10.8.0.1:8080 dell " in line


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_bus_that_listens_on_every_address_is_named_by_its_host(host, tmp_path):
    with Server(tmp_path / "bus.db", "--host", host, "--open") as bus:
        line, _, said = invited(bus, "dell")
        assert f" http://{socket.gethostname()}:{bus.port} dell " in line
        assert "is given because that is the name of this machine. The other machine must know" in said
        assert "is given because" not in invited(bus, "dell", "--url", f"http://10.0.0.5:{bus.port}")[2]


def test_with_a_certificate_it_is_named_by_a_name_that_is_in_it(tmp_path, authority):
    certificate = authority.self_signed("DNS:bus.lan,DNS:bus.example")
    with secure(Server(tmp_path / "bus.db", "--host", "0.0.0.0", "--open", *tls(certificate))) as bus:
        line, _, said = invited(bus, "dell")
        assert f" https://bus.lan:{bus.port} dell sha256//" in line
        assert "refuse" not in said and "AGENT_BUS_CA" not in said
        assert "because its certificate is for that name" in said and "--url https://ADDRESS:PORT" in said
        assert "because its certificate is for that name" in command(bus, "invite", "ann", "--page")


def test_plain_http_to_a_bus_that_speaks_https_makes_no_token(tmp_path, authority):
    with secure(Server(tmp_path / "bus.db", *tls(authority.sign("DNS:bus.lan,IP:127.0.0.1")))) as bus:
        for more in ([], ["--page"]):
            out = command(bus, "invite", "dell", "--url", f"http://localhost:{bus.port}", *more, code=2)
            assert "The bus speaks https, and http://localhost" in out and "no token was made" in out
        assert "abt_" not in out and not os.path.exists(tmp_path / "bus.db.tokens")


def test_a_name_that_is_not_in_the_certificate_is_said_to_be_none(tmp_path, authority):
    with secure(Server(tmp_path / "bus.db", *tls(authority.sign("DNS:bus.lan,IP:127.0.0.1")))) as bus:
        said = command(bus, "invite", "dell", "--url", f"https://localhost:{bus.port}", code=2)
        assert "abt_" not in said and not os.path.exists(tmp_path / "bus.db.tokens")
        assert f"The clients will refuse the certificate of https://localhost:{bus.port}: " in said
        assert "It is for: bus.lan, 127.0.0.1. Give --url with one of these names" in said and ".." not in said
        said = invited(bus, "dell")[2]
        assert "refuse" not in said and "export AGENT_BUS_CA=FILE" in said, "it was signed by an authority"


def test_a_certificate_that_everyone_trusts_is_not_pinned(tmp_path, authority, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", authority.file)
    with secure(Server(tmp_path / "bus.db", *tls(authority.sign("IP:127.0.0.1")))) as bus:
        line, _, said = invited(bus, "dell")
        assert line == f"""j=$(curl -gfsS --noproxy '*' {bus.url}/bus_join.py) && python3 -Ic "$j" {bus.url} dell"""
        assert "cannot be checked" not in said


def test_a_proxy_whose_certificate_nobody_knows_is_not_pinned_and_said_to_be_unchecked(tmp_path, authority):
    """Only the bus itself, on this machine, is believed what its key is: somebody may be before the proxy."""
    with Server(tmp_path / "bus.db") as bus, Server(tmp_path / "2.db", *tls(authority.sign("IP:127.0.0.1"))) as proxy:
        url = f"https://127.0.0.1:{proxy.port}"
        line, _, said = invited(bus, "dell", "--url", url)
        assert line.startswith(f"j=$(curl -gfsS --noproxy '*' {url}/bus_join.py)") and "sha256//" not in said
        assert f"The certificate at {url} cannot be checked from here (" in said


def test_an_ipv6_address_survives_the_shell_and_curl(tmp_path):
    with Server(tmp_path / "bus.db", "--host", "::1") as bus:
        line, _, _ = invited(bus, "dell")
        assert f"'http://[::1]:{bus.port}'/bus_join.py" in line
        run = line.replace('python3 -Ic', 'echo').replace('"$j"', '"${j:0:22}"')
        for shell in filter(shutil.which, ("bash", "zsh")):
            done = subprocess.run([shell, "-c", run], capture_output=True, text=True, timeout=PATIENCE)
            assert "#!/usr/bin/env python3" in done.stdout and f"http://[::1]:{bus.port} dell" in done.stdout


@pytest.mark.parametrize("kind", ["self_signed", "sign", "rsa", "version 1"])
def test_a_pin_is_what_openssl_says(kind, authority, tmp_path):
    file = str(tmp_path / "cert.pem")
    if kind in ("self_signed", "sign"):
        file = getattr(authority, kind)("DNS:bus.lan").file
    else:
        made = "openssl req -newkey rsa:2048 -nodes -subj '/CN=a longer name' -keyout key -out "
        made += "cert.pem -x509" if kind == "rsa" else "csr && openssl x509 -req -in csr -signkey key -out cert.pem"
        subprocess.run(made, shell=True, cwd=tmp_path, capture_output=True, check=True, timeout=PATIENCE)
    with open(file) as text:
        certificate = bus_invite.ssl.PEM_cert_to_DER_cert(text.read())
    line = f"openssl x509 -in {file} -pubkey -noout | openssl pkey -pubin -outform der"
    line += " | openssl dgst -sha256 -binary | base64"
    said = subprocess.run(line, shell=True, capture_output=True, text=True, check=True).stdout.strip()
    assert bus_invite.pin_of(certificate) == f"sha256//{said}"


def test_a_certificate_that_is_not_der_has_no_pin(authority, tmp_path):
    """Else the pin could be that of another key than OpenSSL uses."""
    certificate = authority.self_signed("DNS:bus.lan")
    mine = ssl.PEM_cert_to_DER_cert(pathlib.Path(certificate.file).read_text())
    evil = ssl.PEM_cert_to_DER_cert(pathlib.Path(two_keys(certificate, tmp_path).file).read_text())
    assert mine[:2] == b"\x30\x82" and mine[4:6] == b"\x30\x82" and mine[8:13] == b"\xa0\x03\x02\x01\x02"
    for wrong in (
        evil,
        b"",
        mine[:1],
        mine[:5],
        mine[:-1],  # it goes beyond the end
        b"\x31" + mine[1:],  # another tag
        b"\x3f\x10" + mine[1:],  # a tag of two bytes
        b"\x30\x80" + mine[4:] + b"\0\0",  # no length
        b"\x30\x83\0" + mine[2:],  # a length that could be shorter
        mine[:8] + b"\xa0\x81" + mine[9:],
        mine[:13] + b"\x04" + mine[14:],  # the serial number is no number
        b"\x30\x85\x01" + mine[2:],
        b"\x30\x02\x30\x00",  # there is nothing in it
    ):
        with pytest.raises(ValueError, match="not DER"):
            bus_invite.pin_of(wrong)


@pytest.mark.parametrize("option, says", [("--url", "is not the URL of a bus"), ("--label", "control characters")])
def test_what_a_terminal_would_obey_is_refused(option, says, tmp_path):
    said = command(Server(tmp_path / "bus.db"), "invite", "x", option, "http://a/\x1b[2J", code=2)
    assert says in said and "\x1b" not in said and not os.path.exists(tmp_path / "bus.db.tokens")


def test_a_label_that_was_written_otherwise_is_shown_escaped(tmp_path):
    bus = Server(tmp_path / "bus.db")
    command(bus, "invite", "dell", "--label", "laptop")
    file = tmp_path / "bus.db.tokens"
    file.write_text(file.read_text().replace("laptop", r"lap\u001b[2Jtop"))
    assert r"(lap\x1b[2Jtop)" in command(bus, "tokens")


def test_what_goes_through_a_shell_and_a_command_line_is_ascii_and_not_too_long():
    text = (ROOT / "tools" / "bus_join.py").read_bytes()
    assert text.isascii() and len(text) < 1 << 15 and b"\0" not in text
    assert text.endswith(b'\n\nif __name__ == "__main__":\n    sys.exit(main())\n'), "a part of it does nothing"
