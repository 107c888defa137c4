"""Fetches images that a request names by URL and puts them into its body, so that engines never fetch anything.

`serving.http.fetching` decides what may be fetched. The client learns only that a fetch failed, not why.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pybase64

from serving.errors import InvalidImageError, ServingError
from serving.http.addresses import is_public_address
from serving.http.fetching import FETCH_ERRORS, Fetcher, FetchRefusedError
from serving.router.request.image_headers import check_size, read_size
from serving.router.request.parsing import RoutedRequest
from serving.settings.router import RemoteImageSettings, RouterSettings

_PARALLEL = 4
_AGENT = "serving-image-fetch/1"


class RemoteImages:
    """Fetches images for requests. One per router process."""

    def __init__(self, settings: RemoteImageSettings, check_address: Callable[[str], bool] = is_public_address) -> None:
        """Fetch nothing yet.

        Args:
            settings: hosts and limits.
            check_address: whether an IP address may be connected to. Only tests pass a different one.
        """
        self._settings = settings
        self._fetcher = Fetcher(settings, "image/*", _AGENT, check_address)

    async def start(self) -> None:
        """Must run inside the event loop that fetches."""
        await self._fetcher.start()

    async def close(self) -> None:
        await self._fetcher.close()

    async def inline(self, request: RoutedRequest, router: RouterSettings) -> RoutedRequest:
        """The request with its remote images in its body; the same request if it has none.

        Each URL is fetched once, however often it occurs, all of them within `timeout_s`.

        Raises:
            InvalidImageError: an image could not be fetched (code `image_fetch_failed`), or is not an image.
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
            raise InvalidImageError("The images together are larger than a request may be.", code="image_fetch_failed")
        for place in places:
            place.put(encoded[place.url])
        return dataclasses.replace(request, body=orjson.dumps(payload), image_sizes=tuple(sizes))

    async def _fetch_all(self, places: dict[str, _Place], budget: _Budget) -> dict[str, bytes]:
        slots = asyncio.Semaphore(_PARALLEL)

        async def fetch(place: _Place) -> bytes:
            async with slots:
                try:
                    return await self._fetch(place, budget)
                except FETCH_ERRORS:
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
        data = bytearray()
        async with contextlib.aclosing(self._fetcher.fetch(place.url)) as parts:
            async for part in parts:
                budget.take(len(part))
                data += part
        return bytes(data)


@dataclasses.dataclass(slots=True)
class _Budget:
    """The bytes that a request's images may still have together while they are fetched."""

    num_left: int

    def take(self, num_bytes: int) -> None:
        self.num_left -= num_bytes
        if self.num_left < 0:
            raise FetchRefusedError


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """The place of an image in a decoded body."""

    index: int
    param: str
    part: dict[str, Any]
    url: str

    def put(self, url: str) -> None:
        image = self.part["image_url"]
        self.part["image_url"] = {**image, "url": url} if isinstance(image, dict) else {"url": url}


def _places(payload: dict[str, Any]) -> Iterator[_Place]:
    """Every image of a body that `parse_request` has accepted, in the order of `image_sizes`."""
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
