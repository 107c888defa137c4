"""Fetches URLs for clients without allowing server-side request forgery.

The client chooses where this process connects. Therefore only hosts on the operator's list are contacted, only by http
and https, and only on the default ports or those that the list names. Names are resolved here, and the connection goes
to an address that was checked; the name is not resolved again. Redirects are followed by hand with the same checks.
Callers should not tell clients why a fetch failed: a private address, a closed port and a slow server get the same
message.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import AsyncGenerator, Callable

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from serving.errors import InternalError
from serving.http.addresses import is_public_address
from serving.settings.router import RemoteImageSettings

_PORTS = {"http": 80, "https": 443}
_MAX_CONNECTIONS = 64
_READ_BYTES = 64 * 1024
_REDIRECTS = (301, 302, 303, 307, 308)
_HOST_NAME = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*")


class FetchRefusedError(Exception):
    """A URL was refused or could not be fetched. The reason must not reach the client."""


FETCH_ERRORS = (FetchRefusedError, aiohttp.ClientError, OSError, ValueError)
"""All exceptions that `Fetcher.fetch` may raise because of a client's URL."""


class CheckedResolver(AbstractResolver):
    """Resolves names and returns checked addresses only, which the connection then uses. A name with one forbidden
    address is refused altogether."""

    def __init__(self, check_address: Callable[[str], bool]) -> None:
        self._check_address = check_address

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family)
        results = [
            ResolveResult(
                hostname=host,
                host=str(address[0]),
                port=port,
                family=kind,
                proto=protocol,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for kind, _, protocol, _, address in found
        ]
        if not results or not all(self._check_address(result["host"]) for result in results):
            raise OSError("the name leads to an address that may not be asked")
        return results

    async def close(self) -> None:
        """Do nothing: no resources are held."""


class Fetcher:
    """Fetches URLs according to one list of hosts. Create one per process and list."""

    def __init__(
        self,
        settings: RemoteImageSettings,
        accept: str,
        agent: str,
        check_address: Callable[[str], bool] = is_public_address,
    ) -> None:
        """
        Args:
            settings: hosts and limits.
            accept: value of the `Accept` header.
            agent: value of the `User-Agent` header.
            check_address: whether an IP address may be contacted; replaced in tests only.
        """
        self._settings = settings
        self._headers = {"accept": accept, "accept-encoding": "identity", "user-agent": agent}
        self._check_address = check_address
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Open the HTTP session. Call it in the event loop that fetches."""
        connector = aiohttp.TCPConnector(
            resolver=CheckedResolver(self._check_address),
            use_dns_cache=False,  # an address is checked where it is connected to
            force_close=True,
            limit=_MAX_CONNECTIONS,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=self._settings.timeout_s),
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def fetch(self, text: str) -> AsyncGenerator[bytes]:
        """Yield the content of a URL in pieces. A caller that stops early must close the iterator (`aclosing`).

        Raises:
            FetchRefusedError: the URL is not allowed, was not found, or its content exceeds `max_bytes`.
            aiohttp.ClientError, OSError, ValueError: other failures; see `FETCH_ERRORS`.
        """
        if self._session is None:
            raise InternalError("The service has not started.")
        url = self.check_url(text)
        for _ in range(self._settings.max_redirects + 1):
            async with self._session.get(url, allow_redirects=False) as answer:
                if answer.status in _REDIRECTS:
                    url = self.check_url(answer.headers.get("location", ""), url)
                    continue
                encoding = answer.headers.get("content-encoding", "identity")
                too_large = (answer.content_length or 0) > self._settings.max_bytes
                if answer.status != 200 or encoding.lower() != "identity" or too_large:
                    raise FetchRefusedError
                num_left = self._settings.max_bytes
                while part := await answer.content.read(_READ_BYTES):
                    num_left -= len(part)
                    if num_left < 0:
                        raise FetchRefusedError
                    yield part
                return
        raise FetchRefusedError

    def check_url(self, text: str, base: URL | None = None) -> URL:
        """Check a URL's scheme, host and port. The addresses of a name are checked when it is resolved.

        Raises:
            FetchRefusedError, ValueError: it may not be fetched.
        """
        url = URL(text)
        if base is not None:
            url = base.join(url)
        host = url.raw_host
        if url.scheme not in _PORTS or not host or url.raw_user is not None or url.raw_password is not None:
            raise FetchRefusedError
        try:
            ipaddress.ip_address(host)
        except ValueError:
            if not _HOST_NAME.fullmatch(host):
                raise FetchRefusedError from None
        else:
            # aiohttp does not resolve addresses, so the resolver cannot check this one.
            if not self._check_address(host):
                raise FetchRefusedError
        if not self._is_listed(host.lower(), url.port or 0, _PORTS[url.scheme]):
            raise FetchRefusedError
        return url.with_fragment(None)

    def _is_listed(self, host: str, port: int, usual_port: int) -> bool:
        for entry in self._settings.hosts:
            name, colon, listed_port = entry.lower().rpartition(":")
            if not colon or not listed_port.isdigit() or name.endswith(":"):
                name, listed_port = entry.lower(), str(usual_port)
            name = name.strip("[]")
            is_host = name in ("*", host) or (name.startswith("*.") and host.endswith(name[1:]))
            if is_host and port == int(listed_port):
                return True
        return False
