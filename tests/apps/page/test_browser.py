"""The page in a browser: headless Chromium, where there is one (env CHROMIUM names another)."""

import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
STEPS = 8
# Gradio's own words for its streams, which end as a page is loaded anew
LEAVING = ("BodyStreamBuffer was aborted", "Connection errored out")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(server, browser):
    """The page, in a browser that remembers nothing; no error on its console, and no request elsewhere."""
    context = browser.new_context(viewport={"width": 1440, "height": 900}, accept_downloads=True)
    page = context.new_page()
    here, wrong = f"http://127.0.0.1:{server.port}", []

    def note(text):
        if not (page.leaving and any(words in text for words in LEAVING)):
            wrong.append(text)

    page.on("console", lambda told: note(told.text) if told.type == "error" else None)
    page.on("pageerror", lambda error: note(error.stack or error.message))
    page.on(
        "request", lambda asked: None if re.match(rf"{here}/|data:|blob:{here}", asked.url) else wrong.append(asked.url)
    )
    page.set_default_timeout(20_000)
    opened(page, here)
    yield page
    context.close()
    assert not wrong, "\n".join(wrong)


def opened(page, address):
    page.leaving = True
    page.goto(address)
    page.wait_for_selector("#plan .strip")
    page.leaving = False


def fold(page, title):
    """Open, or close, a part of the page."""
    page.locator("button.label-wrap", has_text=re.compile(rf"^\s*{title}")).click()


def number(page, name, value):
    field = page.locator(f"#{name} input[type=number]")
    field.fill(str(value))
    field.press("Tab")


def until(page, holds, act):
    """Do it until that holds: what is typed or clicked while Gradio still fills in fields may be lost."""
    for last in (False, False, True):
        act()
        try:
            page.wait_for_function(holds, timeout=6000)
            break
        except playwright.TimeoutError:
            if last:
                raise


def few_steps(page, steps=STEPS):
    fold(page, "Size, steps and seed")

    def fill():
        number(page, "steps", steps)
        number(page, "seed", 3)

    until(page, f"document.querySelectorAll('#plan .strip i').length == {min(steps, 400)}", fill)


def drawn(page):
    page.wait_for_selector("#state .done")
    return page.locator("#preview img").get_attribute("src")


def settings(page, address):
    """What a picture that is shown says of itself."""
    answer = page.request.get(address)
    (folder := page.files).mkdir(exist_ok=True)
    file = folder / "shown.png"
    file.write_bytes(answer.body())
    with Image.open(file) as image:
        return json.loads(image.info["mlx_deepcache"])


@pytest.fixture(autouse=True)
def _files(request, tmp_path):
    if "page" in request.fixturenames:
        request.getfixturevalue("page").files = tmp_path


def test_one_click_draws(page):
    """All that is needed is seen at once, and the prompt is filled in."""
    for part in ("prompt", "draw", "preview", "interval", "plan"):
        box = page.locator(f"#{part}").bounding_box()
        assert box["y"] + min(box["height"], 40) < 900, part
    page.locator("#draw").click()
    page.wait_for_selector("#strip .strip .todo")  # while it is drawn
    address = drawn(page)
    assert settings(page, address)["prompt"] == page.locator("#prompt textarea").input_value() == "a red apple"
    for what, count in {"#strip .strip i": 50, "#strip .todo": 0, "#strip .full": 17, "#gallery img": 1}.items():
        playwright.expect(page.locator(what)).to_have_count(count)  # once it is there: each part comes by itself
    page.wait_for_selector("#plan >> text=about")


def test_two_clicks_compare(page):
    few_steps(page)
    page.locator("#compare input").check()
    page.locator("#draw").click()
    page.wait_for_selector("#state .done")
    page.wait_for_function("document.querySelectorAll('#slider img').length == 2")
    with_cache, without = (page.locator("#slider img").nth(i).get_attribute("src") for i in range(2))
    assert with_cache != without
    playwright.expect(page.locator("#about")).to_contain_text("PSNR")
    assert not page.locator("#preview").is_visible()


def test_stop(page):
    few_steps(page, 100)
    for side in ("width", "height"):
        number(page, side, 192)  # so that there is time to stop it
    assert page.locator("#stop").is_disabled()
    page.locator("#draw").click()
    page.wait_for_selector("#state .busy >> text=step")
    page.locator("#stop").click()
    page.wait_for_selector("#state .stopped")
    assert re.match(r"stopped at step \d+ of 100", page.locator("#state").inner_text())
    page.wait_for_selector("#preview img[src$='.png']")
    assert 0 < page.locator("#strip .todo").count() < 100
    page.wait_for_function("document.querySelector('#stop').disabled")


def test_the_dial_is_live(page):
    few_steps(page)
    number(page, "interval", 4)
    page.wait_for_selector("#plan [aria-label='8 steps: 2 full, 6 cached']")
    number(page, "branch", 2)
    page.wait_for_selector("#plan [aria-label='8 steps: 2 full, 6 cached']")
    fold(page, "Prices and other caches")
    page.locator("#policy textarea").fill("depcache")
    page.wait_for_selector("#plan >> text=did you mean 'deepcache'?")
    point = page.locator("#price circle[data-cache='deepcache:interval=10']")
    point.click()
    page.wait_for_selector("#price circle.picked")
    assert page.locator("#policy textarea").input_value() == "deepcache:interval=10"
    playwright.expect(page.locator("#reason")).to_contain_text("dB at worst")
    page.wait_for_selector("#plan [aria-label='8 steps: 1 full, 7 cached']")
    page.wait_for_function("document.querySelector('#interval input[type=number]').disabled")
    page.locator("#pick").click()
    page.wait_for_selector("#reason >> text=cheapest of")


