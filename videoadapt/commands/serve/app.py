"""What the page answers over HTTP: the page itself, its two files, and videos.

A video is the body of `POST /videos?name=NAME`. The answer is one JSON object a line: progress, then the answer.
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import AsyncIterator
from dataclasses import asdict
from http import HTTPStatus
from pathlib import Path

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from videoadapt.commands.serve.answer import Answer, page_html
from videoadapt.commands.serve.queue import VideoQueue
from videoadapt.config.sections import ServeConfig
from videoadapt.data.video.suffixes import is_media, suffix_of
from videoadapt.errors import plural
from videoadapt.evaluation.predict import Predictor

FILES = Path(__file__).parent
# The browser itself refuses every request to another host, and every script that is not ours.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
_NO_KEY = "This page needs its key: open the whole address that `videoadapt serve` has printed, up to its end.\n"


def make_app(predictor: Predictor, queue: VideoQueue, key: str, port: int) -> Starlette:
    """Returns the application.

    Args:
        predictor: The model, its policy and their settings.
        queue: Answers the videos.
        key: The secret of the address. It moves into a cookie at the first visit.
        port: The port, a part of the cookie's name: the pages of several runs share the cookies of one host.
    """
    cookie = f"videoadapt-{port}"
    page = page_html(predictor)

    def allowed(request: Request) -> bool:
        given = request.query_params.get("key") or request.cookies.get(cookie) or ""
        return secrets.compare_digest(given.encode(), key.encode())

    async def show(request: Request) -> Response:
        if not allowed(request):
            return PlainTextResponse(_NO_KEY, HTTPStatus.FORBIDDEN)
        response = HTMLResponse(page)
        # strict: a page of another host that posts to this one has no key.
        response.set_cookie(cookie, key, httponly=True, samesite="strict")
        return response

    async def take(request: Request) -> Response:
        if not allowed(request):
            return _refusal(HTTPStatus.FORBIDDEN, _NO_KEY.strip())
        return await _take(request, queue, predictor.config.serve)

    return Starlette(
        routes=[
            Route("/", show),
            Route("/videos", take, methods=["POST"]),
            *(_file(name, kind) for name, kind in (("page.css", "text/css"), ("page.js", "text/javascript"))),
        ],
        # Another name for this machine is a name of somebody else, who makes the browser ask here (DNS rebinding).
        middleware=[Middleware(_Headers), Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])],
    )


async def _take(request: Request, queue: VideoQueue, limits: ServeConfig) -> Response:
    """Receives a video, and starts on it."""
    max_mb = limits.max_mb
    if len(queue) >= limits.queue:
        text = f"{plural(len(queue), 'video')} wait already (serve.queue); try again in a moment"
        return _refusal(HTTPStatus.SERVICE_UNAVAILABLE, text)
    size = request.headers.get("content-length", "")
    if size.isdecimal() and int(size) > max_mb * 1e6:
        return _too_large(max_mb)
    name = request.query_params.get("name", "video")
    upload, complete = None, False
    try:
        # The name on the disk is ours. Of the user's name it keeps a known suffix, by which images are recognised.
        handle, path = tempfile.mkstemp(dir=queue.folder, suffix=suffix_of(name) if is_media(name) else "")
        upload = queue.add(name, Path(path))
        complete = await _receive(request, handle, max_mb)
    except ClientDisconnect:
        return Response(status_code=HTTPStatus.BAD_REQUEST)  # nobody reads it
    except OSError as error:
        return _refusal(HTTPStatus.INSUFFICIENT_STORAGE, f"it cannot be stored here: {error.strerror}")
    finally:
        if upload is not None and not complete:
            queue.remove(upload)
    if upload is None or not complete:
        return _too_large(max_mb)
    return StreamingResponse(_lines(queue.answer(upload)), media_type="application/x-ndjson")


async def _receive(request: Request, handle: int, max_mb: float) -> bool:
    """Writes the body of a request to an open file; returns False if it is too large."""
    written = 0
    with os.fdopen(handle, "wb") as file:
        async for chunk in request.stream():
            written += len(chunk)
            if written > max_mb * 1e6:
                return False
            file.write(chunk)
    return True


async def _lines(answers: AsyncIterator[Answer]) -> AsyncIterator[str]:
    async for answer in answers:
        yield json.dumps(asdict(answer)) + "\n"


def _too_large(max_mb: float) -> Response:
    return _refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"it is larger than {max_mb:g} MB (serve.max_mb)")


def _refusal(status: HTTPStatus, text: str) -> Response:
    line = json.dumps(asdict(Answer("refused", text))) + "\n"
    return Response(line, status, media_type="application/x-ndjson", headers={"Connection": "close"})


def _file(name: str, kind: str) -> Route:
    content = (FILES / name).read_bytes()

    async def send(request: Request) -> Response:  # noqa: ARG001 - an endpoint's signature
        return Response(content, media_type=kind)

    return Route(f"/{name}", send)


class _Headers:
    """Adds the headers of `_HEADERS` to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self.app(scope, receive, with_headers)
