"""Serve the web demo for tests, with a tiny model of random weights, and open it in a browser."""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from browser import find_chromium
from PIL import Image
from tiny_models import tiny_pipeline, tiny_unet

from agentsd.app.requests.limits import Limits
from agentsd.app.server import Server, ServerAddress, start

ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


BASE: dict[str, Any] = {"prompt": "a", "num_inference_steps": 2, "api_name": "/compare"}
"""The least that a request by the API needs."""

BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": " "}, "prompt: must not be blank"),
    ({"prompt": "x" * 10_001}, "at most 10000 characters"),
    ({"prompt": "\x1b[31m"}, "control characters"),
    ({"prompt": 7}, "prompt: input should be a valid string"),
    ({"seed": -1}, "seed: input should be greater"),
    ({"seed": 1.5}, "seed: input should be a valid integer"),
    ({"seed": "1; rm"}, "seed: input should be a valid integer"),
    ({"num_inference_steps": 51}, "at most 50 here (got 51)"),
    ({"num_inference_steps": 10**9}, "less than or equal to 1000"),
    ({"height": 2048, "width": 2048}, "at most 1,048,576 here"),
    ({"height": 65}, "multiples of 8"),
    ({"guidance_scale": 1e9}, "guidance_scale"),
    ({"model": "pocket"}, "model: must be one of tiny (got 'pocket')"),
    ({"model": "/etc"}, "model: must be one of tiny"),
    ({"model": ["tiny"]}, "model: must be one of tiny"),
    ({"scheduler": "__class__"}, "scheduler: must be one of"),
    ({"scheduler": ["DDIM"]}, "scheduler: must be one of"),
    ({"schedule": "/etc/passwd"}, "must be a mapping"),
    ({"schedule": "configs/paper.yaml"}, "must be a mapping"),
    ({"schedule": "phases:\n- method: kees"}, "phase 1: method: input should be"),
    ({"schedule": "!!python/object/apply:os.system ['true']"}, "could not determine a constructor"),
    ({"schedule": "a: &a [1]\nb: *a"}, "anchors are not allowed"),
    ({"schedule": "[" * 16_000}, "at most 64 brackets"),
    ({"schedule": "#" * 20_000}, "at most 16,384 bytes"),
    ({"schedule": "phases:\n" + "- method: full\n  until: 0.5\n" * 500}, "phase 500"),
    ({"schedule": "phases:\n- method: keys\n  max_downsample: 8\n  sx: 65"}, "sx: input should"),
    ({"schedule": {"phases": []}}, "a preset's name or YAML text"),
]
"""What makes such a request invalid, and a part of the error it gets."""


COUNT_CALLS = """(() => {
  const real = window.fetch;
  window.calls = {open: 0, last: 0};
  window.fetch = async (...given) => {
    if (!String(given[0]?.url ?? given[0]).endsWith("/predict")) return real(...given);
    window.calls.open++;
    try {
      return await real(...given);
    } finally {
      window.calls.open--;
      window.calls.last = performance.now();
    }
  };
})()"""
"""For a page's first script: counts the calls of handlers that are under way."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def served(
    folder: Path, limits: Limits | None = None, more: dict[str, Any] | None = None, **options: Any
) -> Iterator[Server]:
    """Serve ``more`` and a pipeline whose images have 64 × 64 pixels and 32 × 32 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    pipes = {"tiny": tiny_pipeline(folder, tiny_unet(sample_size=32)), **(more or {})}
    address = ServerAddress(port=free_port(), **options)
    # gradio reads the folder of its files from there; another server may still be running.
    with mock.patch.dict(os.environ):
        server = start(pipes, limits or Limits(max_steps=50, max_images=6), address)
        try:
            yield server
        finally:
            server.close()


def settle(page: Any) -> None:
    """Wait until no handler is under way and none has been for 0.3 s, so that none follows."""
    rests = "(at) => !calls.open && performance.now() > Math.max(at, calls.last) + 300"
    page.wait_for_function(rests, arg=page.evaluate("performance.now()"))


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser, for the pages of any number of visitors."""
    from playwright.sync_api import sync_playwright

    path = find_chromium()
    assert path is not None
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, url: str, **context: Any) -> Iterator[Any]:
    """Open a page as a new visitor; requests to other machines and console errors fail."""
    problems: list[str] = []
    home = url.partition("?")[0]

    def check_request(request: Any) -> None:
        if not request.url.startswith((home, "data:", "blob:")):
            problems.append(f"asked for {request.url}")

    def check_message(message: Any) -> None:
        url = message.location["url"]
        if message.type == "error" and not url.endswith("/favicon.ico"):
            problems.append(f"console: {message.text} ({url})")

    page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}} | context)
    try:
        page.add_init_script(COUNT_CALLS)
        page.on("request", check_request)
        page.on("console", check_message)
        page.goto(url)
        page.get_by_role("button", name="Generate").wait_for()
        yield page
    finally:
        page.close()
    assert problems == [], problems


def ask(url: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
    """Send a request; ``body`` is sent as JSON unless it is bytes. Returns status and text."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"Content-Type": "application/json", **(headers or {})}
    request = urllib.request.Request(url.rstrip("/") + path, data, sent)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def idle(server: Server, within: float = 10) -> float:
    """Wait until no job is left; returns how many seconds that took."""
    begun = time.perf_counter()
    while server.worker.waiting:
        assert time.perf_counter() - begun < within
        time.sleep(0.01)
    return time.perf_counter() - begun


def leave(url: str) -> None:
    """Request a long job over its own socket, and disconnect in the middle of it."""
    session = uuid.uuid4().hex
    data = ["a", "", 0, 50, None, 64, 64, "model's own", "tiny", "paper"]
    body = {"data": data, "fn_index": handler(url, "compare"), "session_hash": session}
    assert ask(url, "/gradio_api/queue/join", body)[0] == 200
    connection = http.client.HTTPConnection(url.split("/")[2], timeout=60)
    connection.request("GET", f"/gradio_api/queue/data?session_hash={session}")
    answer = connection.getresponse()
    while b'"step"' not in (line := answer.readline()):
        assert line
    connection.close()


def handler(url: str, name: str) -> int:
    """The number under which the page calls a handler."""
    config = json.loads(ask(url, "/config")[1])
    return next(d["id"] for d in config["dependencies"] if d["api_name"] == name)


def pixels(file: str) -> bytes:
    with Image.open(file) as image:
        return image.tobytes()
