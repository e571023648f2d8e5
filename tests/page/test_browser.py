"""The demo's page in headless Chromium: what a visitor sees and does."""

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from playwright.sync_api import BrowserContext, Page, expect, sync_playwright
from playwright.sync_api import TimeoutError as PlaywrightTimeout

from companion.minis.scenes import SHAPES
from companion.page import Models, serve
from companion.page.guidance_tab import EXAMPLES
from companion.pipelines.registry import load
from tests.evaluation.scene_pipelines import captioned_sd, save_scene_dit, scene_adm
from tests.page.test_page import free_port

pytestmark = pytest.mark.browser

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SECONDS = 30_000  # of patience, in milliseconds
WIDTHS = (1280, 400)  # a laptop's and a phone's


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    folder = save_scene_dit(tmp_path_factory.mktemp("pipelines") / "scenes")
    models = Models(str(folder), load(folder))
    models.distances = None
    models.evaluator = lambda images: (
        5 * torch.nn.functional.one_hot(torch.full((len(images),), 4), len(SHAPES)).float()
    )
    models.guided_names, models.guided_first = ("adm",), "adm"
    models._loaded["adm"] = scene_adm()
    page = serve(models, host="127.0.0.1", port=free_port())
    yield page.local_url
    page.close(verbose=False)


@pytest.fixture(scope="module")
def browser(chromium_path, tmp_path_factory) -> Iterator[BrowserContext]:
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=chromium_path,
            args=FLAGS,
            viewport={"width": 1366, "height": 768},
            permissions=["clipboard-read", "clipboard-write"],
        )
        yield context
        context.close()


@pytest.fixture
def page(browser, address) -> Iterator[Page]:
    """A fresh visit; it ends with what must hold for every visit: no console errors, nothing fetched from elsewhere."""
    complaints: list[str] = []
    page = browser.new_page()
    page.set_default_timeout(SECONDS)
    page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request",
        lambda request: None if request.url.startswith((address, "data:", "blob:")) else complaints.append(request.url),
    )
    page.goto(address)
    expect(button(page, "Generate")).to_be_enabled(timeout=SECONDS)
    yield page
    page.close()
    assert complaints == []


def resize(page: Page, width: int, height: int = 850) -> None:
    """A window of that size, in which nothing sticks out to the right once what depends on the width has moved."""
    page.set_viewport_size({"width": width, "height": height})
    page.wait_for_function("document.documentElement.scrollWidth <= window.innerWidth")


def button(page: Page, name: str) -> Any:
    return page.get_by_role("button", name=name, exact=True)


def set_number(page: Page, label: str, value: str) -> None:
    page.get_by_label(label).locator("visible=true").fill(value)
    page.get_by_label(label).locator("visible=true").press("Tab")


def generate(page: Page, steps: str = "8") -> None:
    set_number(page, "Steps (1–1000)", steps)
    button(page, "Generate").click()


def open_tab(page: Page, name: str) -> None:
    """Choose a tab; on a phone the last ones are in a menu, which takes a moment to appear."""
    try:
        page.get_by_role("tab", name=name).click(timeout=3000)
    except PlaywrightTimeout:
        page.locator(".overflow-menu > button").locator("visible=true").first.click()
        page.locator(".overflow-dropdown button", has_text=name).click()


def status(page: Page) -> Any:
    return page.locator("#status .status")


def pictures(page: Page, side: str) -> Any:
    return page.locator(f"#gallery-{side} .grid-container img")


def test_generate_compare_and_copy(page, tmp_path):
    assert not page.locator("#slider").is_visible()  # nothing to compare yet
    generate(page)
    expect(status(page)).to_contain_text("Done: both sides in", timeout=SECONDS)
    for side in ("without", "with_reg"):
        expect(pictures(page, side)).to_have_count(8)
        expect(page.locator(f"#bar-{side}")).to_contain_text("8 steps in")
    expect(page.locator("#gallery-with_reg")).to_contain_text("✓ heart")
    expect(page.locator("#gallery-with_reg")).to_contain_text("✗ heart")
    expect(page.locator("#measured")).to_contain_text("2 of 8")
    expect(page.locator("#measured")).to_contain_text("MiB")
    expect(button(page, "Generate")).to_be_enabled()
    expect(button(page, "Cancel")).to_be_disabled()

    # The first pair is shown; another is chosen in either gallery.
    difference = page.locator("#difference img")
    first = difference.get_attribute("src")
    expect(page.locator("#slider img")).to_have_count(2)
    page.locator("#gallery-without .grid-container button").nth(2).click()
    expect(difference).not_to_have_attribute("src", first)
    for side in ("without", "with_reg"):
        expect(page.locator(f"#gallery-{side} .grid-container button").nth(2)).to_have_class(re.compile("selected"))

    # Dragging the handle uncovers one picture and covers the other.
    page.locator("#slider").scroll_into_view_if_needed()
    box = page.locator("#slider img").first.bounding_box()
    middle = box["y"] + box["height"] / 2
    before = page.locator("#slider").screenshot()
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.9, middle, steps=4)
    page.mouse.up()
    assert page.locator("#slider").screenshot() != before

    page.locator("#script button[title*='opy'], #script button[aria-label*='opy']").first.click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert "companion.load(" in copied and "num_inference_steps=8" in copied
    compile(copied, "copied", "exec")


