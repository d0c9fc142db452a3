"""The demo page in a real browser, on the real gateway."""

import json
import os
import re
import shutil
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import pytest
import requests
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    FilePayload,
    JSHandle,
    Locator,
    Page,
    Request,
    Route,
    ViewportSize,
    expect,
    sync_playwright,
)

from tests import skip
from tests.gateway.conftest import Served
from tests.server.colours import LABELS, encoded

PATIENCE_MS = 30_000  # for one answer: the machine may be busy
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# As root there is no sandbox; the rest keeps Chromium from looking for its maker's hosts.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
TRANSFER = """(files) => {
    const transfer = new DataTransfer();
    for (const [name, base64] of files) {
        const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
        transfer.items.add(new File([bytes], name, { type: "image/jpeg" }));
    }
    return transfer;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not path:
        skip("no Chromium on this machine (Debian: chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Visit:
    """The page as a visitor has it open, and what the browser has to say about it."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.asked: list[str] = []  # every URL
        self.predicting: set[Request] = set()
        self.most_predicting = 0
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", self._started)
        page.on("requestfinished", self._ended)
        page.on("requestfailed", self._ended)
        page.goto(url)
        expect(page.locator("#model")).to_contain_text("classes")

    def _heard(self, line: ConsoleMessage) -> None:
        if line.type == "error":
            self.complaints.append(line.text)

    def _started(self, request: Request) -> None:
        self.asked.append(request.url)
        if "/predict" in request.url:
            self.predicting.add(request)
            self.most_predicting = max(self.most_predicting, len(self.predicting))

    def _ended(self, request: Request) -> None:
        self.predicting.discard(request)

    def choose(self, *files: tuple[str, bytes]) -> None:
        """Choose files, by name and content, in the browser's dialog."""
        listed = [
            FilePayload(name=name, mimeType="image/jpeg", buffer=body) for name, body in files
        ]
        self.page.set_input_files("#files", listed)

    def transfer(self, *files: tuple[str, bytes]) -> JSHandle:
        """Such files as they are dragged or pasted."""
        listed = [(name, b64encode(body).decode()) for name, body in files]
        return self.page.evaluate_handle(TRANSFER, listed)

    def card(self, name: str) -> Locator:
        heading = self.page.get_by_role("heading", name=name, exact=True)
        return self.page.locator("#list > li").filter(has=heading)

    def expect_best(self, name: str, label: str) -> Locator:
        """Wait until the image of this name has this class on top."""
        best = self.card(name).locator(".classes li").first
        expect(best).to_contain_text(label)
        expect(best).to_contain_text("%")
        return best


@pytest.fixture
def visit(browser: Browser, gateway: Served, tmp_path: Path) -> Iterator[Visit]:
    """A visit that ends without complaints of the browser, and leaves a picture in tmp_path."""
    context = browser.new_context(viewport={"width": 1000, "height": 760})
    context.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    visit = Visit(context.new_page(), f"{gateway.url}/")
    yield visit
    visit.page.screenshot(path=tmp_path / "page.png", full_page=True)
    context.close()
    # Chromium also writes down each status over 399, which some tests ask for.
    assert [line for line in visit.complaints if not line.startswith("Failed to load")] == []
    hosts = {urlsplit(url).netloc for url in visit.asked if not url.startswith(("blob:", "data:"))}
    assert hosts == {urlsplit(gateway.url).netloc}


def test_a_dropped_image_is_classified(visit: Visit) -> None:
    drop = visit.page.locator("#drop")
    data = {"dataTransfer": visit.transfer(("leaf.jpg", encoded("green")))}
    drop.dispatch_event("dragover", data)
    expect(drop).to_have_class("drop over")
    drop.dispatch_event("drop", data)
    visit.expect_best("leaf.jpg", "green")
    expect(drop).to_have_class("drop")


def test_a_pasted_image_is_classified(visit: Visit) -> None:
    visit.page.evaluate(
        "(data) => dispatchEvent(new ClipboardEvent('paste', { clipboardData: data }))",
        visit.transfer(("image.png", encoded("blue", "PNG"))),
    )
    visit.expect_best("image.png", "blue")


