"""Middleware between the network and the page: limits on the size of requests, their origin, and their sender.

Starlette's middleware limits sizes. Its check of `Host` takes names but not "any address", and it has none of `Origin`.
"""

import hashlib
import hmac
import logging
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from ipaddress import ip_address
from urllib.parse import urlsplit

import gradio as gr
from gradio.route_utils import FnIndexInferError
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffattn.app.jobs import Visitor
from diffattn.app.jobs.discretion import without_words

log = logging.getLogger("diffattn.app.page")

UPLOAD_BYTES = "8mb"
BODY_BYTES = 9 * 2**20
"""The largest upload: `UPLOAD_BYTES` with what surrounds them."""

DATA_BYTES = 4 * 2**20
"""The largest request of any other kind: JSON of many small values takes about fifty times its size once it is read."""

LOOPBACK = ("localhost", "127.0.0.1", "::1")
COOKIE = "diffattn-visitor"
NAME = "diffattn.visitor"  # key of an ASGI scope
TRIES, TRY_SECONDS = 5, 60.0  # failed logins of one address, and how long they count
REMEMBERED = 4096  # addresses


@dataclass(frozen=True)
class Access:
    """Who can reach the page; by default programs of this machine alone.

    Raises:
        ValueError: the page would be open to others without a password.
    """

    host: str = "127.0.0.1"  # address to listen on
    share: bool = False  # a public link through gradio's servers
    auth: tuple[str, str] | None = None  # name and password; needed with `share` and with a host other than loopback
    host_names: Sequence[str] = ()  # under which the page is reached, besides those of this machine
    proxy: str | None = None  # address of the proxy whose forwarded headers are trusted; None: none are

    def __post_init__(self) -> None:
        if (self.share or self.from_outside) and not (self.auth and all(self.auth)):
            raise ValueError("a page that others can reach needs --auth NAME:PASSWORD (--share, --listen)")

    @property
    def from_outside(self) -> bool:
        """Whether other machines can connect."""
        return self.host not in LOOPBACK

    def names(self) -> set[str]:
        """Names under which the page may be reached, in lower case."""
        return {*LOOPBACK, *map(str.lower, self.host_names)}


def middleware(hosts: Collection[str], listens_to_all: bool, make_room: Callable[[], None]) -> list[Middleware]:
    """The whole middleware, outermost first.

    Args:
        hosts: names under which the page may be reached, in lower case; names may be added later.
        listens_to_all: also accept any network address.
        make_room: called before an upload.
    """
    return [
        Middleware(Discreet),
        Middleware(SameSite, hosts=hosts, any_address=listens_to_all),
        Middleware(OwnRoutes),
        Middleware(BodyLimits),
        Middleware(LoginThrottle),
        Middleware(Signed),
        Middleware(Uploads, make_room=make_room),
    ]


@contextmanager
def believing(proxy: str | None) -> Iterator[None]:
    """Within the block, a uvicorn server that is created trusts forwarded headers from this address, or from nobody.

    Gradio creates the server and passes no such setting on, so uvicorn's environment variable is the only option.
    """
    key = "FORWARDED_ALLOW_IPS"
    before = os.environ.get(key)
    os.environ[key] = proxy or ""
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


class Discreet:
    """Answers what goes wrong in the server itself; only the stack gets into the log, since a message may quote what a
    client sent, such as the name of an endpoint that is none."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun = False

        async def noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            return await self.app(scope, receive, noting)
        except FnIndexInferError:
            refusal = _refuse(404, "this page has no such endpoint")
        except Exception as error:
            log.error("a request failed\n%s", without_words(error))
            refusal = _refuse(500, "something went wrong; see the server's log for the reason")
        if not begun:
            await refusal(scope, receive, send)


class SameSite:
    """Refuses a `Host` that is not one of the page's (DNS rebinding), and a foreign `Origin` (other sites).

    Programs that send no `Origin`, such as `gradio_client`, are served.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], any_address: bool) -> None:
        self.app, self.hosts, self.any_address = app, hosts, any_address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_own(host):
            return await _refuse(400, "this page is not served under that name")(scope, receive, send)
        if origin is not None and not _is_from(origin, host):
            return await _refuse(403, "requests from other sites are refused")(scope, receive, send)
        await self.app(scope, receive, send)

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            name.encode("ascii")
        except ValueError:
            return False
        return name in self.hosts or (self.any_address and _is_address(name))


