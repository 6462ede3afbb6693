"""Who may talk to the server: hosts, origins, a token; and what browsers are told of pages."""

import hmac
import ipaddress
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from http.cookies import SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",  # a page's address may hold the token
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def is_loopback(name: str) -> bool:
    """Whether a host name or address is this machine's own, which no other one reaches."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def new_token() -> str:
    """A token that nobody guesses."""
    return secrets.token_urlsafe(24)


@dataclass(frozen=True)
class Access:
    """What a request has to show.

    `hosts`: names beside those of this machine that it may address the server by, without port (a
    page of another name that was made to point here is no friend); None: any. `token`: None where
    none is needed. `cookie`: the name that a browser keeps it by; one for each port, since ports
    share cookies.
    """

    hosts: frozenset[str] | None
    token: str | None
    cookie: str = "token"

    @classmethod
    def of(cls, server_name: str, port: int, token: str | None, names: Iterable[str]) -> "Access":
        """Of a server that listens on `server_name`; `names` are those that a proxy gives it."""
        hosts = frozenset(map(host_name, names)) if is_loopback(server_name) else None
        return cls(hosts, token, f"token_{port}")

    def refusal(self, headers: Headers, query: str) -> str | None:
        """Why a request is refused; None if it is not."""
        host = headers.get("host", "")
        name = host_name(host)
        if self.hosts is not None and name not in self.hosts and not is_loopback(name):
            return "this name is not one of the server's; give --allowed_host to allow it"
        origin = headers.get("origin")
        if origin is not None and origin.lower().partition("://")[2] != host.lower():
            return "a page of another origin may not use this server"
        if self.token is not None and not self._is_token(headers, query):
            return "the token is missing or wrong: open the address that the server printed"
        return None

    def query_has_token(self, query: str) -> bool:
        """Whether the token is in the address."""
        return self.token is not None and any(map(self._equals, parse_qs(query).get("token", [])))

    def _is_token(self, headers: Headers, query: str) -> bool:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        shown = [bearer.strip()] if scheme.lower() == "bearer" else []
        kept = cookie_parser(headers.get("cookie", "")).get(self.cookie)
        shown += [] if kept is None else [kept]
        return self.query_has_token(query) or any(map(self._equals, shown))

    def _equals(self, word: str) -> bool:
        return hmac.compare_digest(word.encode("utf-8", "replace"), (self.token or "").encode())


def host_name(host: str) -> str:
    """A Host header without its port, in lower case."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


class Guard:
    """ASGI middleware: refuses with 403 what `Access` refuses, and adds the headers."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        query = scope.get("query_string", b"").decode("latin-1")
        refusal = self.access.refusal(Headers(scope=scope), query)
        if scope["type"] == "websocket":
            if refusal is None:
                await self.app(scope, receive, send)
            else:
                socket = WebSocket(scope, receive, send)
                await socket.send_denial_response(_forbidden(refusal))
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(SECURITY_HEADERS)
                if refusal is None and self.access.query_has_token(query):
                    headers.append("Set-Cookie", self._cookie(secure=scope["scheme"] == "https"))
            await send(message)

        app = self.app if refusal is None else _forbidden(refusal)
        await app(scope, receive, send_with_headers)

    def _cookie(self, *, secure: bool) -> str:
        cookie: SimpleCookie = SimpleCookie({self.access.cookie: self.access.token or ""})
        morsel = cookie[self.access.cookie]
        morsel["path"], morsel["httponly"], morsel["samesite"] = "/", True, "Strict"
        morsel["secure"] = secure
        return morsel.OutputString()


def _forbidden(reason: str) -> JSONResponse:
    return JSONResponse({"code": "forbidden", "message": reason}, status_code=403)
