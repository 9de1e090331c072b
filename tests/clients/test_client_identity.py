"""The clients' tokens and trust: who they say they are, and to whom."""

import json
import os
import shutil
import subprocess
import sys

import pytest

import bus_recv
import bus_send
from tests.kit import forked
from tests.kit.peers import invite
from tests.kit.processes import PATIENCE, ROOT, Server, wait_until

TOKEN = "abt_00000000_" + "s" * 43


@pytest.fixture(params=[bus_send, bus_recv], ids=["send", "recv"])
def client(request, monkeypatch):
    for name in ("AGENT_BUS_TOKEN", "AGENT_BUS_TOKEN_FILE", "AGENT_BUS_PLAIN_HTTP", "AGENT_BUS_CA"):
        monkeypatch.delenv(name, raising=False)
    return request.param


def header(token):
    return {"Authorization": f"Bearer {token}"}


def test_without_a_token_there_is_no_header(client):
    assert client.credentials("http://bus.example") == {}


def test_a_token_comes_from_the_environment_or_a_private_file(client, monkeypatch, tmp_path):
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n\n")
    path.chmod(0o600)
    monkeypatch.setenv("AGENT_BUS_TOKEN_FILE", str(path))
    assert client.credentials("https://bus.example") == header(TOKEN)
    monkeypatch.setenv("AGENT_BUS_TOKEN", "abt_other\n")
    assert client.credentials("https://bus.example") == header("abt_other")


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_a_token_that_others_can_read_is_refused(client, monkeypatch, tmp_path):
    path = tmp_path / "token"
    path.write_text(TOKEN)
    monkeypatch.setenv("AGENT_BUS_TOKEN_FILE", str(path))
    for mode in (0o644, 0o640, 0o604):
        path.chmod(mode)
        with pytest.raises(ValueError, match="chmod 600"):
            client.credentials("https://bus.example")
    monkeypatch.setenv("AGENT_BUS_TOKEN_FILE", str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="cannot be read"):
        client.credentials("https://bus.example")


@pytest.mark.parametrize(
    "url", ["http://bus.example", "http://10.0.0.5:8080", "http://127.evil.example", "http://localhost.evil.example"]
)
def test_a_token_does_not_cross_a_network_in_the_clear_unless_told(client, monkeypatch, url):
    monkeypatch.setenv("AGENT_BUS_TOKEN", TOKEN)
    with pytest.raises(ValueError, match="in the clear"):
        client.credentials(url)
    monkeypatch.setenv("AGENT_BUS_PLAIN_HTTP", "1")
    assert client.credentials(url) == header(TOKEN)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8080", "http://localhost", "http://[::1]:8080", "https://bus.example"]
)
def test_a_token_goes_to_this_machine_and_over_https(client, monkeypatch, url):
    monkeypatch.setenv("AGENT_BUS_TOKEN", TOKEN)
    assert client.credentials(url) == header(TOKEN)


def test_what_is_no_token_is_refused(client, monkeypatch):
    monkeypatch.setenv("AGENT_BUS_TOKEN", "abt_x\r\nX-Injected: 1")
    with pytest.raises(ValueError, match="no token"):
        client.credentials("https://bus.example")