def test_keys_and_tokens(page):
    few_steps(page)
    page.locator("#prompt textarea").fill("rocket " * 80)
    page.wait_for_selector("#tokens >> text=80 of 75 tokens")
    page.get_by_label("Use all of it").check()
    page.locator("#prompt textarea").fill("a rocket")
    page.wait_for_selector("#tokens >> text=2 of 75 tokens")
    page.locator("#prompt textarea").press("Control+Enter")
    assert settings(page, drawn(page))["prompt"] == "a rocket"
    page.locator("#ideas button").nth(1).click()
    page.wait_for_function("document.querySelector('#prompt textarea').value == 'eyes'")


def test_restore_and_the_gallery(page, tmp_path):
    """A picture dropped fills the fields; one that is chosen shows its settings, and gives its seed."""
    few_steps(page)
    page.locator("#draw").click()
    address = drawn(page)
    (tmp_path / "mine.png").write_bytes(page.request.get(address).body())
    page.locator("#prompt textarea").fill("a ghost")
    number(page, "steps", 5)
    number(page, "seed", 9)
    fold(page, "Restore from a picture")
    page.locator("#restore input[type=file]").set_input_files(tmp_path / "mine.png")
    page.wait_for_selector("text=the fields are as in the picture")
    page.wait_for_selector("#plan [aria-label^='8 steps']")
    assert page.locator("#prompt textarea").input_value() == "a red apple"
    assert page.locator("#steps input[type=number]").input_value() == "8"
    assert page.locator("#seed input").input_value() == "3"
    until(page, "document.querySelector('#seed input').value == ''", page.locator("#random").click)
    page.locator("#gallery img").first.click()
    fold(page, "Settings of this picture")
    page.wait_for_selector("#settings >> text=a red apple")
    until(page, "document.querySelector('#seed input').value == '3'", page.locator("#same").click)
    page.locator("#start").click()
    page.wait_for_selector("#editor canvas")
    page.wait_for_function("document.querySelector('#editor').innerText.includes('519%')")  # as 64 pixels fit in
    page.locator("#draw").click()
    page.wait_for_function("document.querySelectorAll('#gallery img').length == 2")
    assert settings(page, drawn(page))["strength"] == 0.8


def test_painting_a_mask(page, server, tmp_path):
    """A stroke by mouse becomes a mask of the picture's own size, as many pixels as its length and width say."""
    picture = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "noise.png")
    few_steps(page)
    fold(page, "From a picture")
    page.wait_for_selector("#editor canvas")
    page.wait_for_timeout(1000)
    page.locator("#editor input[type=file]").first.set_input_files(tmp_path / "noise.png")
    page.wait_for_function("document.querySelector('#editor').innerText.includes('130%')")  # as it fits in
    page.get_by_role("button", name="Brush", exact=True).click()
    page.wait_for_timeout(300)
    seen, masks = server.service.wanted, []

    def listening(prompt, options, **about):
        if options.get("mask") is not None:
            masks.append(np.asarray(options["mask"]))
        return seen(prompt, options, **about)

    server.service.wanted = listening
    try:
        box = page.locator("#editor canvas").first.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x - 40, y)
        page.mouse.down()
        page.mouse.move(x + 40, y, steps=10)
        page.mouse.up()
        page.wait_for_timeout(1000)
        page.locator("#draw").click()
        drawn(page)
    finally:
        server.service.wanted = seen
    mask = masks[-1]
    assert mask.shape == (256, 256) and set(np.unique(mask)) == {0, 255}
    rows, columns = np.nonzero(mask)
    length, width = np.ptp(columns) + 1, np.ptp(rows) + 1
    assert length > 2 * width > 0 and abs(columns.mean() - 128) < 8 and abs(rows.mean() - 128) < 8
    assert mask.astype(bool).sum() == pytest.approx((length - width) * width + np.pi / 4 * width**2, rel=0.1)


def test_the_browser_keeps_the_fields(page, server):
    few_steps(page)
    page.locator("#prompt textarea").fill("a ghost")
    page.locator("#draw").click()
    drawn(page)
    page.wait_for_function("localStorage.getItem('mlx_deepcache') != null")
    page.wait_for_selector("#plan >> text=about")  # the last that a drawing brings; leaving before that is an error
    opened(page, f"http://127.0.0.1:{server.port}/?__theme=dark")
    page.wait_for_function("document.querySelector('#prompt textarea').value == 'a ghost'")
    page.wait_for_selector("#plan [aria-label^='8 steps']")
    playwright.expect(page.locator("body.dark")).to_have_count(1)


def test_an_error_is_told(page):
    few_steps(page)
    number(page, "width", 65)
    page.locator("#draw").click()
    toast = page.wait_for_selector("[data-testid=toast-body]")
    assert "multiple" in toast.inner_text() and "Traceback" not in toast.inner_text()


def test_a_phone(page):
    """Prompt, picture, settings: below each other, and nothing beyond the side."""
    page.set_viewport_size({"width": 390, "height": 844})
    tops = [page.locator(part).bounding_box()["y"] for part in ("#prompt", "#draw", "#preview", "#dial")]
    assert tops == sorted(tops) and tops[1] < 500
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
