"""The place of reservations on the page: who holds what, and a person may release it."""
import json

from tests.extensions.test_page import browser, page, pytestmark, show, texts  # noqa: F401
from tests.kit import peers


def test_reservations_are_shown_and_a_person_may_release_one(bus, page):  # noqa: F811
    hostile = "<img src=x onerror='window.pwned=1'>"
    for holder, why in (("dell", hostile), ("nano", "T2")):
        body = {"from": holder, "names": [f"src/{holder}/*", "<b>"], "why": why, "shared": True}
        assert peers.ask(bus, "POST", "/lock", body).status == 200
    show(page, bus, "#/more/locks")
    page.wait_for_selector("tr:has-text('dell')")
    rows = [text for text in texts(page, "tbody tr") if "src/" in text]
    assert len(rows) == 2 and "<b> src/dell/* (shared)" in rows[0] and hostile in rows[0]
    assert not page.evaluate("window.pwned")
    page.click("tr:has-text('dell') button")
    page.wait_for_selector("text=The holder may be in the middle of a change.")
    page.click("tr:has-text('dell') button")
    page.wait_for_selector("tr:has-text('dell')", state="detached")
    assert [each["holder"] for each in json.loads(bus.get("/locks"))["locks"]] == ["nano"]
