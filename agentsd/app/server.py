"""Serve the page: who may come in, what may be sent, whether it is ready."""

from __future__ import annotations

import json
import os
import re
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
from .limits import MAX_PNG, Limits
from .worker import Worker

MAX_BODY = 256 * 1024
"""Bytes of a request that is no upload."""

ROUTES = re.compile(
    r"/($|healthz$|config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|login|logout|assets/|static/"
    r"|svelte/|gradio_api/(info|queue/|call/|run/|cancel|reset|heartbeat/|upload|startup-events|theme\.css"
    r"|user|login_check|token|app_id|file=(?!https?:)))",
    re.IGNORECASE,
)
"""What is answered. The rest of gradio's routes (proxies, run history, component calls, code
editing) the page does not use."""

SESSIONS = 128
"""Visitors whose state is kept; the ones longest away are forgotten first."""


class Guard:
    """Turns away what the page does not need, before gradio sees it.

    Bodies are small, and no file that is named in one is an address: gradio would fetch it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if not ROUTES.match(path):
            await _refusal(404, "not here")(scope, receive, send)
        elif scope["method"] != "POST" or path.startswith("/gradio_api/upload"):
            await self._app(scope, receive, send)
        else:
            body = await _read(receive)
            if body is None:
                await _refusal(413, f"at most {MAX_BODY:,} bytes")(scope, receive, send)
            elif _names_addresses(body):
                await _refusal(400, "files are uploaded, not named")(scope, receive, send)
            else:
                await self._app(scope, _again(body, receive), send)


def _refusal(status: int, why: str) -> JSONResponse:
    return JSONResponse({"detail": why}, status)


async def _read(receive: Receive) -> bytes | None:
    """A request's body, or None if it is too large."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            return None
        if not message.get("more_body"):
            return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """Give a body that was read to the one who is to answer it."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _names_addresses(body: bytes) -> bool:
    """Whether JSON has a file, as gradio knows them, that lies elsewhere."""
    try:
        found = [json.loads(body or b"null")]
    except (ValueError, RecursionError):
        return False  # is refused by who reads it
    while found:
        value = found.pop()
        if isinstance(value, dict):
            if "meta" in value and ":" in str(value.get("path", ""))[:12]:
                return True
            found += value.values()
        elif isinstance(value, list):
            found += value
    return False


class ServerAddress(NamedTuple):
    """Where and how to serve."""

    host: str = "127.0.0.1"
    port: int = 7860
    root_path: str = ""
    auth: list[tuple[str, str]] | None = None


def read_auth(file: Path | None, variable: str | None) -> list[tuple[str, str]] | None:
    """Who may come in, a ``user:password`` a line; None where everybody may.

    Args:
        file: Read if given.
        variable: Text of the environment variable, else.

    Raises:
        SettingsError: If there is a line that is not ``user:password``, or none.
    """
    text = read_text(file, SettingsError) if file is not None else variable
    if text is None:
        return None
    place = str(file) if file is not None else "AGENTSD_AUTH"
    pairs = []
    for number, line in enumerate(text.split("\n"), start=1):
        user, colon, password = line.strip().partition(":")
        if line.strip() and not (user and colon and password):
            raise SettingsError(f"{place}: line {number} is not user:password")
        if user:
            pairs.append((user, password))
    if not pairs:
        raise SettingsError(f"{place}: names nobody; a line is user:password")
    return pairs


def health(worker: Worker) -> Callable[[Request], JSONResponse]:
    """Readiness, for proxies and supervisors: 200 while jobs are taken, 503 when no more."""

    def answer(_: Request) -> JSONResponse:
        told = {"ready": worker.open, "models": list(worker.pipes), "jobs": worker.waiting}
        return JSONResponse(told, 200 if worker.open else 503)

    return answer


@dataclass(frozen=True)
class Server:
    """A page that is being served."""

    url: str
    worker: Worker
    demo: Any
    """gradio's ``Blocks``."""
    folder: str
    """Of the files that visitors made."""

    def wait(self) -> None:
        """Serve until the process is interrupted or asked to end, then close."""
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


def start(pipes: Mapping[str, DiffusionPipeline], limits: Limits, place: ServerAddress) -> Server:
    """Serve in the background.

    Args:
        pipes: What visitors may choose from, by name.
        limits: What they may ask for.
        place: Where.

    Returns:
        The server, which runs in a thread.

    Raises:
        LoadError: If the port cannot be listened on.
    """
    # Before gradio is imported and looks: nothing is told to its makers, and files lie apart.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "100"  # kept in memory, and gone over each time
    folder = os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="agentsd-app-")
    from .page import build, theme

    worker = Worker(pipes)
    demo = build(worker, limits)
    demo.queue(api_open=False, max_size=limits.queue_size, default_concurrency_limit=4)
    try:
        demo.launch(
            server_name=place.host,
            server_port=place.port,
            root_path=place.root_path,
            auth=place.auth,
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
            css_paths=Path(__file__).with_name("page.css"),
            app_kwargs={
                "middleware": [Middleware(Guard)],
                "routes": [Route("/healthz", health(worker))],
            },
        )
    except OSError as error:
        raise LoadError(
            f"cannot listen on {place.host}:{place.port} ({error}); give another --port"
        ) from None
    return Server(demo.local_url, worker, demo, folder)