def test_the_card_says_what_the_api_says(visit: Visit, gateway: Served) -> None:
    body = encoded("red", size=(300, 200))
    visit.choose(("rose.jpg", body))
    best = visit.expect_best("rose.jpg", "red")
    answer = requests.post(f"{gateway.url}/predict", data=body, timeout=60).json()
    confidence = answer["predictions"][0]["confidence"]
    expect(best.locator(".share")).to_have_text(f"{confidence:.1%}")
    assert best.locator(".bar").evaluate(
        "(bar) => Number(bar.style.getPropertyValue('--share'))"
    ) == pytest.approx(confidence, abs=1e-5)
    card = visit.card("rose.jpg")
    expect(card.locator(".classes li")).to_have_count(len(LABELS))
    metadata = answer["metadata"]
    for term, fact in {
        "Size": "300 × 200",
        "Model": f"{metadata['model']} {metadata['version']}",
        "Engine": f"{metadata['engine']}, {metadata['device']}",
        "Weights": metadata["weights"],
    }.items():
        expect(card.locator("dl div").filter(has_text=term)).to_have_text(f"{term}{fact}")
    for term in ("Inference", "Round trip"):
        expect(card.locator("dl div").filter(has_text=term)).to_contain_text(" ms")
    expect(card.get_by_role("img")).to_have_accessible_name("Your image rose.jpg: red")
    expect(visit.page.locator("#untrained")).to_be_hidden()
    expect(visit.page.get_by_role("status")).to_contain_text("rose.jpg: red")


def test_why_is_shown_when_asked(visit: Visit) -> None:
    visit.choose(("rose.jpg", encoded("red")))
    visit.expect_best("rose.jpg", "red")
    overlay = visit.card("rose.jpg").get_by_role("img", name="What speaks for red, in yellow")
    expect(overlay).to_have_count(0)
    toggle = visit.page.get_by_label("Show why")
    toggle.check()
    expect(overlay).to_be_visible()
    expect(visit.card("rose.jpg")).to_contain_text("Yellow speaks most for red")
    assert overlay.evaluate("(image) => image.decode().then(() => image.naturalWidth)") == 224
    toggle.uncheck()
    expect(overlay).to_have_count(0)
    visit.expect_best("rose.jpg", "red")


def test_several_images_keep_their_order_and_a_few_go_at_once(visit: Visit) -> None:
    labels = [LABELS[index % 3] for index in range(9)]
    names = [f"{index} {label}.jpg" for index, label in enumerate(labels)]
    visit.choose(*((name, encoded(label)) for name, label in zip(names, labels, strict=True)))
    expect(visit.page.locator("#progress")).to_have_text("9 of 9 classified")
    assert visit.page.locator("#list h3").all_text_contents() == names
    for name, label in zip(names, labels, strict=True):
        visit.expect_best(name, label)
    assert 1 < visit.most_predicting <= 4


def test_an_error_is_shown_as_the_api_says_it(visit: Visit, gateway: Served) -> None:
    body, name = b"This is a text.", '<img src="x" onerror="alert(1)">.jpg'
    error = requests.post(f"{gateway.url}/predict", data=body, timeout=60).json()
    visit.choose((name, body), ("leaf.jpg", encoded("green")))
    visit.expect_best("leaf.jpg", "green")
    state = visit.card(name).locator(".state")
    expect(state).to_have_text(f"{error['message']} ({error['code']})")
    expect(visit.page.locator("#progress")).to_have_text("1 of 2 classified, 1 failed")


def test_a_body_over_the_limit_is_refused_in_words(visit: Visit, tmp_path: Path) -> None:
    huge = tmp_path / "huge.jpg"
    huge.write_bytes(bytes(40 * 2**20))
    visit.page.set_input_files("#files", huge)
    expect(visit.card("huge.jpg").locator(".state")).to_contain_text("bytes (413)")


