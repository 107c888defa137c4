from __future__ import annotations

import asyncio
import contextlib
import gzip
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson
import pytest
from aiohttp import web
from support.request_pictures import encode_image, image_part, png_header, to_url
from yarl import URL

from serving.errors import ImageTooLargeError, InvalidImageError, RequestError
from serving.http.addresses import is_public_address
from serving.http.fetching import Fetcher, FetchRefusedError
from serving.router.request.image_headers import check_image_url
from serving.router.request.parsing import RoutedRequest, parse_request
from serving.router.request.remote_images import RemoteImages
from serving.settings.router import LimitSettings, RemoteImageSettings, RouterSettings
from serving.settings.stack import ModelSettings, Settings

PNG = encode_image("PNG")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextlib.asynccontextmanager
async def serve(handler: Handler) -> AsyncIterator[int]:
    """Our own server on loopback, the only place that these tests connect to."""
    app = web.Application()
    app.router.add_get("/{path:.*}", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def is_loopback(address: str) -> bool:
    return address == "127.0.0.1"


@contextlib.asynccontextmanager
async def fetching(
    *hosts: str, check_address: Callable[[str], bool] = is_loopback, **options: Any
) -> AsyncIterator[Callable[..., Awaitable[RoutedRequest]]]:
    """Inlines a chat with images of these URLs."""
    limits = options.pop("limits", LimitSettings())
    remote = RemoteImageSettings(enabled=True, hosts=hosts, **{"timeout_s": 2.0, **options})
    router = RouterSettings(remote_images=remote, limits=limits)
    settings = Settings(models={"nano": ModelSettings(checkpoint="nano")}, router=router)
    images = RemoteImages(remote, check_address)
    await images.start()

    async def inline(*urls: str) -> RoutedRequest:
        content = [{"type": "text", "text": "Look:"}, *map(image_part, urls)]
        body = orjson.dumps({"model": "nano", "messages": [{"role": "user", "content": content}], "seed": 3})
        return await images.inline(parse_request("/v1/chat/completions", body, settings), router)

    try:
        yield inline
    finally:
        await images.close()


def urls_of(request: RoutedRequest) -> list[str]:
    parts = orjson.loads(request.body)["messages"][0]["content"]
    return [part["image_url"]["url"] for part in parts[1:]]


async def answer_png(request: web.Request) -> web.Response:
    return web.Response(body=PNG, content_type="text/html")


async def assert_refused(fetch: Awaitable[Any]) -> str:
    with pytest.raises(InvalidImageError) as caught:
        await fetch
    assert (caught.value.code, caught.value.http_status) == ("image_fetch_failed", 400)
    assert caught.value.param == "messages[0].content[1].image_url"
    return caught.value.message


async def test_remote_images_are_put_into_the_body() -> None:
    asked: list[web.Request] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request)
        return web.Response(body=PNG, headers={"set-cookie": "a=b"})

    async with serve(answer) as port, fetching(f"127.0.0.1:{port}") as inline:
        first, second = f"http://127.0.0.1:{port}/a.png?x=%20y#z", f"http://127.0.0.1:{port}/b.png"
        request = await inline(first, to_url(png_header(7, 9)), second, first)
        assert request.image_sizes == ((30, 20), (7, 9), (30, 20), (30, 20))
        for number, url in enumerate(urls_of(request)):
            assert check_image_url(url, "url", RouterSettings()) == request.image_sizes[number]
        assert orjson.loads(request.body)["seed"] == 3
    assert sorted(one.raw_path for one in asked) == ["/a.png?x=%20y", "/b.png"]
    assert not any("cookie" in one.headers or "authorization" in one.headers for one in asked)


async def test_a_request_without_remote_images_is_left_alone() -> None:
    async with fetching("*") as inline:
        url = to_url(PNG)
        assert urls_of(await inline(url)) == [url]