class OwnRoutes:
    """Refuses what Gradio serves and this page has no use for: files fetched from elsewhere, and the conversion of
    videos, whose files no quota counts."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if "://" in path or path.rstrip("/").endswith("/process_recording"):
            return await _refuse(404, "this page has no such address")(scope, receive, send)
        await self.app(scope, receive, send)


class BodyLimits:
    """Refuses requests that are too large, before they are read: uploads may be larger than all others."""

    def __init__(self, app: ASGIApp) -> None:
        self.uploads = RequestBodyLimitMiddleware(app, BODY_BYTES)
        self.others = RequestBodyLimitMiddleware(app, DATA_BYTES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self.uploads if _is_upload(scope) else self.others)(scope, receive, send)


class LoginThrottle:
    """Refuses logins from an address after `TRIES` failures within `TRY_SECONDS`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._failed: OrderedDict[str, list[float]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].rstrip("/") != "/login":
            return await self.app(scope, receive, send)
        address, now = _address(scope), time.monotonic()
        recent = [when for when in self._failed.get(address, ()) if now - when < TRY_SECONDS]
        if len(recent) >= TRIES:
            wait = {"Retry-After": str(round(TRY_SECONDS))}
            refusal = PlainTextResponse("too many failed logins: wait a minute", 429, wait)
            return await refusal(scope, receive, send)
        self._keep(address, [*recent, now])  # a failure until it succeeds, so that tries at the same time count

        async def watching(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400:
                self._keep(address, recent)
            await send(message)

        await self.app(scope, receive, watching)

    def _keep(self, address: str, failures: list[float]) -> None:
        self._failed[address] = failures
        self._failed.move_to_end(address)
        if len(self._failed) > REMEMBERED:
            self._failed.popitem(last=False)


class Signed:
    """Gives every browser a name in a signed cookie, and puts the name that a request carries into the ASGI scope."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self._secret = app, secrets.token_bytes(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        scope[NAME] = self._name(Headers(scope=scope).get("cookie", ""))

        async def naming(message: Message) -> None:
            if message["type"] == "http.response.start" and scope[NAME] is None:
                name = secrets.token_hex(16)
                cookie = f"{COOKIE}={name}.{self._sign(name)}; Path=/; HttpOnly; SameSite=Lax"
                MutableHeaders(scope=message).append("set-cookie", cookie)
            await send(message)

        await self.app(scope, receive, naming)

    def _name(self, cookies: str) -> str | None:
        try:
            given = SimpleCookie(cookies).get(COOKIE)
        except CookieError:
            return None
        name, _, signature = given.value.partition(".") if given else ("", "", "")
        signed = hmac.compare_digest(signature.encode(), self._sign(name).encode())
        return name if signed else None

    def _sign(self, name: str) -> str:
        return hmac.new(self._secret, name.encode(), hashlib.sha256).hexdigest()


class Uploads:
    """Makes room on the disk before every upload."""

    def __init__(self, app: ASGIApp, make_room: Callable[[], None]) -> None:
        self.app, self._make_room = app, make_room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _is_upload(scope):
            self._make_room()
        await self.app(scope, receive, send)


def visitor_of(request: gr.Request, tab: str) -> Visitor:
    """Who sent a request from a tab; only the session is taken from what a client can forge."""
    scope = request.request.scope if request.request is not None else {}
    owner = ("user", request.username) if request.username else ("address", _address(scope))
    return Visitor(str(request.session_hash), scope.get(NAME), owner, tab)


def _address(scope: Scope) -> str:
    """The network address; uvicorn takes it from a forwarded header only if a named proxy sent it."""
    return (scope.get("client") or ("",))[0]


def _is_upload(scope: Scope) -> bool:
    return scope["type"] == "http" and scope["path"].rstrip("/").endswith("/upload")


def _is_from(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:  # no address at all
        return False


def _is_address(name: str) -> bool:
    try:
        return bool(ip_address(name))
    except ValueError:
        return False


def _refuse(status: int, why: str) -> PlainTextResponse:
    return PlainTextResponse(why, status)
