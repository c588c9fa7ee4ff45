"""The page at `/` in headless Chromium, before the embedded model."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import re
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from octavo.benchmarks.browser import chromium, find_chromium
from octavo.benchmarks.demo_model.draw import draw_motion, draw_shape, save_mp4
from octavo.benchmarks.fakes.tiny_server import Served, wait_for
from octavo.engine.config.engine_config import EMBEDDED_MODEL
from octavo.engine.server.api_keys import ApiKeys
from octavo.engine.server.drain import CallTracker
from octavo.engine.server.http_api.server import HttpServer
from octavo.scheduler.params import SamplingParams

if find_chromium() is None:
    pytest.skip("chromium is not installed: apt-get install chromium", allow_module_level=True)

KEY = "the-key-of-this-server"
CANVAS = (160, 120)
NUM_PLACES = 5  # requests that run or wait
WIDE, NARROW = {"width": 1280, "height": 820}, {"width": 400, "height": 760}
# What Chromium itself writes to the console of an answer that is an error, or that does not come.
REFUSALS = re.compile(r"Failed to load resource: (net::ERR_FAILED|.* a status of 4\d\d)")
AXE_RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


class TwoServers(Served):
    """An engine with an open HTTP server and one that requires a key."""

    async def _start(self) -> None:
        await super()._start()
        self.others: list[str] = []
        self.open = HttpServer("127.0.0.1", 0)
        self.locked = HttpServer("127.0.0.1", 0, ApiKeys([KEY]))
        self.url = f"http://{await self.open.start(self.engine, CallTracker())}"
        self.locked_url = f"http://{await self.locked.start(self.engine, CallTracker())}"

    def begin(self, name: str, max_tokens: int = 3500) -> Future[None]:
        """A long request of somebody else."""
        self.others.append(name)

        async def read() -> None:
            params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
            prompt = {"prompt": "Tell me about the sea. " * 8}
            async for _ in self.engine.generate(prompt, params, request_id=name):
                pass

        return asyncio.run_coroutine_threadsafe(read(), self.loop)

    def end_others(self) -> None:
        for name in self.others:
            self.run(self.engine.abort(name))
        self.others.clear()
        self.wait_empty()

    def close(self) -> None:
        self.run(self.open.drain(1.0))
        self.run(self.locked.drain(1.0))
        super().close()


@pytest.fixture(scope="module")
def served() -> Iterator[TwoServers]:
    served = TwoServers(
        EMBEDDED_MODEL,
        dtype="float32",
        max_model_len=4096,
        kv_cache_memory_bytes=32 << 20,
        max_num_seqs=NUM_PLACES - 1,
        max_queue_len=1,
    )
    yield served
    served.wait_empty()
    served.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    expect.set_options(timeout=20_000)  # milliseconds: machines may be busy
    with chromium(viewport=WIDE, reduced_motion="no-preference") as context:
        context.set_default_timeout(20_000)
        yield context


@pytest.fixture
def page(browser: Any, served: TwoServers) -> Iterator[Any]:
    """The open server's page in a new tab. It may use no other server, and nothing may fail."""
    tab = browser.new_page()
    asked: list[str] = []
    wrong: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
    tab.goto(served.url)
    expect(tab.locator("#model")).to_have_text("embedded")
    tab.fill("#temperature", "0", force=True)
    yield tab
    tab.close()
    served.end_others()
    here = (served.url, served.locked_url, f"blob:{served.url}", f"blob:{served.locked_url}")
    assert asked and [url for url in asked if not url.startswith(here)] == []
    assert [text for text in wrong if not REFUSALS.match(text)] == []


@pytest.fixture(scope="module")
def star() -> tuple[str, str, bytes]:
    buffer = io.BytesIO()
    draw_shape(np.random.default_rng(20), CANVAS, "purple", "star").image.save(buffer, "PNG")
    return "star.png", "image/png", buffer.getvalue()


def carry(page: Any, *files: tuple[str, str, bytes]) -> Any:
    """A browser's own DataTransfer with files."""
    coded = [[name, kind, base64.b64encode(data).decode()] for name, kind, data in files]
    return page.evaluate_handle(
        """files => {
            const transfer = new DataTransfer();
            for (const [name, type, data] of files) {
                const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0));
                transfer.items.add(new File([bytes], name, { type }));
            }
            return transfer;
        }""",
        coded,
    )