def test_by_keyboard_alone(visit: Visit) -> None:
    page = visit.page
    page.on("filechooser", lambda _: None)  # dialogs are caught from now on, not from Enter on
    page.keyboard.press("Tab")
    expect(page.locator("#files")).to_be_focused()
    assert page.locator("#drop").evaluate("(drop) => getComputedStyle(drop).outlineStyle") != "none"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    files = [FilePayload(name="sea.jpg", mimeType="image/jpeg", buffer=encoded("blue"))]
    chooser.value.set_files(files)
    visit.expect_best("sea.jpg", "blue")
    page.keyboard.press("Tab")
    expect(page.get_by_label("Classes per image")).to_be_focused()
    page.keyboard.press("Home")
    expect(visit.card("sea.jpg").locator(".classes li")).to_have_count(1)
    page.keyboard.press("Tab")
    expect(page.get_by_label("Show why")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Clear")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#list > li")).to_have_count(0)
    expect(page.locator("#files")).to_be_focused()


def test_a_rate_limit_is_waited_for_in_sight(visit: Visit) -> None:
    body = {"status": "error", "code": 429, "type": "TooManyRequests", "message": "too many"}

    def refuse(route: Route) -> None:
        headers = {"Retry-After": "2", "Content-Type": "application/json"}
        route.fulfill(status=429, headers=headers, body=json.dumps(body))

    visit.page.route("**/predict*", refuse, times=1)
    visit.choose(("leaf.jpg", encoded("green")))
    state = visit.card("leaf.jpg").locator(".state")
    expect(state).to_have_text("too many (429). Next attempt in 2 s")
    visit.expect_best("leaf.jpg", "green")


def test_a_lost_network_is_said_and_the_image_can_be_tried_again(visit: Visit) -> None:
    visit.page.context.set_offline(True)
    visit.choose(("leaf.jpg", encoded("green")))
    card = visit.card("leaf.jpg")
    expect(card.locator(".state")).to_contain_text("cannot be reached")
    visit.page.context.set_offline(False)
    card.get_by_role("button", name="Try again").click()
    visit.expect_best("leaf.jpg", "green")


def test_a_key_is_asked_for_and_stays_in_the_tab(visit: Visit) -> None:
    page = visit.page
    body = {"status": "error", "code": 401, "type": "Unauthorized", "message": "a key is needed"}

    def check(route: Route) -> None:
        if route.request.headers.get("x-api-key") == "open sesame":
            route.continue_()
        else:
            route.fulfill(status=401, content_type="application/json", body=json.dumps(body))

    page.route("**/predict*", check)
    field = page.get_by_label("This server asks for an API key")
    expect(field).to_be_hidden()
    visit.choose(("leaf.jpg", encoded("green")))
    expect(visit.card("leaf.jpg").locator(".state")).to_have_text("a key is needed (401)")
    field.fill("open sesame")
    page.keyboard.press("Enter")
    visit.expect_best("leaf.jpg", "green")
    expect(field).to_be_hidden()
    assert not any("sesame" in url for url in [page.url, *visit.asked])
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]


def test_untrained_weights_are_warned_of(visit: Visit) -> None:
    def untrain(route: Route) -> None:
        answer = route.fetch()
        metadata = answer.json()["metadata"] | {"weights": "untrained"}
        route.fulfill(response=answer, body=json.dumps(answer.json() | {"metadata": metadata}))

    visit.page.route("**/predict*", untrain)
    visit.choose(("leaf.jpg", encoded("green")))
    expect(visit.page.get_by_text("The answers mean nothing")).to_be_visible()


def code_of(visit: Visit, name: str, client: str) -> str:
    """What the card's button copies."""
    code = visit.card(name).locator(".code")
    if code.get_attribute("open") is None:
        code.locator("summary").click()
    code.get_by_role("button", name=client, exact=True).click()
    code.get_by_role("button", name="Copy", exact=True).click()
    expect(code.get_by_role("button", name="Copied")).to_be_visible()
    return str(visit.page.evaluate("navigator.clipboard.readText()"))


