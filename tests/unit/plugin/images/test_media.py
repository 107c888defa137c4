"""Pages that are decoded late: to vLLM they are the images that its own connector makes."""

from __future__ import annotations

import asyncio
import base64
import copy
import inspect
import io
import pickle
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.image_files import FILES, GREY, SHOWN_OTHERWISE, encode, scene
from vllm.exceptions import RetryableRequestError
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.image import ALLOWED_IMAGE_FORMATS
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.renderers.base import BaseRenderer
from vllm.renderers.hf import HfRenderer
from vllm.renderers.registry import RENDERER_REGISTRY

from serving.plugin.images import media, pipeline
from serving.plugin.images.decoding import DecodeError, read_header
from serving.plugin.images.encoded_page import EncodedPage
from serving.plugin.images.page_views import WHITE, PageViews, build_views
from serving.plugin.images.pool import ImagePool, PoolUnavailableError, Ticket
from serving.plugin.images.settings import ImagePipelineSettings
from serving.plugin.interfaces import vllm_internals
from serving.plugin.model import renderer
from serving.plugin.modes.selection import MODES, ChosenMode

LAZY = [name for name, build in FILES.items() if read_header(build(), ALLOWED_IMAGE_FORMATS).is_lazy]
TINY, SMALL = (ChosenMode(name, MODES[name]) for name in ("tiny", "small"))


class StubPool(ImagePool):
    """Stands for the workers: makes views at once in this thread, or has no room."""

    def __init__(self, room: int = 100) -> None:
        super().__init__(ImagePipelineSettings())
        self.room = room
        self.seen: list[Ticket] = []

    def offer(self, ticket: Ticket) -> bool:
        if len(self.seen) >= self.room:
            return False
        self.seen.append(ticket)
        job = ticket.job
        views: Future[PageViews] = ticket.views
        try:
            page = EncodedPage(ticket.data, read_header(ticket.data, job.formats), job.formats, job.background)
            views.set_result(build_views(page.decoded(), job.mode, job.padding))
        except DecodeError as error:
            views.set_exception(error)
        return True

    def put(self, ticket: Ticket) -> None:
        if not self.offer(ticket):
            raise PoolUnavailableError("too many pages")

    def close(self) -> None: ...


def build_pipeline(pool: StubPool | None = None) -> pipeline.ImagePipeline:
    return pipeline.ImagePipeline(ImagePipelineSettings(), pool)


@pytest.fixture(params=[False, True], ids=["threads", "workers"])
def has_workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    made = build_pipeline(StubPool() if request.param else None)
    monkeypatch.setattr(media, "image_pipeline", lambda: made)
    yield request.param
    made.close()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def load(data: bytes, **options: Any) -> MediaWithBytes[Any]:
    return media.EncodedMediaConnector(**options).fetch_image(data_url(data))


def build_encoded(data: bytes) -> EncodedPage:
    return EncodedPage(data, read_header(data, ALLOWED_IMAGE_FORMATS), ALLOWED_IMAGE_FORMATS, WHITE)


@pytest.mark.parametrize("name", FILES)
def test_images_are_those_of_vllms_connector(name: str, has_workers: bool) -> None:
    data = FILES[name]()
    ours, vllms = load(data), MediaConnector().fetch_image(data_url(data))
    assert isinstance(ours.media, Image.Image)
    assert ours.media.size == vllms.media.size
    assert (ours.mode, ours.original_bytes, ours.io_config) == (vllms.mode, vllms.original_bytes, vllms.io_config)
    hashes = [MultiModalHasher.hash_kwargs("sha256", image=item) for item in (ours, vllms)]
    assert hashes[0] == hashes[1]
    assert np.array_equal(np.asarray(ours.media), np.asarray(vllms.media)) == (name not in SHOWN_OTHERWISE)


async def test_the_asynchronous_way_gives_the_same(has_workers: bool) -> None:
    data = FILES["jpeg turned 6"]()
    page = (await media.EncodedMediaConnector().fetch_image_async(data_url(data))).media
    assert isinstance(page, EncodedPage)
    assert page.size == (203, 301)


@pytest.mark.parametrize("name", LAZY)
def test_with_workers_nothing_is_decoded_before_it_is_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "image_pipeline", lambda: types.SimpleNamespace(has_workers=True))
    page = load(FILES[name]()).media
    assert isinstance(page, EncodedPage)
    page.getexif()
    assert not page.is_decoded


def test_files_are_loaded_as_well(tmp_path: Path, has_workers: bool) -> None:
    (tmp_path / "page.jpg").write_bytes(FILES["jpeg"]())
    connector = media.EncodedMediaConnector(allowed_local_media_path=str(tmp_path))
    assert connector.fetch_image(f"file://{tmp_path}/page.jpg").media.size == (301, 203)


@pytest.mark.parametrize("data", [b"", b"junk" * 99, FILES["jpeg"]()[:30]], ids=["nothing", "junk", "head"])
def test_what_is_no_image_is_the_callers_fault(data: bytes, has_workers: bool) -> None:
    with pytest.raises(ValueError, match="Failed to load image"):
        load(data)


def test_truncated_files_are_refused_at_the_latest_when_pixels_are_asked_for(has_workers: bool) -> None:
    with pytest.raises(ValueError, match="Failed to load image"):
        np.asarray(load(FILES["jpeg"]()[:3000]).media)