def drop(page: Any, *files: tuple[str, str, bytes]) -> None:
    transfer = {"dataTransfer": carry(page, *files)}
    page.dispatch_event("#scroll", "dragover", transfer)
    assert "dropping" in page.locator("#chat").get_attribute("class")
    page.dispatch_event("#scroll", "drop", transfer)
    assert page.locator("#chat").get_attribute("class") == ""


def answer(page: Any, index: int = -1) -> Any:
    return page.locator(".turn.answer").nth(index).locator(".text")


def ask(page: Any, question: str) -> None:
    page.fill("#message", question)
    page.press("#message", "Enter")
    expect(page.locator("#stop")).to_be_hidden()


@contextlib.contextmanager
def long_answers(page: Any) -> Iterator[None]:
    """The page's requests go on to the server, but no end token ends them."""

    def lengthen(route: Any) -> None:
        body = {**route.request.post_data_json, "ignore_eos": True, "max_tokens": 3500}
        route.continue_(post_data=body)

    page.route("**/v1/chat/completions", lengthen)
    yield
    page.unroute("**/v1/chat/completions")


# The chat


def test_drop_an_image_type_and_read_the_streamed_answer(page: Any, star: Any) -> None:
    drop(page, star)
    expect(page.locator("#files img")).to_have_attribute("alt", "star.png")
    ask(page, "What color is the shape?")
    expect(answer(page)).to_have_text("purple")
    expect(page.locator(".turn.user img")).to_have_js_property("naturalWidth", CANVAS[0])
    expect(page.locator("#files li")).to_have_count(0)
    drop(page, star)  # in the same conversation
    ask(page, "What shape is it?")
    expect(answer(page)).to_have_text("star")
    end = "e => e.scrollHeight - e.scrollTop - e.clientHeight"
    assert page.locator("#scroll").evaluate("e => e.scrollHeight > e.clientHeight")
    wait_for(lambda: page.locator("#scroll").evaluate(end) < 2)  # it stays in sight
    page.click("#new")
    expect(page.locator(".turn")).to_have_count(0)
    ask(page, "Who are you?")
    expect(answer(page)).to_contain_text("Octavo")
    pieces = answer(page).evaluate("element => element.childNodes.length")
    assert pieces > 3  # each came by itself


def test_a_video_is_dropped_an_image_pasted_and_one_picked(
    page: Any, star: Any, tmp_path: Path
) -> None:
    path = tmp_path / "moving.mp4"
    rng = np.random.default_rng(20)
    save_mp4(path, [each.image for each in draw_motion(rng, CANVAS, "left", 8)])
    drop(page, ("moving.mp4", "video/mp4", path.read_bytes()))
    expect(page.locator("#files video")).to_have_attribute("aria-label", "moving.mp4")
    ask(page, "Which way does the shape move?")
    expect(answer(page)).to_have_text("left")
    page.click("#new")
    page.evaluate(
        """clipboardData => document.getElementById("message").dispatchEvent(
            new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true }))""",
        carry(page, star),
    )
    expect(page.locator("#files img")).to_have_count(1)
    with page.expect_file_chooser() as chooser:
        page.click("#attach")
    square = draw_shape(rng, CANVAS, "red", "square").image
    square.save(tmp_path / "square.png")
    chooser.value.set_files(tmp_path / "square.png")
    expect(page.locator("#files img")).to_have_count(2)
    ask(page, "Which image shows the red square?")
    expect(answer(page)).to_have_text("the second")


def test_what_cannot_be_sent_is_said_and_what_is_attached_can_be_removed(
    page: Any, star: Any
) -> None:
    drop(page, ("notes.txt", "text/plain", b"?"), star, ("a.svg", "image/svg+xml", b"<svg/>"))
    expect(page.locator("#notice")).to_contain_text("notes.txt: only images")
    expect(page.locator("#notice")).to_contain_text("a.svg: only images")
    expect(page.locator("#files li")).to_have_count(1)
    page.click("text=×")
    expect(page.locator("#files li")).to_have_count(0)
    expect(page.locator("#message")).to_be_focused()
    drop(page, ("torn.png", "image/png", b"no image at all"))
    ask(page, "What is it?")
    problem = page.locator(".turn.answer .problem")
    expect(problem).to_contain_text("The server rejected the request: ")
    expect(problem).to_contain_text("messages[0].content[0]")
    ask(page, "Who are you?")  # what was refused is not asked again
    expect(answer(page)).to_contain_text("Octavo")


