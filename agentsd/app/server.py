"""Serve the page: authentication, request filtering and the readiness check."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import LoadError, SettingsError
from ..text_files import read_text
from .jobs.worker import Worker
from .requests.limits import Limits
from .requests.schedule_library import ScheduleLibrary
from .requests.uploads import MAX_PNG

HERE = Path(__file__).parent

MAX_BODY = 256 * 1024
"""Bytes of a request other than an upload."""

UNUSED = tuple(f"/gradio_api/{name}" for name in ("proxy", "component_server", "deep_link"))
"""Gradio routes that fetch URLs, call components or store sessions as files."""

SESSIONS = 128
"""Visitors whose state is kept; the least recently active are dropped first."""


class Guard:
    """Rejects requests that the page does not need, before gradio sees them.

    Bodies must be small, and no file in one may be a URL, which gradio would fetch. Access to files
    on the server is checked by gradio, which serves only its folder of temporary files.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reject a request, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if path.startswith(UNUSED):
            await _refusal(404, "not found")(scope, receive, send)
        elif scope["method"] != "POST" or path.startswith("/gradio_api/upload"):
            await self._app(scope, receive, send)
        else:
            body = await _read_body(receive)
            if body is None:
                await _refusal(413, f"at most {MAX_BODY:,} bytes")(scope, receive, send)
            elif _names_addresses(body):
                await _refusal(400, "files are uploaded, not named")(scope, receive, send)
            else:
                await self._app(scope, _replay(body, receive), send)


def _refusal(status: int, why: str) -> JSONResponse:
    return JSONResponse({"detail": why}, status)


async def _read_body(receive: Receive) -> bytes | None:
    """The body of a request, or None if it is too large."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            return None
        if not message.get("more_body"):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that starts with a body that was already read."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _names_addresses(body: bytes) -> bool:
    """Whether JSON has a file, in gradio's form, whose path is a URL."""
    try:
        values = [json.loads(body or b"null")]
    except (ValueError, RecursionError):
        return False  # gradio rejects it
    while values:
        value = values.pop()
        if isinstance(value, dict):
            if "meta" in value and ":" in str(value.get("path", ""))[:12]:
                return True
            values += value.values()
        elif isinstance(value, list):
            values += value
    return False


class ServerAddress(NamedTuple):
    """Where and how to serve."""

    host: str = "127.0.0.1"
    port: int = 7860
    root_path: str = ""
    auth: list[tuple[str, str]] | None = None


def read_auth(file: Path | None, variable: str | None) -> list[tuple[str, str]] | None:
    """Read the accounts, one ``user:password`` per line; ``None`` if no login is required.

    Args:
        file: File of such lines.
        variable: Text of the environment variable, used if there is no file.

    Raises:
        SettingsError: If a line is not ``user:password``, or there are no lines.
    """
    text = read_text(file, SettingsError) if file is not None else variable
    if text is None:
        return None
    source = str(file) if file is not None else "AGENTSD_AUTH"
    pairs = []
    for number, line in enumerate(text.split("\n"), start=1):
        user, colon, password = line.strip().partition(":")
        if line.strip() and not (user and colon and password):
            raise SettingsError(f"{source}: line {number} is not user:password")
        if user:
            pairs.append((user, password))
    if not pairs:
        raise SettingsError(f"{source}: has no users; write one user:password per line")
    return pairs


def health(worker: Worker) -> Callable[[Request], JSONResponse]:
    """Readiness, for proxies and supervisors: 200 while jobs are accepted, then 503."""

    def answer(_: Request) -> JSONResponse:
        state = {"ready": worker.open, "models": list(worker.pipes), "jobs": worker.waiting}
        return JSONResponse(state, 200 if worker.open else 503)

    return answer


@dataclass(frozen=True)
class Server:
    """A page that is being served."""

    url: str
    worker: Worker
    demo: Any
    """gradio's ``Blocks``."""
    folder: str
    """Folder of the files that visitors made."""

    def wait(self) -> None:
        """Serve until the process receives SIGINT or SIGTERM, then close."""
        ended = Event()
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, lambda *_: ended.set())
        ended.wait()
        self.close()

    def close(self) -> None:
        """Stop the jobs and the server, and remove its files."""
        self.worker.close()
        self.demo.close(verbose=False)
        shutil.rmtree(self.folder, ignore_errors=True)


def start(
    pipes: Mapping[str, DiffusionPipeline],
    limits: Limits,
    address: ServerAddress,
    library: ScheduleLibrary | None = None,
    loras: Mapping[str, str] | None = None,
) -> Server:
    """Serve in the background.

    Args:
        pipes: The models that visitors choose from, by name.
        limits: How much they may ask for.
        address: Where and how to serve.
        library: The schedules to choose from; the presets by default.
        loras: Paths of the LoRAs to choose from, by name.

    Returns:
        The server, which runs in a thread.

    Raises:
        LoadError: If the server cannot listen on the port.
    """
    # gradio reads these on import: no analytics are sent, and files go to a folder of their own.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "100"  # kept in memory and searched each time
    folder = os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="agentsd-app-")
    from .page import build, theme

    worker = Worker(pipes, limits.queue_size)
    demo = build(worker, limits, library, loras)
    demo.queue(api_open=False, default_concurrency_limit=4)
    try:
        demo.launch(
            server_name=address.host,
            server_port=address.port,
            root_path=address.root_path,
            auth=address.auth,
            prevent_thread_lock=True,
            quiet=True,
            inbrowser=False,
            share=False,
            show_error=False,
            allowed_paths=[],
            max_file_size=MAX_PNG,
            state_session_capacity=SESSIONS,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=["api"],
            theme=theme(),
            css_paths=[HERE / "page.css", HERE / "result" / "result.css"],
            js=(HERE / "page.js").read_text(encoding="utf-8"),
            app_kwargs={
                "middleware": [Middleware(Guard)],
                "routes": [Route("/healthz", health(worker))],
            },
        )
    except OSError as error:
        raise LoadError(
            f"cannot listen on {address.host}:{address.port} ({error}); give another --port"
        ) from None
    return Server(demo.local_url, worker, demo, folder)
