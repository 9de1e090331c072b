"""The clients behind a proxy: when it is asked, and how."""
import pytest

import bus_recv
import bus_send
from tests.clients.test_clients import reader
from tests.kit.bad_servers import HTML, Scripted, mail, message, page, stored

pytestmark = pytest.mark.usefixtures("home")


def test_a_proxy_is_asked_for_other_hosts_and_never_for_loopback(monkeypatch):
    with Scripted(stored(), mail(message(1))) as proxy, Scripted(stored()) as bus:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        bus_send.send("dell", "hi", url="http://bus.example:8080/x", sender="spark")
        assert next(reader("http://bus.example:8080/x").messages())["id"] == "1"
        assert [asked.target.partition("?")[0] for asked in proxy.asked] == [
            "http://bus.example:8080/x/send", "http://bus.example:8080/x/healthz", "http://bus.example:8080/x/recv"
        ]  # fmt: skip
        assert proxy.asked[0].headers["host"] == "bus.example:8080"
        bus_send.send("dell", "hi", url=bus.url, sender="spark")
        assert len(bus.asked) == 1 and len(proxy.asked) == 3


def test_no_proxy_and_the_scheme_are_honoured(monkeypatch):
    monkeypatch.setenv("http_proxy", "127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "example.org,10.0.0.5:8080")
    for client in (bus_send, bus_recv):
        assert client.proxy_for("http", "bus.example.org", 80) is None
        assert client.proxy_for("http", "10.0.0.5", 8080) is None
        assert client.proxy_for("https", "bus.example.com", 443) is None
        assert client.proxy_for("http", "bus.example.com", 80) == "http://127.0.0.1:9" or "127.0.0.1:9"
        assert client.connect("http://bus.example.com", 1)[0].port == 9


def test_https_goes_through_a_tunnel(monkeypatch, hurry):
    with Scripted(page(403, HTML)) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        with pytest.raises(bus_send.Unreachable, match="403"):
            bus_send.send("dell", "secret", url="https://bus.example", sender="spark", patience=0)
        (asked,) = proxy.asked
        assert (asked.method, asked.target, asked.body) == ("CONNECT", "bus.example:443", b"")