def test_stop_ends_the_request(page: Any, served: TwoServers) -> None:
    with long_answers(page):
        for end in (lambda: page.click("#stop"), lambda: page.keyboard.press("Escape")):
            page.fill("#message", "Who are you?")
            page.click("#send")
            expect(page.locator("#send")).to_be_hidden()
            expect(answer(page)).not_to_be_empty()
            assert served.engine.engine.has_requests
            end()
            expect(page.locator(".turn.answer").last.locator(".after")).to_have_text("Stopped.")
            served.wait_empty()
            expect(page.locator("#message")).to_be_focused()
    ask(page, "Who are you?")  # after what was made until then


def test_a_busy_server_is_said_and_asked_again(page: Any, served: TwoServers) -> None:
    names = [f"other-{i}" for i in range(NUM_PLACES)]
    for name in names:
        served.begin(name)
    wait_for(lambda: len(served.engine._streams) == NUM_PLACES)
    ask(page, "Who are you?")
    expect(page.locator(".turn.answer .problem")).to_contain_text("The server is busy")
    served.end_others()
    page.get_by_role("button", name="Try again").click()
    expect(answer(page)).to_contain_text("Octavo")
    expect(page.locator(".problem")).to_have_count(0)
    expect(page.locator(".turn")).to_have_count(2)


def test_a_lost_server_is_said(page: Any) -> None:
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page, "Who are you?")
    expect(page.locator(".problem")).to_have_text("The server cannot be reached.")


def test_what_is_written_is_never_markup(page: Any) -> None:
    bad = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    chunk = '{"choices":[{"delta":{"content":%s},"finish_reason":"stop"}]}'
    body = "data: " + chunk % f'"{bad}"' + "\n\ndata: [DONE]\n\n"
    kind = "text/event-stream"
    page.route("**/chat/completions", lambda route: route.fulfill(body=body, content_type=kind))
    ask(page, bad)
    expect(answer(page)).to_have_text(bad)
    expect(page.locator(".turn.user .text")).to_have_text(bad)
    assert page.locator("#turns img, #turns script").count() == 0


# Who may


def test_a_key_is_asked_for_and_kept_in_the_tab(page: Any, served: TwoServers) -> None:
    looks: list[str] = []
    page.on("request", lambda asked: looks.append(asked.url) if "snapshot" in asked.url else None)
    page.clock.install()
    page.goto(served.locked_url)
    expect(page.locator("#keys")).to_be_visible()
    expect(page.locator("#key")).to_be_focused()
    expect(page.locator("#state")).to_have_text("The live view requires the API key.")
    page.keyboard.press("Escape")
    expect(page.locator("#model")).to_have_text("This server requires an API key.")
    page.clock.fast_forward(60_000)
    page.wait_for_timeout(300)
    expect(page.locator("#keys")).to_be_hidden()  # the live view opens none
    assert len([url for url in looks if url.startswith(served.locked_url)]) == 1  # nor asks again
    page.fill("#message", "Who are you?")
    page.press("#message", "Enter")
    expect(page.locator("#keys")).to_be_visible()
    page.keyboard.type("not-a-key-of-it")
    page.keyboard.press("Enter")
    expect(page.locator("#key-wrong")).to_have_text("Invalid API key.")
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#keys")).to_be_hidden()
    expect(page.locator("#model")).to_have_text("embedded")
    expect(answer(page)).to_contain_text("Octavo")  # what was asked before
    expect(page.locator("#state")).to_have_text("Idle.")
    page.reload()
    expect(page.locator("#model")).to_have_text("embedded")
    kept = page.evaluate("[{...sessionStorage}, {...localStorage}, document.cookie]")
    assert kept == [{"octavo-key": KEY}, {}, ""]
    other = page.context.new_page()
    other.goto(served.locked_url)
    expect(other.locator("#keys")).to_be_visible()
    other.close()


# The engine


def test_the_live_view_shows_who_runs_and_who_has_which_block(
    page: Any, served: TwoServers
) -> None:
    names = ["first", "second"]
    for name in names:
        served.begin(name)
    rows = page.locator("#requests tr")
    expect(rows).to_have_count(2)
    expect(rows.first).to_contain_text("first")
    expect(rows.first).to_contain_text("decode")
    expect(page.locator("#running")).to_have_text("2")
    expect(page.locator("#state")).to_have_text("Working.")
    label = re.compile(r"blocks of 16 tokens are in use, \d+ shared, .* second uses \d+ alone")
    expect(page.locator("#blocks")).to_have_attribute("aria-label", label)
    label = re.compile("prefill tokens, [1-9]")
    expect(page.locator("#steps")).to_have_attribute("aria-label", label)
    expect(page.locator("#told")).to_have_text(re.compile(r"\d running, \d waiting\."))
    colors = [each.evaluate("e => getComputedStyle(e).backgroundColor") for each in
              rows.locator(".swatch").all()]  # fmt: skip
    assert len(set(colors)) == 2
    assert set(colors) <= set(page.locator("#blocks").evaluate(COLORS))
    served.end_others()
    expect(rows).to_have_count(0)
    expect(page.locator("#none")).to_be_visible()
    expect(page.locator("#blocks")).to_have_attribute("aria-label", re.compile("^0 of "))
    assert not set(colors) & set(page.locator("#blocks").evaluate(COLORS))