async def test_redirects_are_followed_with_the_same_checks() -> None:
    async def answer(request: web.Request) -> web.Response:
        left = int(request.path[1:])
        return web.Response(status=302, headers={"location": f"/{left - 1}"}) if left else web.Response(body=PNG)

    async with serve(answer) as port, fetching(f"127.0.0.1:{port}", max_redirects=2) as inline:
        assert (await inline(f"http://127.0.0.1:{port}/2")).image_sizes == ((30, 20),)
        await assert_refused(inline(f"http://127.0.0.1:{port}/3"))


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.2:{port}/",
        "http://[::1]:{port}/",
        "http://localhost:1/",
        "http://169.254.169.254/latest/meta-data/",
        "file:///etc/passwd",
        "//127.0.0.2:{port}/",
        "http://user@127.0.0.1:{port}/x",
        "http://127.0.0.1:1/",
        "",
        "http://",
    ],
)
async def test_a_redirect_leads_to_no_place_that_was_not_allowed(location: str) -> None:
    num_asked = 0

    async def answer(request: web.Request) -> web.Response:
        nonlocal num_asked
        num_asked += 1
        return web.Response(status=302, headers={"location": location.format(port=port)})

    async with serve(answer) as port, fetching(f"127.0.0.1:{port}", "localhost", "*") as inline:
        await assert_refused(inline(f"http://127.0.0.1:{port}/"))
    assert num_asked == (4 if location in ("", "http://") else 1)  # those lead to where they came from


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/",
        "http://[::ffff:127.0.0.1]:{port}/",
        "http://localhost:{port}/",
        "http://2130706433:{port}/",
        "http://0x7f.1:{port}/",
        "http://0177.0.0.1:{port}/",
        "http://127.1:{port}/",
        "http://0.0.0.0:{port}/",
        "http://localhost.:{port}/",
        "http://127.0.0.1:{port}\\@example.com/",
        "http://\u2460\u2461\u2466.0.0.1:{port}/",
        "http://a@127.0.0.1:{port}/",
        "http://a:b@127.0.0.1:{port}/",
        "http://127.0.0.1%00.example.com:{port}/",
        "http://[fe80::1%25lo]:{port}/",
        "http://:{port}/",
        "http://127.0.0.1:99999/",
        "http://127.0.0.1:-1/",
        "http://[::1/",
    ],
)
async def test_no_spelling_of_a_private_address_is_connected_to(url: str) -> None:
    async def answer(request: web.Request) -> web.Response:
        raise AssertionError("was asked")

    async with serve(answer) as port:
        hosts = ("*", f"*:{port}")
        async with fetching(*hosts, check_address=is_public_address) as inline:
            with pytest.raises(InvalidImageError) as caught:
                await inline(url.format(port=port))
            assert caught.value.code == "image_fetch_failed"


async def test_a_name_with_one_bad_address_among_good_ones_is_not_connected_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def resolve(self: Any, host: str, port: int, **options: Any) -> list[Any]:
        return [(2, 1, 6, "", (address, port)) for address in ("127.0.0.1", "127.0.0.3")]

    monkeypatch.setattr(asyncio.get_running_loop().__class__, "getaddrinfo", resolve)
    async with serve(answer_png) as port, fetching(f"pages.example.com:{port}") as inline:
        await assert_refused(inline(f"http://pages.example.com:{port}/"))