def test_cancel_keeps_the_pictures_so_far(page):
    generate(page, "1000")
    expect(status(page)).to_contain_text("Sampling with CFG")
    expect(pictures(page, "without").first).to_be_visible(timeout=SECONDS)
    expect(button(page, "Generate")).to_be_disabled()
    began = time.monotonic()
    button(page, "Cancel").click()
    expect(status(page)).to_contain_text(re.compile(r"Cancelled at step \d+ of 1000"))
    assert time.monotonic() - began < 5
    expect(pictures(page, "without")).to_have_count(8)
    generate(page)  # and it goes on working
    expect(status(page)).to_contain_text("Done", timeout=SECONDS)


def test_bad_input_is_said_and_costs_no_picture(page):
    generate(page, "4")
    expect(status(page)).to_contain_text("Done", timeout=SECONDS)
    before = [pictures(page, "with_reg").nth(i).get_attribute("src") for i in range(8)]
    for steps, got in (("0", "0"), ("1000000", "1000000"), ("", "nothing")):
        began = time.monotonic()
        generate(page, steps)
        expect(status(page)).to_have_text(f"steps must be a whole number from 1 to 1000, got {got}")
        expect(page.locator(".toast-body").last).to_contain_text("steps must be a whole number")
        assert time.monotonic() - began < 5
        expect(button(page, "Generate")).to_be_enabled()
        assert [pictures(page, "with_reg").nth(i).get_attribute("src") for i in range(8)] == before
        page.locator(".toast-close").last.click()

    model = page.get_by_label("Model: choose, or type a folder or hub name")
    model.fill("mini-dot")
    model.press("Enter")
    expect(status(page)).to_contain_text("model 'mini-dot' is not known")
    expect(pictures(page, "with_reg")).to_have_count(8)


def test_two_visitors_at_once(page, browser, address):
    other = browser.new_page()
    other.goto(address)
    expect(button(other, "Generate")).to_be_enabled(timeout=SECONDS)
    generate(page, "400")
    expect(status(page)).to_contain_text("Sampling")
    generate(other, "4")
    expect(status(other)).to_contain_text("Waiting: one run is ahead of you.")
    expect(status(other)).to_contain_text("Done", timeout=2 * SECONDS)
    expect(status(page)).to_contain_text("Done")
    for visitor in (page, other):
        expect(pictures(visitor, "with_reg")).to_have_count(8)
    other.close()


def test_leaving_the_page_ends_its_run(page, browser, address):
    other = browser.new_page()
    other.goto(address)
    expect(button(other, "Generate")).to_be_enabled(timeout=SECONDS)
    generate(other, "1000")
    expect(status(other)).to_contain_text("Sampling")
    other.close()
    generate(page, "4")
    expect(status(page)).to_contain_text("Done", timeout=SECONDS)


def test_links_name_both_papers_and_the_controls_of_a_schedule_come_with_it(page):
    targets = [link.get_attribute("href") for link in page.locator("#head a").all()]
    assert targets == ["https://arxiv.org/abs/2501.18865", "https://arxiv.org/abs/2511.05844"]
    expect(page.get_by_label("Peak weight ×")).to_be_hidden()
    page.get_by_label("Guidance over time").click()
    page.get_by_role("option", name="power-cosine").click()
    expect(page.get_by_label("Peak weight ×")).to_be_visible()
    expect(page.get_by_label("From timestep")).to_be_hidden()
    set_number(page, "Peak weight ×", "")
    generate(page)
    expect(status(page)).to_have_text("peak must be a number from -10 to 10, got nothing")


