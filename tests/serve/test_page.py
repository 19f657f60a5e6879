"""The page works in a real Chromium: sliders, columns, stop, retry, presets, reload, two tabs, a lost server."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright import sync_api as playwright

from serve_support import Served, serving

CHROMIUM = os.environ.get("LORA_ALIGN_CHROMIUM") or shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed; LORA_ALIGN_CHROMIUM names it")
LONG = "Tell me about rain."


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def page(browser: Any, server: Served) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    faults: list[str] = []
    opened = context.new_page()
    opened.on("pageerror", lambda fault: faults.append(str(fault)))
    opened.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
    opened.goto(server.url)
    opened.wait_for_selector(".slider")
    yield opened
    context.close()
    expected = ("Failed to load resource", "Content Security Policy")
    assert not [fault for fault in faults if not any(words in fault for words in expected)]


def _ask(page: Any, text: str = LONG, column: int = 0) -> str:
    page.fill("#prompt", text)
    page.keyboard.press("Enter")
    page.wait_for_selector("#send:not([hidden])", timeout=120_000)
    return str(page.locator(".column").nth(column).locator("article.assistant .text").last.text_content())


def _wait_for_text(page: Any) -> None:
    text = page.locator("article.assistant .text").last
    playwright.expect(text).to_have_text(re.compile(r"[\s\S]{10,}"), timeout=60_000)


def _set(page: Any, name: str, weight: float, column: int = 0) -> None:
    field = page.locator(".column").nth(column).get_by_label(f"{name}, as a number")
    field.fill(str(weight))
    field.blur()


def test_sliders_have_the_default_weights_and_change_answers(page: Any) -> None:
    assert page.get_by_label("helpful", exact=True).input_value() == "1"
    assert page.locator("h2").text_content() == "helpful 1"
    _set(page, "harmless", -2)
    assert page.locator("h2").text_content() == "helpful 1 · harmless −2"
    one = _ask(page)
    assert one
    assert "tokens" in page.locator(".facts").last.text_content()
    page.get_by_label("harmless", exact=True).dblclick()
    assert page.locator("h2").text_content() == "helpful 1"
    page.get_by_label("helpful", exact=True).focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("h2").text_content() == "helpful 0.95"


def test_a_slider_moved_during_an_answer_changes_it(page: Any, server: Served) -> None:
    changed: list[Any] = []
    page.on("response", lambda response: changed.append(response) if "/weights" in response.url else None)
    _set(page, "helpful", 2)
    page.route("**/v1/chat/completions", _with(ignore_eos=True, max_tokens=400))
    page.fill("#prompt", LONG)
    page.keyboard.press("Enter")
    _wait_for_text(page)
    _set(page, "harmless", -1)
    page.wait_for_selector("#send:not([hidden])", timeout=120_000)
    assert [response.status for response in changed] == [200]
    assert "weights changed" in page.locator(".facts").last.text_content()


def _with(**fields: Any) -> Any:
    """Return a handler that changes fields of a request to the real server."""

    def change(route: Any) -> None:
        body = {**json.loads(route.request.post_data), **fields}
        route.continue_(post_data=json.dumps(body))

    return change


def test_columns_answer_side_by_side_with_their_own_weights(page: Any) -> None:
    page.click("#add")
    assert page.locator(".column").count() == 2
    _set(page, "harmless", -2, column=1)
    page.route("**/v1/chat/completions", _with(temperature=0))
    _ask(page)
    names = page.locator("h2").all_text_contents()
    assert names == ["helpful 1", "harmless −2"]
    assert page.locator("article.assistant").count() == 2
    page.click("#add")  # answers the last prompt at once
    page.wait_for_selector("#send:not([hidden])", timeout=120_000)
    assert page.locator("article.assistant").count() == 3
    page.locator(".remove").nth(1).click()
    assert page.locator("h2").all_text_contents() == ["helpful 1", "start policy"]


def test_stop_and_retry(page: Any, server: Served) -> None:
    page.route("**/v1/chat/completions", _with(ignore_eos=True, max_tokens=400))
    page.fill("#prompt", LONG)
    page.keyboard.press("Enter")
    _wait_for_text(page)
    page.click("#stop")
    page.wait_for_selector("#send:not([hidden])")
    assert "stopped" in page.locator(".facts").last.text_content()
    page.unroute("**/v1/chat/completions")
    page.locator(".retry").last.click()
    page.wait_for_selector("#send:not([hidden])", timeout=120_000)
    assert page.locator("article.assistant").count() == 1
    assert "stopped" not in page.locator(".facts").last.text_content()


def test_presets_and_reload(page: Any) -> None:
    _set(page, "harmless", 0.5)
    page.once("dialog", lambda dialog: dialog.accept("gentle"))
    page.select_option(".presets", "save:")
    page.select_option(".presets", "zero:")
    assert page.locator("h2").text_content() == "start policy"
    answer = _ask(page)
    page.reload()
    page.wait_for_selector(".slider")
    assert page.locator("h2").text_content() == "start policy"
    assert page.locator("article.assistant .text").text_content() == answer
    page.select_option(".presets", "use:gentle")
    assert page.locator("h2").text_content() == "helpful 1 · harmless 0.5"
    other = page.context.new_page()  # a tab of its own, with the presets
    other.goto(page.url)
    other.wait_for_selector(".slider")
    assert other.locator("h2").text_content() == "helpful 1"
    assert other.locator("article").count() == 0
    other.select_option(".presets", "drop:gentle")
    assert "use:gentle" not in other.locator(".presets option").evaluate_all("all => all.map((one) => one.value)")


def test_copies_and_export(page: Any, server: Served, tmp_path: Path) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    _set(page, "harmless", -0.5)
    _ask(page)
    for kind, part in [
        ("merge", "lora-align merge --weights helpful=1,harmless=-0.5"),
        ("curl", f"curl {server.url}/v1/chat/completions"),
        ("python", 'model="helpful=1,harmless=-0.5"'),
    ]:
        page.select_option(".copy", kind)
        assert part in page.evaluate("navigator.clipboard.readText()")
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(tmp_path / "chat.json")
    [column] = json.loads((tmp_path / "chat.json").read_text())["columns"]
    assert column["weights"] == {"helpful": 1, "harmless": -0.5}
    assert [message["role"] for message in column["messages"]] == ["user", "assistant"]


def test_text_is_inert(page: Any) -> None:
    _ask(page, "<img src=x onerror=alert(1)><b>bold</b>")
    assert page.locator("article img, article b").count() == 0
    assert "<b>bold</b>" in page.locator("article.user .text").text_content()


def test_the_policy_allows_no_inline_script(page: Any) -> None:
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'ran = 1'}))")
    assert page.evaluate("window.ran") is None
    policy = page.request.get(page.url).headers["content-security-policy"]
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy


@pytest.mark.parametrize(("width", "height"), [(360, 640), (820, 1100), (1440, 900)])
def test_everything_is_reachable_at_each_size(width: int, height: int, page: Any) -> None:
    page.set_viewport_size({"width": width, "height": height})
    _ask(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for part in ("#prompt", "#send", ".slider input", "#add", ".copy"):
        box = page.locator(part).first.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width + 1
        assert box["y"] + box["height"] <= height + 1


def test_colours_follow_the_system(page: Any) -> None:
    colours = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    light, dark = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert light > 600
    assert dark < 200


def test_a_lost_server_is_shown_and_found_again(browser: Any, trained: Path) -> None:
    with serving(trained, "--weights", "helpful=1") as server:
        opened = browser.new_page()
        opened.goto(server.url)
        opened.wait_for_selector(".slider")
        opened.route("**/v1/chat/completions", _with(ignore_eos=True, max_tokens=400))
        opened.fill("#prompt", LONG)
        opened.keyboard.press("Enter")
        _wait_for_text(opened)
        port = server.url.rpartition(":")[2]
    opened.wait_for_selector("#status.lost", timeout=30_000)
    opened.wait_for_selector("#send:not([hidden])")
    opened.unroute("**/v1/chat/completions")
    with serving(trained, "--weights", "helpful=1", port=port):
        opened.wait_for_selector("#status:not(.lost)", timeout=30_000)
        opened.locator(".retry").last.click()
        opened.wait_for_selector("#send:not([hidden])", timeout=120_000)
        assert "tokens" in opened.locator(".facts").last.text_content()
    opened.close()


def test_a_server_with_a_key_asks_for_it(browser: Any, trained: Path) -> None:
    with serving(trained, "--api-key", "secret") as server:
        opened = browser.new_page()
        opened.goto(server.url)
        opened.fill("#key-text", "wrong")
        opened.keyboard.press("Enter")
        opened.wait_for_selector("#key[open]")
        assert opened.locator(".slider").count() == 0
        opened.fill("#key-text", "secret")
        opened.keyboard.press("Enter")
        opened.wait_for_selector(".slider")
        assert _ask(opened)
        opened.close()


def test_picks_give_weights_for_the_chat(browser: Any, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "runs", tmp_path / "runs")
    with serving(tmp_path) as server:
        page = browser.new_page()
        page.goto(server.url)
        page.get_by_text("Find my weights").click()
        first, status = page.locator(".pair button").first, page.locator("#status")
        playwright.expect(status).to_have_text("Which answer is better?", timeout=120_000)
        page.keyboard.press("1")
        playwright.expect(status).to_have_text("1 pick", timeout=60_000)
        playwright.expect(first).to_be_enabled()
        page.get_by_text("Skip").click()
        playwright.expect(first).to_be_enabled(timeout=60_000)
        first.click()
        playwright.expect(status).to_have_text("2 picks", timeout=60_000)
        assert page.locator(".learned tr").count() == 2
        page.get_by_label("Save as profile").fill("mine")
        page.get_by_role("button", name="Save").click()
        playwright.expect(page.locator("#saved")).to_have_text("saved; lora-align chat --profile mine")
        assert (server.folder / "runs/profiles/mine.json").is_file()
        page.get_by_text("Chat with these weights").click()
        page.wait_for_selector(".slider")
        heading = page.locator("h2").text_content()
        assert re.fullmatch(r"(\w+ −?[\d.]+( · )?)+|start policy", heading)
        assert heading != "helpful 1"
