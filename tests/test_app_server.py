"""The web demo's server: its API, what it refuses, and two hundred requests at once."""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image
from serving import BAD, BASE, ask, handler, idle, leave, pixels, served
from tiny_models import patched_layers, tiny_pipeline, with_safety_checker

from agentsd.app.requests.limits import Limits
from agentsd.app.server import Server, ServerAddress, read_auth, start
from agentsd.errors import LoadError, SettingsError
from agentsd.generation.image_files import read_record
from agentsd.generation.images import make_image
from agentsd.image_settings import ImageSettings
from agentsd.patching.patch import patched

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("model")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Client:
    return Client(server.url, verbose=False)


def untouched(server: Server) -> bool:
    """Whether the pipeline is as it was loaded."""
    pipe = server.worker.pipes["tiny"]
    return not patched_layers(pipe.unet) and type(pipe.scheduler).__name__ == "DDIMScheduler"


@pytest.mark.sample
def test_compare_by_the_api(server: Server, client: Client) -> None:
    found = client.predict(**BASE, seed=3, schedule="faithful", scheduler="Euler a")
    assert found["psnr"] > 0
    assert (found["nsfw_content_detected"], found["notes"]) == (None, [])
    assert found["speedup"] == pytest.approx(
        found["unpatched_seconds"] / found["seconds"], rel=0.05
    )
    settings = ImageSettings(
        prompt="a", seed=3, num_inference_steps=2, guidance_scale=7.5, height=64, width=64
    )
    for variant, schedule in (("unpatched", None), ("patched", "faithful")):
        record = read_record(Path(found[variant]))
        assert record.settings == settings
        assert (record.scheduler, record.model) == ("EulerAncestralDiscreteScheduler", "tiny")
        assert bool(record.schedule) is (schedule is not None)
    assert pixels(found["patched"]) != pixels(found["unpatched"])
    assert untouched(server)


def test_images_equal_those_of_the_library(tmp_path: Path, client: Client) -> None:
    from tiny_models import tiny_unet

    pipe = tiny_pipeline(tmp_path, tiny_unet(sample_size=32))
    found = client.predict(**BASE, seed=5, schedule="paper", guidance_scale=3)
    settings = ImageSettings(
        prompt="a", seed=5, num_inference_steps=2, guidance_scale=3.0, height=64, width=64
    )
    assert make_image(pipe, settings).image.tobytes() == pixels(found["unpatched"])
    with patched(pipe, "paper"):
        assert make_image(pipe, settings).image.tobytes() == pixels(found["patched"])


def test_notes_say_what_is_hidden_or_not_used(server: Server, client: Client) -> None:
    pipe = server.worker.pipes["tiny"]
    given = BASE | {"negative_prompt": "b", "guidance_scale": 1}
    (note,) = client.predict(**given)["notes"]
    assert "the negative prompt is not used" in note
    with_safety_checker(pipe)
    try:
        found = client.predict(**given)
    finally:
        pipe.safety_checker = pipe.feature_extractor = None
    assert (found["psnr"], found["nsfw_content_detected"]) == (None, True)
    assert not Image.open(found["patched"]).getbbox()
    assert [note.partition(":")[0] for note in found["notes"][:2]] == [
        "Original",
        "agentsd",
    ]


@pytest.mark.parametrize(
    ("given", "says"), BAD, ids=[f"{next(iter(g))}-{i}" for i, (g, _) in enumerate(BAD)]
)
def test_bad_values_get_the_message(
    server: Server, client: Client, given: dict[str, Any], says: str
) -> None:
    with pytest.raises(AppError) as raised:
        client.predict(**BASE | given)
    assert says in str(raised.value)
    assert "Traceback" not in str(raised.value)
    assert untouched(server)


REFUSED = [
    "/gradio_api/file=/etc/passwd",
    "/gradio_api/file=../../etc/passwd",
    "/gradio_api/file=pyproject.toml",
    "/gradio_api/file=http://127.0.0.1:22/",
    "/gradio_api/proxy=http://127.0.0.1/",
    "/gradio_api/run-history/buckets",
    "/gradio_api/component_server/",
    "/gradio_api/vibe-code/",
    "/gradio_api/deep_link?session_hash=x",
    "/custom_component/1/client/component/index.js",
    "/static/..%2f..%2f..%2f..%2fetc/passwd",
    "/assets/%2e%2e/%2e%2e/routes.py",
    "/monitoring/summary",
    "/docs",
]


@pytest.mark.parametrize("path", REFUSED)
def test_no_route_to_a_file_or_an_address(server: Server, path: str) -> None:
    status, text = ask(server.url, path)
    assert status in (403, 404)
    assert "root:" not in text


def queued(server: Server, number: int, data: list[Any]) -> tuple[int, Any]:
    """Call a handler as the page does; returns its last answer."""
    session = uuid.uuid4().hex
    body = {"data": data, "fn_index": number, "session_hash": session}
    status, text = ask(server.url, "/gradio_api/queue/join", body)
    if status != 200:
        return status, text
    _, text = ask(server.url, f"/gradio_api/queue/data?session_hash={session}")
    events = [json.loads(line[5:]) for line in text.splitlines() if line.startswith("data:")]
    return status, next(m["output"] for m in events if m["msg"] == "process_completed")