def test_nothing_sticks_out_on_a_phone_or_a_laptop(page):
    resize(page, 400)
    generate(page, "2")
    expect(status(page)).to_contain_text("Done", timeout=SECONDS)
    for width, height in ((400, 850), (1280, 768)):
        resize(page, width, height)
        pictures_fit(page, width, height)


def pictures_fit(page: Page, width: int, height: int) -> None:
    for side in ("without", "with_reg"):
        boxes = [pictures(page, side).nth(i).bounding_box() for i in range(8)]
        gallery = page.locator(f"#gallery-{side}").bounding_box()
        assert all(
            gallery["x"] <= box["x"] and box["x"] + box["width"] <= gallery["x"] + gallery["width"] for box in boxes
        )
        assert min(box["width"] for box in boxes) >= (100 if width > 1000 else 60)
        captions = [page.locator(f"#gallery-{side} .caption-label").nth(i).bounding_box() for i in range(8)]
        for picture, caption in zip(boxes, captions, strict=True):  # below its picture, above the next row
            assert picture["y"] + picture["height"] <= caption["y"] + 1
            below = [box["y"] for box in boxes if box["y"] > picture["y"] + 5 and abs(box["x"] - picture["x"]) < 5]
            assert all(caption["y"] + caption["height"] <= y + 1 for y in below)
    if width > 1000:  # the button is in sight when the page opens
        page.evaluate("window.scrollTo(0, 0)")
        place = button(page, "Generate").bounding_box()
        assert place["y"] + place["height"] <= height


def loaded_width(picture: Any) -> int:
    """A picture's own width in pixels, once the browser has loaded it; the page may name it before."""
    return picture.evaluate("async image => { await image.decode(); return image.naturalWidth }")


def test_a_scale_sweep_is_drawn_and_can_be_cancelled(page):
    resize(page, 400)
    open_tab(page, "Scale sweep")
    said, begin, picture = (page.locator(f"#sweep-{name}") for name in ("status .status", "generate", "picture img"))
    expect(begin).to_be_enabled(timeout=SECONDS)
    set_number(page, "Guidance scales", "1, 4 nine")
    begin.click()
    expect(said).to_have_text("a guidance scale must be a number from 1 to 30, got 'nine'", timeout=SECONDS)
    page.locator(".toast-close").last.click()

    set_number(page, "Guidance scales", "1 4")
    set_number(page, "Steps (1–1000)", "4")
    begin.click()
    # The classifier here sees hearts, one of the four: in either column, at both scales.
    expect(said).to_contain_text("in 2 of 8 with CFG and 2 of 8 with REG", timeout=SECONDS)
    shown = picture.get_attribute("src")
    assert loaded_width(picture) > 500
    for width in WIDTHS:
        resize(page, width)

    set_number(page, "Steps (1–1000)", "1000")
    begin.click()
    expect(said).to_contain_text("Sampling at guidance scale 1", timeout=SECONDS)
    page.locator("#sweep-cancel").click()
    expect(said).to_have_text("Cancelled after 0 of 2 scales.")
    assert picture.get_attribute("src") == shown  # what was there stays
    expect(begin).to_be_enabled()


def test_exploring_follows_the_controls(page):
    resize(page, 400)
    open_tab(page, "Explore")
    left, right, line = (page.locator(f"#explore-{part}") for part in ("left img", "right img", "line .status"))
    expect(line).to_contain_text("REG is nearer than CFG", timeout=SECONDS)
    for width in WIDTHS:
        resize(page, width)
        for half in (left, right):
            assert loaded_width(half) > 300
            box = half.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width

    def changed(half: Any, before: str) -> str:
        expect(half).not_to_have_attribute("src", before, timeout=SECONDS)
        return half.get_attribute("src")

    before = left.get_attribute("src")
    set_number(page, "number input for Guidance weight w", "4")
    before = changed(left, before)
    expect(left).to_have_attribute("alt", re.compile("w = 4,"))
    page.get_by_label("no guidance").check()
    before = changed(left, before)
    seen = right.get_attribute("src")
    set_number(page, "number input for Look at t/T", "0.8")
    changed(right, seen)
    before = changed(left, before)

    # Out of range: one sentence, the picture stays, and so does what was typed.
    weight = "number input for Guidance weight w"
    set_number(page, weight, "1000000000")
    expect(line).to_have_text("weight w must be a number from 0 to 8, got 1000000000", timeout=SECONDS)
    expect(page.get_by_label(weight)).to_have_value("1000000000")
    assert left.get_attribute("src") == before
    set_number(page, weight, "3")
    before = changed(left, before)
    set_number(page, "number input for Steps T", "0")
    expect(line).to_contain_text("must be a whole number from 15 to 100, got 0", timeout=SECONDS)
    assert left.get_attribute("src") == before

    page.get_by_role("button", name="K is the posterior covariance").click()
    expect(page.locator("#explore-see")).to_contain_text("The ellipses are K", timeout=SECONDS)
    expect(line).to_contain_text("Energy distance to the target")
    expect(page.get_by_label("marginal scaling")).to_have_count(0)
    page.get_by_role("button", name="Marginal scaling fails").click()
    expect(line).to_contain_text("KL(produced ‖ claimed)", timeout=SECONDS)
    expect(page.get_by_label("marginal scaling")).to_be_checked()
    for width in WIDTHS:
        resize(page, width)


