"""The page's result in a real browser: headline, views, race, sizes, examples, explanation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin
from playwright.sync_api import Page, expect
from serving import opened, served

from agentsd.app.requests.limits import Limits
from agentsd.app.server import Server
from agentsd.generation.image_files import read_record

pytestmark = pytest.mark.browser

SLOW = 60_000
"""Milliseconds to wait for an image on a busy machine."""

expect.set_options(timeout=15_000)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("model"), Limits(max_steps=50)) as server:
        yield server


@pytest.fixture(scope="module")
def compared(browser: Any, server: Server) -> Iterator[Page]:
    """A page with the images of two seeds."""
    with opened(browser, server.url) as page:
        page.get_by_role("button", name="Settings: steps").click()
        steps = page.get_by_label("number input for Steps")
        steps.fill("3")
        steps.press("Tab")
        page.locator("#images label").filter(has_text="2").click()
        generate(page)
        yield page


@pytest.fixture
def fresh(compared: Page, server: Server) -> Page:
    """The page as a new visitor finds it."""
    compared.goto(server.url)
    compared.get_by_role("button", name="Generate").wait_for()
    return compared


def generate(page: Page) -> None:
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#status")).to_contain_text("Done", timeout=SLOW)


def view(page: Page, mode: str) -> Any:
    page.locator(f".modes [data-mode={mode}]").click()
    views = page.locator("#comparison .views")
    expect(views).to_have_attribute("data-mode", mode)
    return views


def styles(page: Page, selector: str, name: str) -> str:
    return str(
        page.locator(selector).first.evaluate(
            "(element, name) => getComputedStyle(element)[name]", name
        )
    )


def test_the_headline_has_both_times_and_details(compared: Page) -> None:
    headline = compared.locator(".headline")
    expect(headline).to_contain_text(re.compile(r"\d\.\d s → \d\.\d s"))
    expect(headline).to_contain_text("mean of 2 seeds")
    widths = [bar.bounding_box() for bar in headline.locator(".time i").all()]
    assert all(box is not None and box["width"] > 0 for box in widths)
    expect(headline.locator(".figures")).to_be_hidden()
    headline.locator("summary").click()
    expect(headline.locator(".figures")).to_contain_text("Similarity (PSNR)")


def test_the_views_show_the_difference_in_several_ways(compared: Page) -> None:
    page = compared
    view(page, "slider")
    divider = page.get_by_label("Divider between")
    divider.focus()
    divider.press("Home")
    assert "0%" in styles(page, "#comparison figure.ours", "clipPath")
    box = page.locator("#comparison .stage").bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] * 0.75, box["y"] + box["height"] / 2)
    assert abs(float(divider.input_value()) - 75) <= 1
    view(page, "side")
    left, right = (page.locator(f"#comparison figure.{k}") for k in ("original", "ours"))
    boxes = left.bounding_box(), right.bounding_box()
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]  # type: ignore[index]
    page.get_by_role("button", name="Zoom in").click()
    images = [f"#comparison figure.{kind} img" for kind in ("original", "ours")]
    scale = "matrix(2, 0, 0, 2, 0, 0)"
    assert [styles(page, image, "transform") for image in images] == [scale, scale]
    before = styles(page, "#comparison figure.ours img", "transformOrigin")
    left.hover()
    page.mouse.down()
    page.mouse.move(boxes[0]["x"] + 5, boxes[0]["y"] + 5)  # type: ignore[index]
    page.mouse.up()
    moved = {styles(page, image, "transformOrigin") for image in images}  # zoom stays together
    assert len(moved) == 1
    assert moved != {before}
    page.get_by_role("button", name="Zoom out").click()
    view(page, "difference")
    assert styles(page, "#comparison figure.ours", "mixBlendMode") == "difference"
    assert styles(page, "#comparison .stage", "filter") == "brightness(10)"
    views = view(page, "flicker")
    expect(views).to_have_class(re.compile("other"))
    expect(views).not_to_have_class(re.compile("other"))
    page.locator(".modes [data-mode=flicker]").press("ArrowLeft")
    expect(views).to_have_attribute("data-mode", "side")


def test_each_seed_can_be_seen(compared: Page) -> None:
    view(compared, "slider")
    image = compared.locator("#comparison figure.ours img")
    first = image.get_attribute("src")
    compared.locator("[data-pair='1']").click()
    expect(image).not_to_have_attribute("src", first or "")
    expect(compared.locator("[data-pair='1']")).to_have_attribute("aria-pressed", "true")
    assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") == 64
    link = compared.locator(".downloads a.ours")
    expect(link).to_have_attribute("download", "agentsd-1-faithful.png")


def test_the_race_ends_at_the_measured_times_and_is_saved(compared: Page, tmp_path: Path) -> None:
    view(compared, "race")
    lanes = compared.locator(".lane")
    expect(lanes.first).to_have_class(re.compile("ours"))  # the patched one first
    for lane in lanes.all():
        expect(lane).to_have_class(re.compile("done"), timeout=SLOW)
    compared.locator(".again").click()
    expect(lanes.first).to_have_class(re.compile("done"), timeout=SLOW)
    with compared.expect_download(timeout=SLOW) as download:
        compared.locator("#save-race").click()
    assert re.fullmatch(r"agentsd-\d-race\.gif", download.value.suggested_filename)
    download.value.save_as(tmp_path / "race.gif")
    with Image.open(tmp_path / "race.gif") as race:
        assert race.n_frames > 2  # type: ignore[attr-defined]


def test_sizes_have_estimates_and_the_chart_fills_up(compared: Page) -> None:
    sizes, chart = compared.locator("#sizes"), compared.locator("#chart")
    expect(sizes).to_contain_text(re.compile(r"128 × 128 · ~\d.* → ~\d"))
    expect(chart.locator("circle")).to_have_count(4)
    expect(compared.locator("#expected")).to_contain_text("expected at 64 × 64, 3 steps")
    sizes.locator("label").filter(has_text="128 × 128").click()
    expect(compared.get_by_label("number input for Width in pixels")).to_have_value("128")
    compared.locator("#images label").filter(has_text="1").click()
    generate(compared)
    expect(chart.locator("circle")).to_have_count(6, timeout=SLOW)
    expect(chart).to_contain_text("128 × 128:")
    expect(compared.locator("[data-pair]")).to_have_count(0)


def test_a_place_of_the_image_is_explained(compared: Page) -> None:
    compared.get_by_role("tab", name="Explain").click()
    compared.locator("#explain").click()
    image, caption = compared.locator("#explain-drawing img"), compared.locator("#explain-caption")
    expect(image).to_be_visible(timeout=SLOW)
    expect(caption).to_contain_text("keys of all heads")
    before = image.get_attribute("src")
    image.click(position={"x": 20, "y": 20})
    expect(image).not_to_have_attribute("src", before or "")
    compared.get_by_role("tab", name="Schedule").click()


def test_a_border_is_dragged(fresh: Page) -> None:
    page = fresh
    page.locator("#intent label").filter(has_text="paper").click()
    timeline, border = page.locator("#timeline"), page.locator("#timeline .border")
    expect(timeline).to_contain_text("steps 1–10")
    border.scroll_into_view_if_needed()
    box, bars = border.bounding_box(), page.locator(".bars").bounding_box()
    assert box is not None
    assert bars is not None
    page.mouse.move(box["x"] + 6, box["y"] + 9)
    page.mouse.down()
    page.mouse.move(bars["x"] + bars["width"] * 0.8, box["y"] + 9, steps=4)
    page.mouse.up()
    expect(timeline).to_contain_text("steps 1–20")
    expect(page.locator("#yaml textarea")).to_have_value(re.compile("until: 0.8"))
    border.press("ArrowLeft")
    expect(timeline).to_contain_text("steps 1–19")
    expect(page.get_by_label("custom", exact=True)).to_be_checked()


def test_examples_image_to_image_and_files_of_other_programs(
    fresh: Page, server: Server, tmp_path: Path
) -> None:
    page = fresh
    prompt = page.get_by_label("Prompt", exact=True)
    page.locator("#examples button").filter(has_text="astronaut").click()
    expect(prompt).to_have_value(re.compile("astronaut"))
    for name in ("Code", "Paper"):
        expect(page.get_by_role("link", name=name)).to_be_visible()
    info = PngImagePlugin.PngInfo()
    text = "a fox\nNegative prompt: fog\nSteps: 6, Sampler: Euler a, Seed: 5, Size: 64x64"
    info.add_text("parameters", text)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "other.png", pnginfo=info)
    page.locator("#drop input[type=file]").set_input_files(tmp_path / "other.png")
    expect(prompt).to_have_value("a fox")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("5")
    page.get_by_role("button", name="Image to image").click()
    page.locator("#init-image input[type=file]").set_input_files(tmp_path / "other.png")
    expect(page.locator("#init-image img")).to_be_visible()
    generate(page)
    file = max(
        Path(server.folder).glob("*/agentsd-5-faithful.png"), key=lambda p: p.stat().st_mtime
    )
    record = read_record(file)
    assert record.options.init_image == "other.png"  # its name, not where the server has it
    assert record.options.strength == 0.8
    assert record.scheduler == "EulerAncestralDiscreteScheduler"
