"""Images that a request names by URL, fetched here and put into its body, so that engines never fetch anything.

The client chooses where the router connects, which is what server-side request forgery is made of. So: only hosts of
the operator's list, only http and https, only the ports that belong to them or that the list names; a name is resolved
here and the connection goes to an address that was checked, not to the name again; redirects are followed by hand with
the same checks. Whoever asks learns of a failure only that it was one: a private address, a closed port and a slow
server have the same words.
"""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import re
import socket
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import orjson
import pybase64
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from serving.errors import InternalError, InvalidImageError, ServingError
from serving.router.addresses import is_public_address
from serving.router.images import check_size, read_size
from serving.router.requests import RoutedRequest
from serving.router_settings import RemoteImageSettings, RouterSettings

_PORTS = {"http": 80, "https": 443}
_PARALLEL = 4
_MAX_CONNECTIONS = 64
_READ_BYTES = 64 * 1024
_REDIRECTS = (301, 302, 303, 307, 308)
_HOST_NAME = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*")
_HEADERS = {"accept": "image/*", "accept-encoding": "identity", "user-agent": "serving-image-fetch/1"}


class _RefusedError(Exception):
    """Whatever kept an image from being fetched; the reason stays here."""


class CheckedResolver(AbstractResolver):
    """Resolves names itself and passes on checked addresses only, which are those that are then connected to. One bad
    address refuses the name: an honest one has none."""

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
        """Nothing is kept."""


class RemoteImages:
    """Fetches images for requests. One per router process."""

    def __init__(self, settings: RemoteImageSettings, check_address: Callable[[str], bool] = is_public_address) -> None:
        """
        Args:
            settings: hosts and limits.
            check_address: whether an IP address may be connected to. Only tests give another.
        """
        self._settings = settings
        self._check_address = check_address
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Must run inside the event loop that fetches."""
        connector = aiohttp.TCPConnector(
            resolver=CheckedResolver(self._check_address),
            use_dns_cache=False,  # an address is checked where it is used
            force_close=True,
            limit=_MAX_CONNECTIONS,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            headers=_HEADERS,
            timeout=aiohttp.ClientTimeout(total=self._settings.timeout_s),
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def inline(self, request: RoutedRequest, router: RouterSettings) -> RoutedRequest:
        """The request with its remote images inside its body; itself when it has none.

        Each URL is fetched once however often it stands there, all of them within `timeout_s`.

        Raises:
            InvalidImageError: code `image_fetch_failed` when one could not be had, or what came is no image.
            ImageTooLargeError: one is over the pixel limit.
        """
        if all(size is not None for size in request.image_sizes):
            return request
        payload = orjson.loads(request.body)
        places = [place for place in _places(payload) if not place.url.startswith("data:")]
        first = {place.url: place for place in reversed(places)}
        budget = _Budget(router.limits.max_body_bytes - len(request.body))
        images = await self._fetch_all(first, budget)
        sizes = list(request.image_sizes)
        for place in places:
            data = images[place.url]
            size = read_size(data, place.param)
            check_size(size, place.param, router)
            sizes[place.index] = size
        encoded = {url: f"data:image/*;base64,{pybase64.b64encode_as_string(data)}" for url, data in images.items()}
        num_chars = sum(len(encoded[place.url]) for place in places)
        if len(request.body) + num_chars > router.limits.max_body_bytes:
            raise InvalidImageError("The images are larger together than a request may be.", code="image_fetch_failed")
        for place in places:
            place.put(encoded[place.url])
        return dataclasses.replace(request, body=orjson.dumps(payload), image_sizes=tuple(sizes))

    async def _fetch_all(self, places: dict[str, _Place], budget: _Budget) -> dict[str, bytes]:
        slots = asyncio.Semaphore(_PARALLEL)

        async def fetch(place: _Place) -> bytes:
            async with slots:
                try:
                    return await self._fetch(place, budget)
                except (_RefusedError, aiohttp.ClientError, OSError, ValueError):
                    raise _failure(place.param) from None

        try:
            async with asyncio.timeout(self._settings.timeout_s), asyncio.TaskGroup() as group:
                tasks = {url: group.create_task(fetch(place)) for url, place in places.items()}
        except TimeoutError:
            raise _failure(next(iter(places.values())).param) from None
        except BaseExceptionGroup as failures:
            known = failures.subgroup(ServingError)
            if known is None:
                raise
            raise _first_leaf(known) from None
        return {url: task.result() for url, task in tasks.items()}

    async def _fetch(self, place: _Place, budget: _Budget) -> bytes:
        if self._session is None:
            raise InternalError("The router has not started.")
        url = self._checked(place.url)
        for _ in range(self._settings.max_redirects + 1):
            async with self._session.get(url, allow_redirects=False) as answer:
                if answer.status in _REDIRECTS:
                    url = self._checked(answer.headers.get("location", ""), url)
                    continue
                encoding = answer.headers.get("content-encoding", "identity")
                too_large = (answer.content_length or 0) > self._settings.max_bytes
                if answer.status != 200 or encoding.lower() != "identity" or too_large:
                    raise _RefusedError
                return await self._read(answer.content, budget)
        raise _RefusedError

    async def _read(self, content: aiohttp.StreamReader, budget: _Budget) -> bytes:
        data = bytearray()
        while part := await content.read(_READ_BYTES):
            data += part
            budget.take(len(part))
            if len(data) > self._settings.max_bytes:
                raise _RefusedError
        return bytes(data)

    def _checked(self, text: str, base: URL | None = None) -> URL:
        """A URL that may be connected to, as far as it says itself; names are checked again when they are resolved."""
        url = URL(text)
        if base is not None:
            url = base.join(url)
        host = url.raw_host
        if url.scheme not in _PORTS or not host or url.raw_user is not None or url.raw_password is not None:
            raise _RefusedError
        try:
            ipaddress.ip_address(host)
        except ValueError:
            if not _HOST_NAME.fullmatch(host):
                raise _RefusedError from None
        else:
            if not self._check_address(host):  # aiohttp resolves names only, and connects to an address as it is
                raise _RefusedError
        if not self._is_listed(host.lower(), url.port or 0, _PORTS[url.scheme]):
            raise _RefusedError
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


@dataclasses.dataclass(slots=True)
class _Budget:
    """Bytes that a request's images may have together, while they come."""

    num_left: int

    def take(self, num_bytes: int) -> None:
        self.num_left -= num_bytes
        if self.num_left < 0:
            raise _RefusedError


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """Where an image stands in a decoded body."""

    index: int
    param: str
    part: dict[str, Any]
    url: str

    def put(self, url: str) -> None:
        image = self.part["image_url"]
        self.part["image_url"] = {**image, "url": url} if isinstance(image, dict) else {"url": url}


def _places(payload: dict[str, Any]) -> Iterator[_Place]:
    """Every image of a body that `parse_request` has let through, in the order of its `image_sizes`."""
    index = 0
    for i, message in enumerate(payload.get("messages", ())):
        content = message.get("content")
        for j, part in enumerate(content if isinstance(content, list) else ()):
            if "image_url" in part:
                image = part["image_url"]
                url = image["url"] if isinstance(image, dict) else image
                yield _Place(index, f"messages[{i}].content[{j}].image_url", part, url)
                index += 1


def _failure(param: str) -> InvalidImageError:
    return InvalidImageError("The image could not be fetched from its URL.", param=param, code="image_fetch_failed")


def _first_leaf(failures: BaseExceptionGroup[ServingError]) -> ServingError:
    first = failures.exceptions[0]
    return _first_leaf(first) if isinstance(first, BaseExceptionGroup) else first