def test_example_prompts_can_be_clicked(browser, tmp_path):
    """A text-conditional model: prompts in the place of classes, and examples that fill them in."""
    served = serve(Models("mini", captioned_sd(tmp_path)), host="127.0.0.1", port=free_port())
    page = browser.new_page()
    page.goto(served.local_url)
    expect(button(page, "Generate")).to_be_enabled(timeout=SECONDS)
    prompts = page.get_by_label("Prompts (one on each line)").locator("visible=true")
    assert prompts.input_value().splitlines() == EXAMPLES["four shapes"].splitlines()
    assert page.get_by_label("Guidance scale").locator("visible=true").first.input_value() == "7.5"
    page.get_by_role("button", name="flowers").locator("visible=true").click()
    expect(prompts).to_have_value(EXAMPLES["flowers"])
    generate(page, "2")
    expect(status(page)).to_contain_text("Done", timeout=SECONDS)
    expect(page.locator("#gallery-without")).to_contain_text("a large red dotted flower")
    page.close()
    served.close(verbose=False)


def test_classifier_guidance(page):
    """The third tab: two ways to compare, what comes with a divergence, bad input, small screens."""
    page.get_by_role("tab", name="Classifier guidance").click()
    said = page.locator("#classifier-status .status")
    begin = page.locator("#classifier-generate")
    expect(begin).to_be_enabled(timeout=SECONDS)
    expect(page.locator("#status")).to_be_hidden()

    steps = page.get_by_label("Steps (1–1000)").locator("visible=true")
    steps.fill("4")
    begin.click()
    expect(said).to_contain_text("Done: both sides in", timeout=SECONDS)
    for side, title in (("without", "Without rectification"), ("with_reg", "With rectification")):
        expect(page.locator(f"#classifier-gallery-{side} .grid-container img")).to_have_count(8)
        expect(page.locator(f"#classifier-bar-{side}")).to_contain_text(title)
    expect(page.locator("#classifier-measured")).to_contain_text("2 of 8")
    expect(page.locator("#classifier-slider")).to_contain_text("without rectification | with rectification")

    expect(page.get_by_label("Strength a")).to_be_hidden()
    page.get_by_label("the plain score and this score").check()
    page.get_by_label("Divergence of the score").click()
    page.get_by_role("option", name="Jensen-Shannon").click()
    expect(page.get_by_label("Strength a")).to_be_visible()
    set_number(page, "Smoothing ε (0–1)", "2")
    before = page.locator("#classifier-gallery-with_reg .grid-container img").first.get_attribute("src")
    begin.click()
    expect(said).to_have_text("smoothing ε must be a number from 0 to 1, got 2", timeout=SECONDS)
    assert page.locator("#classifier-gallery-with_reg .grid-container img").first.get_attribute("src") == before
    page.locator(".toast-close").last.click()
    set_number(page, "Smoothing ε (0–1)", "0.9")
    begin.click()
    expect(page.locator("#classifier-bar-with_reg")).to_contain_text("Jensen-Shannon, a = 1, ε = 0.9", timeout=SECONDS)
    expect(said).to_contain_text("Done", timeout=SECONDS)

    page.set_viewport_size({"width": 1280, "height": 844})  # on a phone the last tab is in a menu
    page.get_by_role("tab", name="CFG and REG").click()
    expect(button(page, "Generate")).to_be_visible()
