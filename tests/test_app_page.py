"""The web demo in a real browser: what visitors see and do."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
import uvicorn
from contrast import CONTRAST_OF
from diffusers import LCMScheduler
from playwright.sync_api import Page, expect
from serving import free_port, idle, opened, served, settle
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route
from tiny_models import patched_layers, tiny_pipeline, tiny_unet

from agentsd.app.server import Server
from agentsd.generation.image_files import read_record
from agentsd.patching.patch import remove_patch
from agentsd.schedule import Schedule

pytestmark = pytest.mark.browser

SLOW = 60_000
"""Milliseconds to wait for an image on a busy machine."""

expect.set_options(timeout=15_000)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("model")) as server:
        yield server


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Page]:
    with opened(browser, server.url) as page:
        yield page


def set_steps(page: Page, steps: int) -> Any:
    """Open the settings and set the steps; returns their control."""
    page.get_by_role("button", name="Settings: steps").click()
    control = page.get_by_label("number input for Steps")
    control.fill(str(steps))
    control.press("Tab")
    return control


def open_advanced(page: Page) -> None:
    """Open the parameters of the phases."""
    page.get_by_role("button", name="Advanced").click()


def generate(page: Page) -> None:
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#status")).to_contain_text("Done", timeout=SLOW)


def timeline(page: Page) -> Any:
    return page.locator("#timeline")


def test_generate_and_compare(page: Page, server: Server) -> None:
    set_steps(page, 40)
    page.get_by_role("button", name="Generate").click()
    bar = page.locator("#status progress")
    expect(bar).to_be_visible(timeout=SLOW)
    expect(page.locator("#status")).to_contain_text("s left")
    expect(page.locator("#status img")).to_be_visible(timeout=SLOW)  # the preview
    expect(page.locator("#status")).to_contain_text("Done", timeout=SLOW)
    assert page.locator("#comparison img").count() == 2
    figures = page.locator("#figures")
    figures.locator("summary").click()
    for text in ("Original", "Speed-up", "PSNR", "dB"):
        expect(figures).to_contain_text(text)
    source = page.locator("#comparison img").first.get_attribute("src") or ""
    assert (Path(server.folder) / source.rpartition(server.folder)[2].lstrip("/")).is_file()


def test_stop_frees_the_device_within_a_step(page: Page, server: Server) -> None:
    steps = set_steps(page, 50)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#status progress")).to_be_visible(timeout=SLOW)
    page.locator("#stop").click()
    expect(page.locator("#status")).to_contain_text("Stopped")
    assert idle(server) < 2
    assert not patched_layers(server.worker.pipes["tiny"].unet)
    steps.fill("2")
    steps.press("Tab")
    generate(page)  # the next one is not affected


def test_the_timeline_follows_the_schedule(page: Page) -> None:
    expect(timeline(page)).to_contain_text("1: keys")
    page.locator("label").filter(has_text="paper").first.click()
    expect(timeline(page)).to_contain_text("steps 1–10")
    open_advanced(page)
    first = page.locator(".phase-1").first
    until = first.get_by_label("number input for until")
    until.fill("0.8")
    until.press("Tab")
    expect(timeline(page)).to_contain_text("steps 1–20")
    ratio = first.get_by_label("number input for ratio").first
    ratio.fill("0.99")
    ratio.press("Tab")
    expect(timeline(page)).to_contain_text("ratio 0.99 is capped to 0.9375")
    expect(page.locator("#yaml textarea")).to_have_value(
        "phases:\n- until: 0.8\n  method: agent\n  ratio: 0.99\n- method: merge\n  ratio: 0.4\n"
    )
    page.get_by_role("button", name="Add a phase").click()
    expect(page.locator(".phase-3").first).to_be_visible()
    expect(timeline(page)).to_contain_text("3: keys")
    page.locator(".phase-1").first.get_by_role("button", name="Remove").click()
    expect(page.locator(".phase-3").first).to_be_hidden()
    expect(timeline(page)).to_contain_text("1: merge")
    page.locator("label").filter(has_text="paper").first.click()
    expect(timeline(page)).to_contain_text("steps 1–10")
    set_steps(page, 50)
    expect(timeline(page)).to_contain_text("steps 1–20")


def test_the_timeline_is_right_after_quick_changes(page: Page) -> None:
    """A change that the page sends before it has the answer to the last one does not undo it."""
    set_steps(page, 50)
    expect(timeline(page)).to_contain_text("steps 1–50")
    steps = page.get_by_label("number input for Steps")
    page.locator("label").filter(has_text="paper").first.click()
    steps.fill("10")
    steps.press("Tab")
    expect(page.locator("#yaml textarea")).to_have_value(re.compile("method: agent"))
    settle(page)
    expect(timeline(page)).to_contain_text("steps 1–4")
    expect(page.get_by_label("paper", exact=True).first).to_be_checked()


def test_yaml_is_checked_as_it_is_typed(page: Page, server: Server) -> None:
    open_advanced(page)
    box = page.locator("#yaml textarea")
    box.fill("phases:\n- method: keys\n  strid: 4\n")
    expect(timeline(page)).to_contain_text("phase 1: method 'keys' does not read 'strid'")
    box.fill("phases:\n- method: keys\n  sx: 4\n  sy: 4\n")
    expect(timeline(page)).to_contain_text("1,024 → 64 keys")
    expect(page.locator(".phase-1").first.get_by_label("number input for sx")).to_have_value("4")
    code = page.locator("#python textarea").input_value()
    given: dict[str, Any] = {}
    exec(code.partition("agentsd.apply_patch")[0], given)
    assert Schedule(phases=given["phases"]) == Schedule.from_yaml(box.input_value())
    exec(code, {"pipe": server.worker.pipes["tiny"]})  # the code to copy runs
    remove_patch(server.worker.pipes["tiny"])


def test_a_bad_file_gets_an_error(page: Page, tmp_path: Path) -> None:
    for name, data, says in (
        (
            "bad.yaml",
            b"phases:\n- method: kees\n",
            "method: input should be one of 'agent', 'full', 'keys', 'merge'",
        ),
        ("broken.yaml", b"phases: [", "line 1: not valid YAML"),
        ("binary.yaml", b"\xff\xfe\x00", "must be UTF-8"),
        ("large.yaml", b"#" * 20_000, "at most 16,384 bytes"),
        ("script.yaml", b"<img src=x onerror=alert(1)>: 1", "unknown key"),
    ):
        (tmp_path / name).write_bytes(data)
        page.locator("input[type=file][accept*=yaml]").set_input_files(tmp_path / name)
        expect(timeline(page)).to_contain_text(says)
    assert page.locator("#timeline img").count() == 0


def test_yaml_is_downloaded_and_uploaded(page: Page, tmp_path: Path) -> None:
    page.locator("label").filter(has_text="faithful").first.click()
    expect(timeline(page)).to_contain_text("1: keys")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download YAML").click()
    download.value.save_as(tmp_path / "mine.yaml")
    found = Schedule.from_yaml(tmp_path / "mine.yaml")
    assert found.phases == Schedule.preset("faithful").phases
    page.locator("label").filter(has_text="paper").first.click()
    expect(timeline(page)).to_contain_text("2: merge")
    page.locator("input[type=file][accept*=yaml]").set_input_files(tmp_path / "mine.yaml")
    expect(timeline(page)).to_contain_text("1: keys")
    expect(page.get_by_label("faithful", exact=True).first).to_be_checked()


def test_an_error_shows_in_its_place(page: Page) -> None:
    page.get_by_label("Prompt", exact=True).fill("  ")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#status")).to_contain_text("prompt: must not be blank")


def test_settings_come_back_from_the_gallery_and_from_a_file(
    page: Page, server: Server, tmp_path: Path
) -> None:
    steps = set_steps(page, 3)
    prompt, seed = page.get_by_label("Prompt", exact=True), page.get_by_label("Seed")
    prompt.fill("a b c")
    seed.fill("77")
    page.locator("label").filter(has_text="faithful").first.click()
    expect(timeline(page)).to_contain_text("1: keys")
    generate(page)

    def forget() -> None:
        prompt.fill("other")
        seed.fill("1")
        steps.fill("9")
        steps.press("Tab")
        page.locator("label").filter(has_text="paper").first.click()
        expect(timeline(page)).to_contain_text("2: merge")

    def same() -> None:
        expect(prompt).to_have_value("a b c")
        expect(seed).to_have_value("77")
        expect(steps).to_have_value("3")
        expect(timeline(page)).to_contain_text("1: keys")

    forget()
    page.locator("#gallery button.thumbnail-item").first.click()
    same()
    file = max(
        Path(server.folder).glob("*/agentsd-77-faithful.png"), key=lambda p: p.stat().st_mtime
    )
    assert read_record(file).settings.prompt == "a b c"
    forget()
    page.locator("#drop input[type=file]").set_input_files(file)
    same()
    (tmp_path / "not.png").write_bytes(b"GIF89a")
    page.locator("#drop").get_by_role("button").first.click()  # takes the file away again
    page.locator("#drop input[type=file]").set_input_files(tmp_path / "not.png")
    expect(page.locator("#status")).to_contain_text("not a PNG image")


def test_a_model_brings_its_size_and_schedulers(browser: Any, tmp_path: Path) -> None:
    other = tiny_pipeline(tmp_path, tiny_unet(sample_size=48))
    other.scheduler = LCMScheduler()
    with (
        served(tmp_path / "tiny", more={"other": other}) as server,
        opened(browser, server.url) as page,
    ):
        set_steps(page, 2)
        width, drawn = page.get_by_label("number input for Width in pixels"), timeline(page)
        model, scheduler = (page.get_by_role("combobox", name=n) for n in ("Model", "Scheduler"))
        expect(width).to_have_value("64")

        def choose(control: Any, name: str) -> None:
            control.click()
            page.get_by_role("option", name=name, exact=True).click()
            expect(page.get_by_role("option")).to_have_count(0)

        choose(scheduler, "Euler")
        choose(model, "other")
        expect(width).to_have_value("96")
        expect(scheduler).to_have_value("model's own")
        expect(drawn).to_contain_text("2,304")
        scheduler.click()
        expect(page.get_by_role("option")).to_contain_text(["model's own", "LCM"])
        page.get_by_role("option", name="LCM").click()
        generate(page)
        choose(model, "tiny")
        expect(width).to_have_value("64")
        expect(scheduler).to_have_value("model's own")
        expect(drawn).to_contain_text("1,024")
        generate(page)
        page.locator("#gallery button.thumbnail-item").nth(2).click()  # those of "other"
        expect(model).to_have_value("other")
        expect(width).to_have_value("96")
        expect(scheduler).to_have_value("LCM")
        generate(page)


def test_layers(page: Page) -> None:
    page.get_by_role("tab", name="Layers").click()
    record, caption = page.locator("#record"), page.locator("#caption")
    expect(record).to_be_disabled()  # there is no image yet
    page.locator("label").filter(has_text="paper").first.click()
    set_steps(page, 4)
    generate(page)
    record.click()
    expect(page.locator("#drawing img")).to_be_visible(timeout=SLOW)
    expect(caption).to_contain_text("Step 1: 1,024 tokens were merged into 615")
    before = page.locator("#drawing img").get_attribute("src")
    page.locator("#view label").filter(has_text="attended most").click()
    expect(caption).to_contain_text("of 64 agents get the most attention")
    expect(page.locator("#drawing img")).not_to_have_attribute("src", before or "")
    step = page.get_by_label("number input for Step", exact=True)
    step.fill("4")
    step.press("Tab")
    expect(caption).to_contain_text("No agents or keys here")


def test_a_plot(page: Page) -> None:
    set_steps(page, 2)
    page.get_by_role("tab", name="X/Y plot").click()
    page.get_by_label("X values").fill("none, paper, fast")
    page.get_by_label("Y values").fill("1, two")
    begin, now = page.locator("#plot"), page.locator("#plot-status")
    begin.click()
    expect(now).to_contain_text("seed: must be whole numbers separated by commas (got 'two')")
    page.get_by_label("Y values").fill("1, 2, 3")
    begin.click()
    expect(now).to_contain_text("at most 6 images in a plot (got 3 × 3)")
    page.get_by_label("Y values").fill("1, 2")
    begin.click()
    expect(page.locator("#plot-image img")).to_be_visible(timeout=SLOW)


@pytest.mark.sample
def test_on_a_phone(browser: Any, server: Server) -> None:
    phone = {"viewport": {"width": 375, "height": 740}, "has_touch": True, "is_mobile": True}
    with opened(browser, server.url, **phone) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        set_steps(page, 2)
        generate(page)
        box = page.locator("#comparison").bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 375
        assert page.evaluate("document.documentElement.scrollWidth") <= 375


def test_by_keyboard(page: Page) -> None:
    """Get from the prompt to the image without a mouse."""
    page.get_by_label("Prompt", exact=True).focus()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "generate":
            break
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("Done", timeout=SLOW)


def contrast(page: Page, locator: str) -> float:
    """Contrast of a text to its background, as WCAG measures it."""
    return float(
        page.evaluate(
            f"(where) => {{ {CONTRAST_OF} return contrastOf(document.querySelector(where)); }}",
            locator,
        )
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(browser: Any, server: Server, scheme: str) -> None:
    with opened(browser, f"{server.url}?__theme={scheme}", color_scheme=scheme) as page:
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, dark.strip("rgba()").split(",")[:3])) < 200) is (scheme == "dark")
        expect(page.locator(".bar small").first).to_be_visible()
        for where in (".timeline td", ".bar small", "#status p", "#seed span"):
            assert contrast(page, where) >= 4.5, where


def test_it_loads_in_two_seconds(browser: Any, server: Server) -> None:
    with opened(browser, server.url) as page:
        times = []
        for _ in range(3):
            begun = time.perf_counter()
            page.reload()
            page.get_by_role("button", name="Generate").wait_for()
            expect(timeline(page)).to_contain_text("1: keys")
            times.append(time.perf_counter() - begun)
        print("seconds to load:", [round(t, 2) for t in times])
        assert min(times) < 2


@contextmanager
def proxied(url: str, prefix: str) -> Iterator[str]:
    """A reverse proxy that removes a prefix from the path, as docs/app.md sets one up."""
    client = httpx.AsyncClient(base_url=url, timeout=60)

    async def forward(request: Request) -> StreamingResponse:
        path = request.url.path.removeprefix(prefix) or "/"
        headers = [(k, v) for k, v in request.headers.raw if k not in (b"content-length",)]
        sent = client.build_request(
            request.method,
            httpx.URL(path=path, query=request.url.query.encode()),
            headers=[*headers, (b"x-forwarded-host", request.headers["host"].encode())],
            content=await request.body(),
        )
        answer = await client.send(sent, stream=True)
        headers = {k: v for k, v in answer.headers.items() if k not in ("content-length", "date")}
        return StreamingResponse(
            answer.aiter_raw(),
            answer.status_code,
            headers,
            background=BackgroundTask(answer.aclose),
        )

    app = Starlette(routes=[Route(prefix + "{path:path}", forward, methods=["GET", "POST"])])
    port = free_port()
    runner = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = Thread(target=runner.run)
    thread.start()
    while not runner.started:
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{port}{prefix}"
    finally:
        runner.should_exit = runner.force_exit = True
        thread.join(20)


def test_behind_a_reverse_proxy(browser: Any, tmp_path: Path) -> None:
    with (
        served(tmp_path, root_path="/agentsd") as server,
        proxied(server.url, "/agentsd") as url,
        opened(browser, url + "/") as page,
    ):
        set_steps(page, 2)
        generate(page)
        expect(page.locator("#comparison img").first).to_be_visible()
        width = page.locator("#comparison img").first.evaluate("image => image.naturalWidth")
        assert width == 64
