"""The page as a daily user meets it: each test is a fault that was found that way."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from contrast import CONTRAST_OF
from PIL import Image
from playwright.sync_api import Locator, Page, expect
from serving import COUNT_CALLS, served, settle
from tiny_models import tiny_pipeline, tiny_unet

from agentsd.app.requests.limits import Limits
from agentsd.app.server import Server
from agentsd.generation.image_files import read_record, save_image
from agentsd.generation.records import ImageRecord
from agentsd.image_settings import ImageSettings
from agentsd.models.options import PipelineOptions

pytestmark = pytest.mark.browser

SLOW = 60_000
"""Milliseconds to wait for an image on a busy machine."""

COMMENTED = "# mine\nphases:\n- method: keys\n  sx: 4\n  sy: 4\n"

expect.set_options(timeout=15_000)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    other = tiny_pipeline(tmp_path_factory.mktemp("other"), tiny_unet(sample_size=32))
    limits = Limits(max_steps=50, max_images=8, max_pixels=96 * 96)
    with served(tmp_path_factory.mktemp("model"), limits, more={"other": other}) as server:
        yield server


@contextmanager
def visitor(browser: Any, url: str, **options: Any) -> Iterator[Page]:
    """A page of a visitor who has not been here before."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
    try:
        page = context.new_page()
        page.add_init_script(COUNT_CALLS)
        visit(page, url)
        yield page
    finally:
        context.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Page]:
    with visitor(browser, server.url) as page:
        yield page


def visit(page: Page, url: str) -> None:
    """Open the page, and its settings."""
    page.goto(url)
    page.wait_for_function("window.agentsdRestored")
    page.get_by_role("button", name="Settings: steps").click()
    expect(number(page, "Steps")).to_be_visible()


def number(page: Page, label: str) -> Locator:
    return page.get_by_label(f"number input for {label}", exact=True)


def fill(control: Locator, value: Any) -> None:
    control.fill(str(value))
    control.press("Tab")


def generate(page: Page, steps: int = 2) -> Locator:
    fill(number(page, "Steps"), steps)
    page.evaluate("document.querySelector('#status p').textContent = ''")
    page.locator("#generate").click()
    expect(page.locator("#status")).to_contain_text("Done", timeout=SLOW)
    return page.locator("#status")


def open_advanced(page: Page) -> None:
    """Open the parameters of the phases."""
    page.get_by_role("button", name="Advanced").click()


def option(page: Page, control: Locator, name: str) -> None:
    control.click()
    page.get_by_role("option", name=name).click()


def test_settings_stay_unless_another_value_is_chosen(page: Page) -> None:
    """Neither a way through the page with Tab nor opening a list and leaving it is a choice."""
    fill(number(page, "Guidance"), 3)
    fill(number(page, "Width in pixels"), 96)
    expect(number(page, "Guidance")).to_have_value("3")
    scheduler = page.get_by_role("combobox", name="Scheduler")
    model = page.get_by_role("combobox", name="Model")
    option(page, scheduler, "Euler a")
    yaml = page.locator("#yaml textarea")
    yaml.fill(COMMENTED)
    expect(page.locator("#timeline")).to_contain_text("96 keys")
    open_advanced(page)

    def pass_by() -> None:
        lists = page.get_by_role("combobox").locator("visible=true").all()
        assert lists
        for control in lists:
            control.focus()
            control.press("Tab")
            control.click()
            page.locator("h1").click()
            settle(page)

    pass_by()
    page.get_by_role("tab", name="X/Y plot").click()
    page.get_by_label("X values").fill("none, fast")
    pass_by()
    page.locator("#generate").focus()
    for _ in range(30):
        page.keyboard.press("Tab")
    settle(page)
    expect(page.get_by_label("X values")).to_have_value("none, fast")
    expect(number(page, "Guidance")).to_have_value("3")
    expect(number(page, "Width in pixels")).to_have_value("96")
    expect(scheduler).to_have_value("Euler a")
    expect(yaml).to_have_value(COMMENTED)
    option(page, page.get_by_role("combobox", name="X axis"), "guidance")  # these are choices
    expect(page.get_by_label("X values")).to_have_value("1, 2, 5")
    model.focus()
    model.press("ArrowDown")
    model.press("Enter")
    expect(model).to_have_value("other")
    expect(number(page, "Width in pixels")).to_have_value("64")


