"""The page in a real Chromium: whatever an agent wrote is text there, and nothing of it runs or loads."""
import pytest

from bus_extensions import page as extension
from tests.kit.page import FAMILY, HOSTILE, IN_CHROMIUM, opened, show, texts

pytestmark = IN_CHROMIUM
VIEWS = ("#/", "#/messages", "#/agents", "#/agents/dell", "#/work", "#/messages/planner/dell")


def test_each_file_has_the_policy_letter_for_letter(busy, page):
    for file in ("", *(file.name for file in extension.FOLDER.iterdir())):
        answer = page.request.get(f"{busy.url}/ui/{file}")
        assert answer.ok and answer.headers["content-security-policy"] == extension.POLICY
        assert answer.headers["x-frame-options"] == "DENY" and answer.headers["x-content-type-options"] == "nosniff"
    assert page.request.get(f"{busy.url}/ui/page.py").status == 404
    assert page.request.get(f"{busy.url}/ui/%2e%2e/bus_server.py").status == 404


@pytest.mark.parametrize("view", VIEWS)
def test_hostile_messages_are_text_and_nothing_else(busy, page, view):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    show(page, busy, view)
    page.wait_for_function("() => document.querySelector('main').innerText.length > 40")
    assert page.evaluate("[window.pwned, window.violations ?? []]") == [None, []]
    assert all(url.startswith(busy.url) for url in asked)


def test_what_hostile_messages_say_is_there_to_be_read(busy, page):
    page.set_viewport_size({"width": 1360, "height": 3000})  # with room for a row of each
    show(page, busy, "#/messages")
    page.wait_for_selector(".message-row")
    found = "\n".join(texts(page))
    assert found.count("mallory") == len(HOSTILE) == 40
    assert "<script>window.pwned=1</script>" in found and "\\u{202e}gnp.exe" in found and "\\u{1b}[31mred" in found
    assert "a\\u{200b}b" in found and "\\u{feff}x" in found and "\\u{e0041}" in found
    assert FAMILY in found and "in\\u{34f}visible" in found and "\\u{9b}31mred" in found
    for row in page.locator(".message-row", has_text="mallory").all()[:6]:
        row.click()
        page.wait_for_selector("#panel .body")
    assert page.evaluate("[window.pwned, window.violations ?? []]") == [None, []]
    assert page.evaluate("document.documentElement.scrollWidth == innerWidth")


def test_no_html_can_be_made_of_text(busy, page):
    show(page, busy)
    assert "TypeError" in page.evaluate("try { document.body.innerHTML = '<b>x</b>' } catch (error) { String(error) }")


def test_one_word_of_6000_letters_does_not_widen_a_phone(busy, browser):
    with opened(browser) as page:
        page.set_viewport_size({"width": 390, "height": 844})
        show(page, busy, "#/messages")
        page.fill("#filter", "xxxxxxxx")
        page.wait_for_selector(".message-row:has-text('xxxxxxxx')")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.click(".message-row")
        page.wait_for_selector("#panel .body")
        assert page.evaluate("document.documentElement.scrollWidth") == 390


@pytest.mark.parametrize(
    "path",
    ["#/constructor", "#/__proto__", "#/%E0%A4%A", "#/<img src=x>", "#/messages/a b/c", "#/messages?id=zz"],
)
def test_an_address_that_leads_nowhere_is_no_error(busy, page, path):
    show(page, busy, path)
    page.wait_for_selector("main > div")