def test_files_cannot_be_named(server: Server) -> None:
    """Neither local paths nor addresses; gradio would copy the first and fetch the second."""
    rest = ["", 0, 1, None, None, None, "model's own", "tiny", "paper"]
    meta = {"_type": "gradio.FileData"}
    number = handler(server.url, "compare")
    assert queued(server, number, ["a", *rest])[1]["data"][0]["psnr"] > 0
    _, here = queued(server, number, [{"path": "/etc/passwd", "meta": meta}, *rest])
    assert "data" not in here
    status, text = queued(server, number, [{"path": "http://127.0.0.1:9/", "meta": meta}, *rest])
    assert (status, "uploaded, not named" in text) == (400, True)


def test_handlers_of_the_page_enforce_the_limits_too(server: Server) -> None:
    generate = handler(server.url, "generate")
    image = ["a", "", 0, 1, 2, 2.0, 64, 64, "model's own", "tiny", None, 0.8, "none", 1]
    good = [*image, "faithful", None, None]
    assert "Done" in queued(server, generate, good)[1]["data"][0]
    for place, value, says in (
        (3, 100, "not in the list of choices"),
        (4, 1000, "maximum value 50"),
        (6, 10**6, "maximum value"),
        (9, "/etc", "not in the list of choices"),
        (12, "/etc", "not in the list of choices"),
        (14, "/etc/passwd", "must be a mapping"),
    ):
        data = [*good]
        data[place] = value
        answer = json.dumps(queued(server, generate, data)[1])
        assert says in answer
        assert "Done" not in answer
    plots = handler(server.url, "make_plot")
    many = ["seed", "0, 1, 2", "steps", "1, 2, 3"]
    assert "at most 6 images" in json.dumps(queued(server, plots, [*good[:-2], *many])[1])
    assert untouched(server)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"x" * 300_000, 413),
        (b"[" * 100_000, 400),
        (b'{"data":', 422),
        ({"data": [], "session_hash": "x"}, 400),
    ],
)
def test_odd_bodies(server: Server, body: Any, status: int) -> None:
    assert ask(server.url, "/gradio_api/queue/join", body)[0] == status


def test_uploads_have_a_size(server: Server) -> None:
    boundary = "x" * 20
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = head.encode() + b"\0" * (21 * 2**20) + f"\r\n--{boundary}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    assert ask(server.url, "/gradio_api/upload", body, kind)[0] == 413


def test_readiness(server: Server) -> None:
    status, text = ask(server.url, "/healthz")
    assert (status, json.loads(text)) == (200, {"ready": True, "models": ["tiny"], "jobs": 0})


def test_a_full_queue_refuses_requests(tmp_path: Path) -> None:
    with served(tmp_path, Limits(queue_size=1, max_steps=1000)) as server:
        client = Client(server.url, verbose=False)
        running = client.submit(**BASE | {"num_inference_steps": 900})
        while server.worker.waiting == 0:
            time.sleep(0.02)
        queued = client.submit(**BASE)
        while server.worker.waiting == 1:
            time.sleep(0.02)
        with pytest.raises(Exception, match=r"503|full"):
            client.predict(**BASE)
        for job in (running, queued):
            job.cancel()


def test_login(tmp_path: Path) -> None:
    with served(tmp_path, auth=[("ann", "secret")]) as server:
        assert ask(server.url, "/healthz")[0] == 200
        assert ask(server.url, "/config")[0] == 401
        assert ask(server.url, "/gradio_api/queue/join", {"data": [], "fn_index": 0})[0] == 401
        with pytest.raises(Exception, match=r"401|redentials|login"):
            Client(server.url, auth=("ann", "wrong"), verbose=False)
        client = Client(server.url, auth=("ann", "secret"), verbose=False)
        assert client.predict(**BASE)["seconds"] > 0


def test_auth_is_read_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "auth"
    file.write_text("ann:se:cret\n\nbob:b\n")
    assert read_auth(file, "x:y") == [("ann", "se:cret"), ("bob", "b")]
    assert read_auth(None, "x:y") == [("x", "y")]
    assert read_auth(None, None) is None
    for wrong, says in (("ann", "line 1 is not user:password"), ("\n", "has no users")):
        with pytest.raises(SettingsError, match=f"AGENTSD_AUTH.*{says}"):
            read_auth(None, wrong)


def test_a_port_in_use(server: Server, tmp_path: Path) -> None:
    taken = int(server.url.rstrip("/").rpartition(":")[2])
    with pytest.raises(LoadError, match=f"cannot listen on 127.0.0.1:{taken}"):
        start({"tiny": tiny_pipeline(tmp_path)}, Limits(), ServerAddress(port=taken))


def test_links_start_with_the_path_of_a_proxy(tmp_path: Path) -> None:
    with served(tmp_path, root_path="/agentsd") as server:
        config = json.loads(ask(server.url, "/config")[1])
        assert config["root"].endswith("/agentsd")


def test_leaving_stops_the_job(server: Server) -> None:
    leave(server.url)
    assert idle(server) < 3
    assert untouched(server)


def test_one_handler_of_an_event_at_most_waits_for_the_last(server: Server) -> None:
    """Two of them would call each other forever; see components/events.py."""
    config = httpx.get(f"{server.url.rstrip('/')}/config").json()
    waiting = Counter(
        (target, event)
        for handler in config["dependencies"]
        if handler["trigger_mode"] == "always_last"
        for target, event in map(tuple, handler["targets"])
    )
    assert waiting, "nothing was looked at"
    assert [event for event, count in waiting.items() if count > 1] == []