def test_vllms_limit_of_pixels_is_kept(has_workers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MAX_IMAGE_PIXELS", "1000")
    with pytest.raises(ValueError, match="exceed the maximum of 1000 pixels"):
        load(FILES["jpeg"]())


def test_another_background_and_another_pixel_format_can_be_asked_for(has_workers: bool) -> None:
    data = encode(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "PNG")
    coloured = load(data, media_io_kwargs={"image": {"rgba_background_color": [1, 2, 3]}})
    assert coloured.media.getpixel((0, 0)) == (1, 2, 3)
    untouched = load(data, media_io_kwargs={"image": {"image_mode": None}})
    assert untouched.media.mode == "RGBA"
    assert not isinstance(untouched.media, EncodedPage)


def test_an_encoded_page_is_a_pillow_image() -> None:
    page, expected = build_encoded(FILES["jpeg"]()), Image.open(io.BytesIO(FILES["jpeg"]()))
    uses: list[Callable[[Image.Image], Any]] = [
        np.asarray,
        lambda image: image.resize((9, 9)).tobytes(),
        lambda image: image.crop((1, 1, 5, 5)).tobytes(),
        lambda image: image.convert("L").tobytes(),
        lambda image: image.getpixel((3, 4)),
        lambda image: copy.copy(image).tobytes(),
        lambda image: pickle.loads(pickle.dumps(image.copy())).tobytes(),
        lambda image: image.im.size,
    ]
    for use in uses:
        assert np.array_equal(use(build_encoded(page.data)), use(expected.copy()))


def test_vllm_knows_the_connector_by_its_name() -> None:
    assert isinstance(MEDIA_CONNECTOR_REGISTRY.load(media.NAME), media.EncodedMediaConnector)


@pytest.mark.parametrize("room", [None, 100])
def test_views_are_made_with_and_without_workers(room: int | None) -> None:
    made = build_pipeline(None if room is None else StubPool(room))
    pages = [build_encoded(FILES["jpeg"]()), scene(70, 50)]
    views = made.views(pages, [TINY, SMALL], GREY)
    for page, choice, view in zip(pages, (TINY, SMALL), views, strict=True):
        assert torch.equal(view.global_view, build_views(page, choice.mode, GREY).global_view)
    made.close()


async def test_prepared_views_are_made_once_and_for_the_mode_that_is_used() -> None:
    pool = StubPool()
    made = build_pipeline(pool)
    page = build_encoded(FILES["jpeg"]())
    await made.prepare([page], [TINY], GREY)
    assert made.views([page], [TINY], GREY)[0].global_view.shape == (3, 512, 512)
    assert len(pool.seen) == 1
    await made.prepare([page], [TINY], GREY)
    assert made.views([page], [SMALL], GREY)[0].global_view.shape == (3, 640, 640)
    assert len(pool.seen) == 3
    made.close()


async def test_a_damaged_page_fails_while_it_is_prepared() -> None:
    made = build_pipeline(StubPool())
    with pytest.raises(ValueError, match="Failed to load image"):
        await made.prepare([build_encoded(FILES["jpeg"]()[:3000])], [TINY], GREY)
    made.close()


async def test_without_room_requests_are_to_be_tried_again() -> None:
    made = build_pipeline(StubPool(room=0))
    page = build_encoded(FILES["jpeg"]())
    with pytest.raises(RetryableRequestError, match="too many pages"):
        await made.prepare([page], [TINY], GREY)
    page.order = None
    with pytest.raises(RetryableRequestError, match="too many pages"):
        await asyncio.to_thread(made.views, [page], [TINY], GREY)
    made.close()


def test_only_requests_of_nothing_but_encoded_pages_are_prepared() -> None:
    page = build_encoded(FILES["jpeg"]())
    wrapped = MediaWithBytes(page, page.data)
    assert renderer.encoded_pages({"image": [wrapped, wrapped]}) == [page, page]
    assert renderer.encoded_pages({"image": wrapped}) == [page]
    for data in (None, {}, {"image": None}, {"image": [wrapped, scene(2, 2)]}, {"image": [wrapped, None]}):
        assert renderer.encoded_pages(data) == []


async def test_the_renderer_prepares_pages_on_the_way_to_vllms_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    async def prepare(pages: list[EncodedPage], options: dict[str, object]) -> None:
        asked.append((pages, options))

    async def process(self: Any, prompt: Any, **options: Any) -> str:
        asked.append(options)
        return "done"

    monkeypatch.setattr(HfRenderer, "_process_tokens_async", process)
    one = object.__new__(renderer.PageRenderer)
    one.__dict__.update(has_pages=True, _mm_processor_cache=None, mm_processor=types.SimpleNamespace(prepare=prepare))
    page = build_encoded(FILES["jpeg"]())
    prompt = {"multi_modal_data": {"image": [page]}, "mm_processor_kwargs": {"mode": "tiny"}}
    assert await one._process_tokens_async(prompt, skip_mm_cache=True) == "done"
    assert asked == [([page], {"mode": "tiny"}), {"skip_mm_cache": True}]
    one.__dict__["_mm_processor_cache"] = object()
    await one._process_tokens_async(prompt)
    assert len(asked) == 3


def test_what_is_used_of_vllms_renderer_is_still_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RENDERER_REGISTRY, "renderers", dict(RENDERER_REGISTRY.renderers))
    assert RENDERER_REGISTRY.load_renderer_cls("hf") in (HfRenderer, renderer.PageRenderer)
    vllm_internals.replace_renderer(renderer.__name__, renderer.PageRenderer.__name__)
    assert RENDERER_REGISTRY.load_renderer_cls("hf") is renderer.PageRenderer
    assert list(inspect.signature(BaseRenderer._process_tokens_async).parameters) == ["self", "prompt", "skip_mm_cache"]
    assert {"shutdown", "mm_processor_cache"} <= set(dir(BaseRenderer))