async def test_the_address_that_was_checked_is_the_one_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that answers differently the second time gets no second time."""
    answers = [["127.0.0.1"], ["127.0.0.3"]]

    async def resolve(self: Any, host: str, port: int, **options: Any) -> list[Any]:
        return [(2, 1, 6, "", (address, port)) for address in answers.pop(0)]

    monkeypatch.setattr(asyncio.get_running_loop().__class__, "getaddrinfo", resolve)
    async with serve(answer_png) as port, fetching(f"pages.example.com:{port}") as inline:
        assert (await inline(f"http://pages.example.com:{port}/")).image_sizes == ((30, 20),)
        assert len(answers) == 1


async def test_what_cannot_be_had_and_what_may_not_be_asked_have_the_same_words() -> None:
    async with fetching("*", "*:1", check_address=is_public_address) as inline:
        refused = await assert_refused(inline("http://10.0.0.1/"))
        assert await assert_refused(inline("http://127.0.0.1:1/")) == refused
    async with fetching("127.0.0.1:1") as inline:
        assert await assert_refused(inline("http://127.0.0.1:1/")) == refused
    assert "127" not in refused


async def answer_error(request: web.Request) -> web.Response:
    return web.Response(status=404, body=PNG)


async def answer_compressed(request: web.Request) -> web.Response:
    return web.Response(body=gzip.compress(PNG), headers={"content-encoding": "gzip"})


async def answer_too_much(request: web.Request) -> web.Response:
    return web.Response(body=PNG + bytes(3000))


async def answer_too_much_in_pieces(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        while True:
            await response.write(bytes(1000))
    return response


async def answer_slowly(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for byte in PNG:
        await response.write(bytes([byte]))
        await asyncio.sleep(0.05)
    return response


async def answer_less_than_announced(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-length": "1000"})
    await response.prepare(request)
    await response.write(PNG)
    assert request.transport
    request.transport.close()
    return response


@pytest.mark.parametrize(
    "handler",
    [
        answer_error,
        answer_compressed,
        answer_too_much,
        answer_too_much_in_pieces,
        answer_slowly,
        answer_less_than_announced,
    ],
)
async def test_answers_are_bounded_in_size_and_time(handler: Handler) -> None:
    async with serve(handler) as port, fetching(f"127.0.0.1:{port}", max_bytes=2048, timeout_s=0.3) as inline:
        async with asyncio.timeout(2):
            await assert_refused(inline(f"http://127.0.0.1:{port}/"))


async def test_the_images_of_a_request_are_bounded_together() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=PNG + bytes(800))

    limits = LimitSettings(max_body_bytes=2000)
    async with serve(answer) as port, fetching(f"127.0.0.1:{port}", limits=limits) as inline:
        url = f"http://127.0.0.1:{port}/"
        assert (await inline(url)).image_sizes == ((30, 20),)
        for urls in ((url + "a", url + "b"), (url, url)):
            with pytest.raises(InvalidImageError) as caught:
                await inline(*urls)
            assert caught.value.code == "image_fetch_failed"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "invalid_image"),
        (b"hello", "invalid_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "invalid_image"),
        (png_header(60_000, 60_000), "image_too_large"),
    ],
)
async def test_what_comes_has_to_be_an_image(data: bytes, code: str) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=data, content_type="image/png")

    async with serve(answer) as port, fetching(f"127.0.0.1:{port}") as inline:
        with pytest.raises(RequestError) as caught:
            await inline(f"http://127.0.0.1:{port}/")
        assert caught.value.code == code
        assert isinstance(caught.value, ImageTooLargeError | InvalidImageError)


@pytest.mark.parametrize(
    ("hosts", "url", "is_allowed"),
    [
        (("example.com",), "https://example.com/a", True),
        (("example.com",), "https://EXAMPLE.com:443/a", True),
        (("Example.com",), "http://example.com/a", True),
        (("example.com",), "https://example.com:8443/a", False),
        (("example.com",), "http://example.com:443/a", False),
        (("example.com:8443",), "https://example.com:8443/a", True),
        (("example.com:8443",), "https://example.com/a", False),
        (("example.com",), "https://www.example.com/a", False),
        (("example.com",), "https://example.com.evil.org/a", False),
        (("example.com",), "https://notexample.com/a", False),
        (("*.example.com",), "https://a.b.example.com/a", True),
        (("*.example.com",), "https://example.com/a", False),
        (("*.example.com",), "https://evilexample.com/a", False),
        (("*",), "https://anything.org/a", True),
        (("*",), "https://8.8.8.8/a", True),
        (("*",), "https://10.0.0.1/a", False),
        (("[2606:4700::1]",), "https://[2606:4700::1]/a", True),
        (("2606:4700::1",), "https://[2606:4700::1]/a", True),
        (("*",), "ftp://example.com/a", False),
        (("*",), "https://user@example.com/a", False),
        (("*",), "https://user:word@example.com/a", False),
        (("*",), "https:///a", False),
    ],
)
def test_hosts_are_those_of_the_list(hosts: tuple[str, ...], url: str, is_allowed: bool) -> None:
    fetcher = Fetcher(RemoteImageSettings(enabled=True, hosts=hosts), "image/*", "test/1", is_public_address)
    if is_allowed:
        assert fetcher.check_url(url) == URL(url)
        return
    with pytest.raises((FetchRefusedError, ValueError)):
        fetcher.check_url(url)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "2a00:1450:4001:830::200e"]
)
def test_public_addresses(address: str) -> None:
    assert is_public_address(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.255.255.255",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.0.1",
        "100.64.0.1",
        "100.100.100.200",
        "169.254.169.254",
        "168.63.129.16",
        "192.0.0.192",
        "192.0.2.1",
        "192.88.99.1",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::7f00:1",
        "::ffff:127.0.0.1",
        "::ffff:8.8.8.8",
        "64:ff9b::7f00:1",
        "64:ff9b::808:808",
        "64:ff9b:1::1",
        "100::1",
        "2001::1",
        "2001:db8::1",
        "2002:7f00:1::",
        "2002:808:808::",
        "3fff::1",
        "5f00::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "ff02::1",
        "ff0e::1",
        "",
        "example.com",
        "127.1",
        "0177.0.0.1",
    ],
)
def test_addresses_that_are_not_for_everybody(address: str) -> None:
    assert not is_public_address(address)
