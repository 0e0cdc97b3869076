"""The page in a real browser: pick, ask, read two answers side by side; phone width; both languages."""

import shutil

import pytest

from .conftest import running

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("needs chromium, which is not on this machine (Debian: apt-get install chromium)")
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    opened = []

    def open_(url, width=1100, lang="en-GB"):
        page = browser.new_context(viewport={"width": width, "height": 800}, locale=lang).new_page()
        page.problems = []
        page.on("console", lambda m: page.problems.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: page.problems.append(str(e)))
        page.goto(url)
        opened.append(page)
        return page

    yield open_
    for page in opened:
        page.context.close()


def ask(page, question):
    page.fill("#question", question)
    page.fill("#length", "12")
    page.click("#send")
    page.wait_for_selector("#stop:disabled", timeout=60_000)
    return page.locator("article p").all_inner_texts()


def test_base_and_adapter_answer_side_by_side(made_adapters, open_page):
    with running(made_adapters, keys=False) as server:
        page = open_page(server.url)
        page.wait_for_selector("#models input[value=tiny]")
        page.uncheck("#models input[value=derma]") if page.is_checked("#models input[value=derma]") else None
        page.check("#models input[value=cardio]")
        texts = ask(page, "睡不好怎么办")
        assert page.locator("article h2").all_inner_texts() == ["tiny", "cardio"]
        want = [server.text(m, max_tokens=12) for m in ("tiny", "cardio")]
        clean = lambda t: "".join(c for c in t if c.isalnum())  # noqa: E731  # a browser folds control characters
        assert [clean(t) for t in texts] == [clean(t) for t in want]
        assert "人工智能" in page.inner_text("#notice")
        assert page.problems == []


def test_it_speaks_both_languages_and_fits_a_phone(made_adapters, open_page):
    with running(made_adapters, keys=False) as server:
        page = open_page(server.url, width=360, lang="zh-CN")
        page.wait_for_selector("#models input")
        assert page.inner_text("#send") == "提问"
        page.click("#language")
        assert page.inner_text("#send") == "Ask"
        ask(page, "I have chest pain")
        assert "112" in page.inner_text("#emergency")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        boxes = [b.bounding_box() for b in page.locator("article").all()]
        assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]  # one below the other
        assert page.problems == []


def test_an_answer_is_text_and_never_markup(made_adapters, open_page, monkeypatch):
    with running(made_adapters, keys=False) as server:
        decode = server.service.engine.tokenizer.decode
        evil = "<img src=x onerror=alert(1)>"
        monkeypatch.setattr(
            server.service.engine.tokenizer, "decode", lambda ids, **k: evil if decode(ids, **k) else ""
        )
        page = open_page(server.url)
        page.wait_for_selector("#models input")
        assert evil in ask(page, "hi")[0]
        assert page.locator("article img").count() == 0


def test_with_keys_the_page_asks_for_one(made_adapters, open_page):
    from .conftest import USER

    with running(made_adapters) as server:
        page = open_page(server.url)
        page.wait_for_selector("#key-row:not([hidden])")
        page.fill("#key", USER)
        page.dispatch_event("#key", "change")
        page.wait_for_selector("#models input[value=tiny]")
        assert len(ask(page, "hi")) == 2