def test_a_method_that_is_chosen_does_something(page: Page) -> None:
    open_advanced(page)
    control = page.get_by_role("combobox", name="Phase 1: method")
    stages = {"agent": "→ 615 → 64 agents", "merge": "1,024 → 615", "keys": "1,024 → 256 keys"}
    for method, stage in stages.items():
        option(page, control, f"{method}:")
        expect(page.locator("#timeline")).to_contain_text(f"1: {method}")
        expect(page.locator("#timeline")).to_contain_text(stage)


def test_who_waits_is_told_their_place_and_for_how_long(
    page: Page, browser: Any, server: Server
) -> None:
    generate(page)  # so that the time of an image is known
    with visitor(browser, server.url) as other:
        fill(number(other, "Steps"), 40)
        other.locator("#generate").click()
        expect(other.locator("#status progress")).to_be_visible(timeout=SLOW)
        page.locator("#generate").click()
        status = page.locator("#status")
        expect(status).to_contain_text("1 request comes before yours · about")
        begun, told = time.perf_counter(), re.search(r"about (\d+) s", status.inner_text())
        expect(status).not_to_contain_text("before yours", timeout=SLOW)
        waited = time.perf_counter() - begun
        expect(status).to_contain_text("Done", timeout=SLOW)
    assert told
    assert waited / 4 - 1 < int(told[1]) < 4 * waited + 2