def run(program, *arguments, stdin="", **env):
    done = forked.run(
        [sys.executable, str(ROOT / program), *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=PATIENCE,
    )
    assert "Traceback" not in done.stderr and TOKEN not in done.stderr + done.stdout, done.stderr
    return done


@pytest.mark.parametrize(("program", "text"), [("bus_recv.py", "--once"), ("bus_send.py", "hello")])
def test_a_token_that_stays_in_the_file_of_another_url_is_told(program, text, tmp_path):
    """`localhost` is another URL than 127.0.0.1, though it may be the same bus."""
    with Server(tmp_path / "bus.db") as bus:
        file = tmp_path / "agent-bus" / "default.env"
        file.parent.mkdir()
        file.write_text(f"AGENT_BUS_URL={bus.url}\nAGENT_BUS_TOKEN={invite(bus, 'spark')}\n")
        file.chmod(0o600)
        url = bus.url.replace("127.0.0.1", "localhost")
        done = run(program, "dell", text, AGENT_BUS_URL=url, AGENT_NAME="spark", XDG_CONFIG_HOME=str(tmp_path))
        ending = f"; {file} is for {bus.url}, which is not AGENT_BUS_URL, so it was not used\n"
        assert done.returncode == 1 and "needs a token" in done.stderr and done.stderr.endswith(ending), done.stderr


def test_two_agents_talk_with_tokens_alone(tmp_path):
    """The sender's name is the token's; nobody needs to say it, and saying another is refused."""
    with Server(tmp_path / "bus.db") as bus:
        spark, dell = invite(bus, "spark"), invite(bus, "dell")
        common = {"AGENT_BUS_URL": bus.url, "AGENT_BUS_STATE_DIR": str(tmp_path / "state"), "AGENT_NAME": ""}
        sent = run("bus_send.py", "dell", stdin="T1 done", AGENT_BUS_TOKEN=spark, **common)
        assert sent.returncode == 0 and json.loads(sent.stdout)["ok"]
        read = run("bus_recv.py", "dell", "--once", AGENT_BUS_TOKEN=dell, **common)
        assert " from=spark " in read.stdout and "| T1 done\n" in read.stdout
        forged = run("bus_send.py", "dell", "--from", "boss", stdin="x", AGENT_BUS_TOKEN=spark, **common)
        assert forged.returncode == 1 and "sends as spark" in forged.stderr
        nosy = run("bus_recv.py", "dell", "--once", AGENT_BUS_TOKEN=spark, **common)
        assert nosy.returncode == 1 and "may not read dell" in nosy.stderr
        stranger = run("bus_recv.py", "dell", "--once", AGENT_BUS_TOKEN=TOKEN, **common)
        assert stranger.returncode == 1 and "does not accept this token" in stranger.stderr
        if shutil.which("curl") and shutil.which("jq"):
            log = tmp_path / "listener.jsonl"
            listener = subprocess.Popen(
                ["bash", str(ROOT / "bus_listener.sh")],
                env={
                    **os.environ,
                    **common,
                    "AGENT_NAME": "dell",
                    "AGENT_BUS_TOKEN": dell,
                    "BLOCK": "1",
                    "FULL": str(log),
                    "LOG": str(tmp_path / "listener.log"),
                    "HEARTBEAT": str(tmp_path / "beat"),
                    "PID_FILE": str(tmp_path / "pid"),
                },
            )
            try:
                run("bus_send.py", "dell", stdin="T2 done", AGENT_BUS_TOKEN=spark, **common)
                wait_until(lambda: log.exists() and "T2 done" in log.read_text())
                if sys.platform == "linux":
                    assert_not_on_a_command_line(dell)
            finally:
                listener.terminate()
                listener.wait(PATIENCE)


def assert_not_on_a_command_line(token):
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                with open(f"/proc/{entry}/cmdline", "rb") as file:
                    assert token.encode() not in file.read(), entry
            except OSError:
                continue


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
def test_a_private_authority_is_trusted_by_name_only(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            key,
            "-out",
            certificate,
            "-days",
            "1",
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
        ],
        check=True,
        capture_output=True,
    )
    with Server(tmp_path / "bus.db", "--tls-cert", str(certificate), "--tls-key", str(key)) as bus:
        url = bus.url.replace("http:", "https:")
        common = {"AGENT_BUS_URL": url, "AGENT_BUS_STATE_DIR": str(tmp_path / "state"), "AGENT_NAME": "spark"}
        assert run("bus_send.py", "dell", "--timeout", "0", stdin="x", **common).returncode == 75
        assert run("bus_send.py", "dell", stdin="over TLS", AGENT_BUS_CA=str(certificate), **common).returncode == 0
        read = run("bus_recv.py", "dell", "--once", AGENT_BUS_CA=str(certificate), **common)
        assert read.returncode == 0 and "| over TLS\n" in read.stdout
        (tmp_path / "note").write_text("not a certificate")
        for wrong in ("missing", "note"):
            failed = run("bus_send.py", "dell", stdin="x", AGENT_BUS_CA=str(tmp_path / wrong), **common)
            assert failed.returncode == 2 and failed.stderr.endswith(f"you can read; {tmp_path / wrong} is none\n")