@pytest.mark.parametrize("client", ["curl", "Python", "V2 over HTTP"])
@pytest.mark.parametrize("has_key", [False, True])
def test_the_code_that_is_copied_works(
    visit: Visit, tmp_path: Path, client: str, has_key: bool
) -> None:
    """With a name that shells would read otherwise; the key comes from the environment."""
    name = """it's "$HOME" {a,b}.jpg"""
    visit.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    if has_key:
        visit.page.evaluate("sessionStorage.setItem('api-key', 'open sesame')")
    visit.choose((name, encoded("blue")))
    visit.expect_best(name, "blue")
    visit.page.get_by_label("Classes per image").select_option("2")
    text = code_of(visit, name, client)
    assert ("API_KEY" in text) == has_key
    assert "sesame" not in text
    (tmp_path / name).write_bytes(encoded("blue"))
    command = ["bash", "-c"] if client == "curl" else [sys.executable, "-c"]
    environ = os.environ | {"API_KEY": "open sesame", "no_proxy": "*"}
    done = subprocess.run(
        [*command, text], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    labels = re.findall(r"""['"](red|green|blue)['"]""", done.stdout)
    assert (labels[0], len(labels)) == ("blue", 2), done.stdout


def test_the_code_for_grpc_says_what_the_page_cannot_know(visit: Visit) -> None:
    visit.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    visit.choose(("leaf.jpg", encoded("green")))
    visit.expect_best("leaf.jpg", "green")
    text = code_of(visit, "leaf.jpg", "V2 over gRPC")
    compile(text, "code", "exec")
    assert "GATEWAY_GRPC_PORT" in text
    assert '"127.0.0.1:"' in text
    assert '"mobilenet_v2"' in text


def test_clear_ends_what_is_under_way(visit: Visit) -> None:
    visit.page.route("**/predict*", lambda route: None)  # no answer, ever
    visit.choose(*((f"{index}.jpg", encoded("red")) for index in range(6)))
    expect(visit.page.locator('[data-state="busy"]')).to_have_count(4)
    with visit.page.expect_event("requestfailed"):
        visit.page.get_by_role("button", name="Clear").click()
    expect(visit.page.locator("#results")).to_be_hidden()
    visit.page.unroute("**/predict*")
    visit.choose(("leaf.jpg", encoded("green")))
    visit.expect_best("leaf.jpg", "green")
    assert not visit.predicting


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_for_axe_to_find(visit: Visit, scheme: Literal["light", "dark"]) -> None:
    """WCAG 2.2 A and AA as far as a program can tell, contrast included."""
    page = visit.page
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.evaluate(
        "for (const id of ['key-form', 'untrained']) document.getElementById(id).hidden = false"
    )
    for name, body in (("leaf.jpg", encoded("green")), ("notes.jpg", b"This is a text.")):
        visit.choose((name, body))
    expect(page.locator("#progress")).to_have_text("1 of 2 classified, 1 failed")
    visit.card("leaf.jpg").locator(".code summary").click()
    page.get_by_label("Show why").check()
    expect(visit.card("leaf.jpg").locator(".reason")).to_be_visible()
    report = Axe().run(page)
    assert report.violations_count == 0, report.generate_report()


def test_a_narrow_screen_has_no_sideways_scrolling(visit: Visit) -> None:
    visit.page.set_viewport_size({"width": 320, "height": 640})
    visit.choose((f"{'long_name' * 12}.jpg", encoded("green")), ("notes.jpg", b"This is a text."))
    expect(visit.page.locator("#progress")).to_have_text("1 of 2 classified, 1 failed")
    visit.card("notes.jpg").locator(".code summary").click()
    assert visit.page.evaluate("document.documentElement.scrollWidth") == 320


def test_a_phone_offers_its_camera(browser: Browser, gateway: Served) -> None:
    size = ViewportSize(width=390, height=700)
    page = browser.new_page(viewport=size, has_touch=True, is_mobile=True)
    page.goto(f"{gateway.url}/")
    expect(page.get_by_text("Take a photo")).to_be_visible()
    page.close()