COLORS = """canvas => {
    const copy = new OffscreenCanvas(canvas.width, canvas.height);
    const to = copy.getContext("2d", { willReadFrequently: true });
    to.drawImage(canvas, 0, 0);
    const { data } = to.getImageData(0, 0, canvas.width, canvas.height);
    const found = new Set();
    for (let i = 0; i < data.length; i += 4) found.add(`rgb(${data[i]}, ${data[i+1]}, ${data[i+2]})`);
    return [...found];
}"""  # noqa: E501


def test_no_one_looks_while_the_view_is_closed(page: Any, served: TwoServers) -> None:
    with page.expect_response("**/engine/snapshot*"):
        pass
    page.click("#toggle")
    expect(page.locator("#engine")).to_be_hidden()
    page.wait_for_timeout(300)  # for a look that was on its way
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(1200)
    assert asked == []
    with page.expect_response("**/engine/snapshot*"):
        page.click("#toggle")


# For everybody


def test_the_keyboard_does(page: Any) -> None:
    """All of it in a sensible order, and where one is can be seen."""
    passed = []
    for _ in range(9):
        page.keyboard.press("Tab")
        passed.append(page.evaluate("document.activeElement.id || document.activeElement.className"
                                    " || document.activeElement.tagName"))  # fmt: skip
        style = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert style == "solid", passed[-1]
    order = ["skip", "new", "toggle", "scroll", "message", "attach", "SUMMARY", "send", "engine"]
    assert passed[:8] == order[:8]
    page.focus(".skip")
    page.keyboard.press("Enter")
    expect(page.locator("#message")).to_be_focused()
    page.keyboard.type("Who")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("are you?")
    assert page.input_value("#message") == "Who\nare you?"
    page.keyboard.press("Enter")
    expect(answer(page)).to_contain_text("Octavo")
    expect(page.locator("#message")).to_be_focused()
    page.focus("#toggle")
    page.keyboard.press("Enter")
    expect(page.locator("#engine")).to_be_hidden()
    expect(page.locator("#toggle")).to_have_attribute("aria-expanded", "false")


def test_an_answer_is_read_in_sentences(page: Any, served: TwoServers) -> None:
    """Not token by token: what a screen reader is given, as often as it is."""
    page.evaluate(
        """() => {
            window.said = [];
            const region = document.getElementById("spoken");
            new MutationObserver(() => window.said.push(region.textContent))
                .observe(region, { childList: true });
        }"""
    )
    expect(page.locator("#spoken")).to_have_attribute("role", "status")  # polite
    assert page.locator("#turns").get_attribute("aria-live") is None
    ask(page, "Who are you?")
    expect(page.locator("#spoken")).to_contain_text("Octavo")
    assert page.evaluate("window.said.length") == 1
    assert page.locator("#spoken").text_content() == answer(page).text_content()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(page: Any, served: TwoServers, star: Any, scheme: str) -> None:
    """Labels, roles, contrast and more, of both schemes and widths, with requests and a dialog."""
    axe = Axe()
    page.emulate_media(color_scheme=scheme)
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", light)[0]) > 128) == (scheme == "light")
    served.begin("long")
    drop(page, star)
    ask(page, "What color is the shape?")
    drop(page, star, ("notes.txt", "text/plain", b"?"))
    expect(page.locator("#requests tr")).to_have_count(1)
    page.click("summary")

    def check() -> None:
        options = {"runOnly": {"type": "tag", "values": AXE_RULES}}
        found = axe.run(page, options=options).response
        assert found["violations"] == [] and len(found["passes"]) > 20
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    check()
    page.set_viewport_size(NARROW)
    check()
    page.click("#toggle")
    check()
    served.end_others()
    page.goto(served.locked_url)
    expect(page.locator("#keys")).to_be_visible()
    check()
    page.set_viewport_size(WIDE)
