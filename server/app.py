"""The routes: the page, the WebSocket, videos and records, health, what the page has to know."""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket

from pipeline.changes import POLICIES
from server.access import Access, Guard
from server.connection import Connection, Rate
from server.pool import SessionPool
from server.protocol import FORMATS, Limits
from utils.errors import UserError

STATIC = Path(__file__).parent / "static"
SOCKETS_PER_ADDRESS = 16


@dataclass(frozen=True)
class AppOptions:
    """What clients may do, and what the page shows of the model.

    `about`: the model's part of `/v1/config`: title, model, in_flight, sinks,
    examples, composer.
    """

    access: Access
    limits: Limits = field(default_factory=Limits)
    rate: Rate = field(default_factory=Rate)
    about: Mapping[str, Any] = field(default_factory=dict)
    static: Path = STATIC


def build_app(pool: SessionPool, options: AppOptions) -> Starlette:
    """The ASGI application; the pool lives as long as it does."""
    routes = Routes(pool, options)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with pool:
            yield

    return Starlette(
        routes=[
            Route("/v1/health", routes.health),
            Route("/v1/config", routes.config),
            Route("/v1/sessions/{name}/video.mp4", routes.video),
            Route("/v1/sessions/{name}/video.json", routes.record),
            WebSocketRoute("/v1/realtime/video", routes.realtime),
            Mount("/", StaticFiles(directory=options.static, html=True)),
        ],
        middleware=[Middleware(Guard, access=options.access)],
        exception_handlers={HTTPException: _told},
        lifespan=lifespan,
    )


class Routes:
    """The handlers."""

    def __init__(self, pool: SessionPool, options: AppOptions) -> None:
        self.pool, self.options = pool, options
        self._sockets: dict[str, int] = {}

    async def health(self, request: Request) -> Response:
        """Whether the server answers, and how full it is."""
        pool = self.pool
        return JSONResponse(
            {
                "status": "ok",
                "sessions": pool.sessions,
                "max_sessions": pool.options.max_sessions,
                "disk_bytes": pool.storage.used,
            }
        )

    async def config(self, request: Request) -> Response:
        """What a page has to know before it starts a session."""
        engine, limits = self.pool.engine, self.options.limits
        height, width = engine.size
        return JSONResponse(
            {
                **self.options.about,
                "width": width,
                "height": height,
                "fps": engine.fps,
                "block_frames": engine.block_frames,
                "policies": POLICIES,
                "formats": FORMATS,
                "max_prompt": limits.max_prompt,
                "max_seconds": limits.max_seconds,
                "lead": self.pool.options.lead,
            }
        )

    async def video(self, request: Request) -> Response:
        """A whole mp4 of what was made so far."""
        name = request.path_params["name"]
        live = self.pool.find(name)
        if live is not None and live.recording.frames:
            try:
                path = await self.pool.saved_video(live)
            except UserError as error:
                raise HTTPException(507, str(error)) from error
        else:
            path = _there(self.pool.storage.finished(name, ".mp4"))
        return FileResponse(path, media_type="video/mp4", filename=f"{name}.mp4")

    async def record(self, request: Request) -> Response:
        """What makes the same video again: for `inference.py --replay`."""
        name = request.path_params["name"]
        live = self.pool.find(name)
        if live is not None:
            record = await self.pool.record_of(live)
        else:
            path = _there(self.pool.storage.finished(name, ".json"))
            record = json.loads(path.read_text(encoding="utf-8"))
        body = json.dumps(record, indent=1, ensure_ascii=False)
        disposition = {"Content-Disposition": f'attachment; filename="{name}.json"'}
        return Response(body, media_type="application/json", headers=disposition)

    async def realtime(self, socket: WebSocket) -> None:
        """One client, as long as its socket is open."""
        address = socket.client.host if socket.client else ""
        if self._sockets.get(address, 0) >= SOCKETS_PER_ADDRESS:
            await socket.send_denial_response(_error(429, "too many sockets are open already"))
            return
        self._sockets[address] = self._sockets.get(address, 0) + 1
        try:
            wanted = socket.query_params.get("format", FORMATS[0])
            if wanted not in FORMATS:
                text = f"format must be one of {', '.join(FORMATS)}"
                await socket.send_denial_response(_error(400, text))
                return
            await Connection(
                socket,
                self.pool,
                limits=self.options.limits,
                rate=self.options.rate,
                format=wanted,
                address=address,
            ).serve()
        finally:
            self._sockets[address] -= 1
            if not self._sockets[address]:
                del self._sockets[address]


def about_model(
    *,
    title: str,
    model: str,
    in_flight: int,
    sinks: Sequence[int],
    examples: Sequence[str],
    composer: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The model's part of `/v1/config`. in_flight: blocks that are in the making when one is made.
    composer: sentences that the model understands.
    """
    return {
        "title": title,
        "model": model,
        "in_flight": in_flight,
        "sinks": list(sinks),
        "examples": list(examples),
        "composer": composer,
    }


def _there(path: Path | None) -> Path:
    if path is None:
        raise HTTPException(404, "there is no such video")
    return path


def _error(status: int, message: str) -> JSONResponse:
    codes = {400: "bad_request", 404: "not_found", 429: "too_many", 507: "disk_full"}
    code = codes.get(status, "error")
    return JSONResponse({"code": code, "message": message}, status_code=status)


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail)
