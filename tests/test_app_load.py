"""``agentsd app`` in its own process: it serves, alone and for eight clients at once."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from serving import BAD, BASE, ask, free_port, leave, pixels
from tiny_models import smallest_unet, tiny_pipeline

from agentsd.app.server import Server
from agentsd.cli import main

pytestmark = pytest.mark.slow

CLIENTS, REQUESTS = 8, 100
KINDS = ["good"] * 6 + ["cancelled", "cancelled", "bad", "gone"]
"""What clients do, in turn."""

VARIANTS: list[dict[str, Any]] = [
    {"seed": 1, "schedule": "paper"},
    {"seed": 1, "schedule": "faithful"},
    {"seed": 2, "schedule": "paper", "scheduler": "Heun"},
    {"seed": 3, "schedule": "faithful", "scheduler": "Euler a", "num_inference_steps": 3},
    {"seed": 4, "schedule": "phases:\n- method: agent\n  agents: 16\n  ratio: 0.3\n"},
    {"seed": 5, "schedule": "paper", "height": 96, "guidance_scale": 1.0},
]
IMAGES = ("unpatched", "patched")


@pytest.fixture
def app(tmp_path: Path) -> Iterator[tuple[str, psutil.Process]]:
    """``agentsd app`` with the smallest model: its address and its process."""
    (tmp_path / "tiny").mkdir()
    tiny_pipeline(tmp_path / "tiny", smallest_unet()).save_pretrained(tmp_path / "tiny")
    port = free_port()
    options = ["--model", "tiny", "--port", str(port), "--max-steps", "50", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "agentsd", "app", *options],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url == f"http://127.0.0.1:{port}/"
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        assert process.wait(20) == 0


@pytest.mark.sample
@pytest.mark.command("app")
def test_the_command_serves_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which has imported all that takes long."""
    tiny_pipeline(tmp_path, smallest_unet()).save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    health = []

    def asked(server: Server) -> None:
        health.append(ask(server.url, "/healthz"))
        server.close()

    monkeypatch.setattr(Server, "wait", asked)
    port = free_port()
    with pytest.raises(SystemExit, match="0"):
        main(["app", "--model", "tiny", "--port", str(port), "--device", "cpu"])
    assert capsys.readouterr().out.strip() == f"http://127.0.0.1:{port}/"
    ((status, text),) = health
    assert (status, json.loads(text)) == (200, {"ready": True, "models": ["tiny"], "jobs": 0})


def test_the_command_serves_until_it_is_stopped(app: tuple[str, psutil.Process]) -> None:
    url, process = app
    status, text = ask(url, "/healthz")
    assert (status, json.loads(text)) == (200, {"ready": True, "models": ["tiny"], "jobs": 0})
    assert process.is_running()


@pytest.mark.timeout(600)
def test_images_do_not_depend_on_other_requests(app: tuple[str, psutil.Process]) -> None:
    """Not even if those are cancelled, refused, or abandoned by their visitors."""
    url, process = app
    clients = [Client(url, verbose=False) for _ in range(CLIENTS)]
    size = {"height": 64, "width": 64}
    alone = []
    for given in VARIANTS:
        found = clients[0].predict(**BASE | size | given)
        alone.append([pixels(found[image]) for image in IMAGES])
    assert (
        len({image for pair in alone for image in pair}) == 11
    )  # one unpatched image occurs twice
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    memory: list[int] = []
    lock = threading.Lock()

    def ask_for(number: int, client: Client) -> None:
        kind, variant = KINDS[number * 7 % len(KINDS)], number % len(VARIANTS)
        given = BASE | size | VARIANTS[variant]
        if kind == "good":
            found = client.predict(**given)
            if [pixels(found[image]) for image in IMAGES] != alone[variant]:
                wrong.append(f"request {number}: {VARIANTS[variant]}")
        elif kind == "cancelled":
            job = client.submit(**given | {"num_inference_steps": 50})
            time.sleep(0.1 * (number % 5))
            job.cancel()
        elif kind == "bad":
            values, says = BAD[number % len(BAD)]
            with pytest.raises(AppError) as raised:
                client.predict(**given | values)
            assert says in str(raised.value)
        else:
            leave(url)
        with lock:
            counts[kind] += 1
            memory.append(process.memory_info().rss)

    def visit(which: int) -> None:
        for number in range(which, REQUESTS, CLIENTS):
            ask_for(number, clients[which])

    begun = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        for done in [pool.submit(visit, which) for which in range(CLIENTS)]:
            done.result()
    seconds = time.perf_counter() - begun
    growth = (memory[-1] - memory[REQUESTS // 4]) / 2**20
    print(
        f"{dict(counts)} in {seconds:.0f} s; memory {memory[-1] / 2**20:.0f} MB, {growth:+.1f} MB"
    )
    assert (counts.total(), min(counts[kind] for kind in KINDS) >= 10) == (REQUESTS, True)
    assert wrong == []
    assert growth < 16  # MB, over 75 requests
    while '"jobs":0' not in ask(url, "/healthz")[1]:
        time.sleep(0.05)