def test_no_path_of_the_server_is_shown(page: Page, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    page.locator("#drop input[type=file]").set_input_files(tmp_path / "plain.png")
    status = page.locator("#status")
    expect(status).to_contain_text("plain.png has no agentsd metadata")
    assert "/" not in status.inner_text()


def test_progress_is_in_sight_on_a_phone(browser: Any, server: Server) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with visitor(browser, server.url, **phone) as page:
        fill(number(page, "Steps"), 50)
        page.locator("#generate").tap()
        expect(page.locator("#status progress")).to_be_in_viewport(timeout=SLOW)
        page.locator("#stop").click()
        expect(page.locator("#status")).to_contain_text("Stopped")


def test_an_image_beyond_the_limits_is_fitted_and_what_is_lost_is_said(
    page: Page, tmp_path: Path
) -> None:
    settings = ImageSettings(prompt="a b", num_inference_steps=300, height=512, width=1024)
    options = PipelineOptions(loras=("/home/me/style.safetensors",), init_image="/home/me/a.png")
    record = ImageRecord(
        settings, "tiny", "DPMSolverSDEScheduler", options=options, versions={"agentsd": "0"}
    )
    save_image(Image.new("RGB", (8, 8)), tmp_path / "large.png", record)
    page.locator("#drop input[type=file]").set_input_files(tmp_path / "large.png")
    status = page.locator("#status")
    for says in (
        "Settings restored",
        "Steps: 50, the most here, for 300",
        "Size: 128 × 64, the most here, for 1024 × 512",
        "The scheduler DPMSolverSDE",
        "Not restored: the LoRA style.safetensors, the initial image a.png.",
    ):
        expect(status).to_contain_text(says)
    expect(number(page, "Steps")).to_have_value("50")
    assert "Seed 0" in generate(page).inner_text()


def watched(page: Page) -> Callable[[], list[str]]:
    """Note each text of the status; returns what gives them."""
    page.evaluate("""() => {
      const status = document.getElementById("status");
      window.texts = [];
      new MutationObserver(() => window.texts.push(status.innerText))
        .observe(status, {childList: true, subtree: true, characterData: true});
    }""")
    return lambda: page.evaluate("window.texts")


def test_the_warm_up_of_a_new_size_is_shown(page: Page) -> None:
    fill(number(page, "Height in pixels"), 72)
    texts = watched(page)
    generate(page)
    warm = [text for text in texts() if "Warm-up" in text]
    assert any("(agentsd)" in text for text in warm)
    assert any("(Original) · about" in text for text in warm)  # within the estimate
    count = len(texts())
    generate(page)
    assert not any("Warm-up" in text for text in texts()[count:])


def test_the_history_shows_the_images_and_figures_again(page: Page) -> None:
    seed, images = page.get_by_label("Seed"), page.locator("#comparison img")
    figures = []
    for value in ("1", "2"):
        fill(seed, value)
        generate(page)
        expect(images.first).to_have_attribute("src", re.compile(f"agentsd-{value}-original"))
        figures.append(page.locator("#figures").inner_text())
    page.locator("#gallery button.thumbnail-item").nth(2).click()
    expect(images.first).to_have_attribute("src", re.compile("agentsd-1-original"))
    expect(images.last).to_have_attribute("src", re.compile("agentsd-1-faithful"))
    expect(seed).to_have_value("1")
    expect(page.locator("#figures")).to_contain_text(figures[0].split("\n")[0])


def test_the_first_view_of_the_layers_fits_the_method(page: Page) -> None:
    page.get_by_role("tab", name="Layers").click()
    expect(page.locator("#record")).to_be_disabled()
    generate(page)
    page.locator("#record").click()
    expect(page.locator("#caption")).to_contain_text("256 keys", timeout=SLOW)
    expect(page.get_by_label("agents or keys")).to_be_checked()


def test_errors_stay_where_they_belong(page: Page) -> None:
    bars = page.locator("#timeline .bar")
    expect(bars).to_have_count(1)
    for side in ("Width", "Height"):
        fill(number(page, f"{side} in pixels"), 128)
    expect(page.locator("#settings-message")).to_contain_text("at most 9,216")
    expect(page.locator("#schedule-message .message")).to_have_count(0)
    page.locator("#yaml textarea").fill("phases:\n- method: kees\n")
    expect(page.locator("#schedule-message")).to_contain_text("phase 1: method")
    expect(bars).to_have_count(1)
    fill(number(page, "Width in pixels"), 64)
    expect(page.locator("#settings-message .message")).to_have_count(0)


def test_slow_answers_do_not_keep_the_page_busy(page: Page) -> None:
    """Handlers that wait for each other's last call must not call each other forever."""
    begun: list[str] = []

    def late(route: Any) -> None:
        begun.append(route.request.url)
        time.sleep(0.5 if len(begun) % 3 == 1 else 0.05)
        route.continue_()

    page.route("**/predict", late)
    for side, value in (("Width", 96), ("Height", 96), ("Height", 64), ("Width", 64)):
        fill(number(page, f"{side} in pixels"), value)
    settle(page)
    assert len(begun) > 8
    expect(number(page, "Height in pixels")).to_have_value("64")


def test_only_buttons_that_can_do_something_are_active(page: Page) -> None:
    open_advanced(page)
    begin, stop = page.locator("#generate"), page.locator("#stop")
    add, remove = page.locator("#add-phase"), page.get_by_role("button", name="Remove").first
    expect(stop).to_be_disabled()
    expect(remove).to_be_disabled()
    rows = page.get_by_role("button", name="Remove").locator("visible=true")
    for count in (2, 3, 4):
        add.click()
        expect(rows).to_have_count(count)
    expect(add).to_be_disabled()
    expect(remove).to_be_enabled()
    fill(number(page, "Steps"), 50)
    begin.click()
    expect(stop).to_be_enabled()
    expect(begin).to_be_disabled()
    stop.click()
    expect(begin).to_be_enabled()
    expect(stop).to_be_disabled()
    page.get_by_role("tab", name="X/Y plot").click()
    expect(page.locator("#plot-stop")).to_be_disabled()


def test_a_seed_left_out_is_random_and_shown(page: Page) -> None:
    found = []
    for seed in ("-1", ""):
        fill(page.get_by_label("Seed"), seed)
        match = re.search(r"Seed (\d+)\.", generate(page).inner_text())
        assert match
        found.append(match[1])
    assert found[0] != found[1]
    expect(page.locator("#comparison img").first).to_have_attribute(
        "src", re.compile(f"agentsd-{found[1]}-")
    )


def test_settings_and_history_survive_a_reload_and_travel_in_the_address(
    page: Page, browser: Any, server: Server
) -> None:
    assert "#" not in page.url
    page.get_by_label("Prompt", exact=True).fill("a / b & c")
    fill(page.get_by_label("Seed"), 77)
    page.locator("#yaml textarea").fill(COMMENTED)
    expect(page.locator("#timeline")).to_contain_text("64 keys")
    generate(page, 3)
    images = page.locator("#gallery img")
    expect(images).to_have_count(2)
    page.reload()
    with visitor(browser, page.url) as other:
        for one in (page, other):
            expect(one.get_by_label("Prompt", exact=True)).to_have_value("a / b & c")
            expect(one.get_by_label("Seed")).to_have_value("77")
            expect(one.locator("#yaml textarea")).to_have_value(re.compile("sx: 4\n"))
            expect(one.locator("#timeline")).to_contain_text("steps 1–3")
        expect(other.locator("#gallery img")).to_have_count(0)
    expect(images).to_have_count(2)
    with visitor(browser, f"{server.url}#seed=x") as other:
        says = "the link's seed is not a number (got 'x')"
        expect(other.locator("#status")).to_contain_text(says)
        expect(other.get_by_label("Seed")).to_have_value("0")


def test_a_schedule_that_changes_nothing_has_no_speed_up(page: Page) -> None:
    figures = page.locator("#figures")
    generate(page)
    expect(figures).to_contain_text(re.compile(r"\d\.\d×"))
    expect(figures).not_to_contain_text(re.compile(r"\.\d\d×"))
    page.locator("#yaml textarea").fill("phases:\n- method: full\n")
    expect(page.locator("#timeline")).to_contain_text("1: full")
    generate(page)
    expect(figures).to_contain_text("changes nothing at this size")
    expect(figures).not_to_contain_text("×")


def test_plots_compare_with_the_unpatched_image_and_outlive_a_stop(
    page: Page, server: Server, tmp_path: Path
) -> None:
    page.locator("#yaml textarea").fill(COMMENTED)
    fill(number(page, "Steps"), 2)
    page.get_by_role("tab", name="X/Y plot").click()
    page.get_by_label("X values").fill("none, custom")
    page.get_by_label("Y values").fill("1-3")
    status, image = page.locator("#plot-status"), page.locator("#plot-image img")
    page.locator("#plot").click()
    expect(status).to_contain_text("Done. Seed 0.", timeout=SLOW)
    (file,) = Path(server.folder).glob("*/agentsd-plot-schedule-seed-0.png")
    assert read_record(file).settings.num_inference_steps == 2
    with Image.open(file) as plot:
        axes = json.loads(plot.text["agentsd-plot"])
    assert axes == {"x": {"schedule": ["none", "custom"]}, "y": {"seed": [1, 2, 3]}}
    fill(number(page, "Steps"), 50)
    before = image.get_attribute("src")
    page.locator("#plot").click()
    expect(status).to_contain_text("image 3 of 6", timeout=SLOW)
    page.locator("#plot-stop").click()
    # The third may be finished before the click arrives.
    expect(status).to_contain_text(re.compile("Stopped at [23] of 6 images"))
    expect(image).not_to_have_attribute("src", before or "")


CONTRAST = f"""() => {{
{CONTRAST_OF}  const found = {{}};
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {{
    const element = texts.currentNode.parentElement, words = texts.currentNode.data.trim();
    if (!words || !element.checkVisibility({{ visibilityProperty: true, opacityProperty: true }}))
      continue;
    if (element.closest(":disabled, script, style, [data-testid=slider]")) continue;
    const contrast = contrastOf(element);
    if (contrast < LEAST) found[words.slice(0, 40)] = contrast;
  }}
  return found;
}}"""


COLOURS_REST = "!document.getAnimations().some((each) => each instanceof CSSTransition)"
"""They fade over where the scheme changes."""


def test_all_text_can_be_read(page: Page) -> None:
    generate(page)
    for scheme in ("light", "dark"):
        page.evaluate(f"document.body.classList.toggle('dark', {json.dumps(scheme == 'dark')})")
        page.wait_for_function(COLOURS_REST)
        assert page.evaluate(CONTRAST.replace("LEAST", "4.5")) == {}, scheme
        assert page.evaluate(CONTRAST.replace("LEAST", "30"))  # it finds texts


def test_the_keyboard_and_a_screen_reader_suffice(page: Page) -> None:
    fill(number(page, "Steps"), 2)
    page.get_by_label("Prompt", exact=True).press("Control+Enter")
    status = page.locator("#status")
    expect(status).to_contain_text("Done", timeout=SLOW)
    expect(status).to_have_attribute("aria-live", "polite")
    assert (
        page.evaluate("""() => {
      const ids = [...document.querySelectorAll("[id]")].map((e) => e.id).filter((id) => id);
      return ids.filter((id, i) => ids.indexOf(id) !== i);
    }""")
        == []
    )
    assert page.evaluate("[...document.images].filter((image) => !image.alt).length") == 0
    divider, rule = page.get_by_role("slider", name="Divider"), page.locator("#comparison .rule")
    before = rule.bounding_box()
    divider.focus()
    for _ in range(10):
        divider.press("ArrowRight")
    after = rule.bounding_box()
    assert before
    assert after
    assert after["x"] > before["x"] + 5
    page.locator("#seed").get_by_role("button").focus()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid"
