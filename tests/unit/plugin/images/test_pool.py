"""The image workers: their pixels, and what happens to them and to pages when something goes wrong."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from serving.plugin.images.decoding import DecodeError
from serving.plugin.images.page_views import WHITE, PageViews, build_views
from serving.plugin.images.pool import ImagePool, PageLostError, PoolUnavailableError, Ticket
from serving.plugin.images.settings import ImagePipelineSettings
from serving.plugin.images.worker_messages import ViewJob
from serving.plugin.images.worker_process import WorkerLostError, WorkerProcess
from serving.plugin.interfaces import metrics
from serving.plugin.modes.resolution import ResolutionMode

GREY = (127, 127, 127)
WAIT_S = 60.0  # for a machine that is busy
GUNDAM = ResolutionMode()
TINY = ResolutionMode(512, 512, False)


def build_page(width: int = 900, height: int = 700) -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


def encode(page: Image.Image) -> bytes:
    buffer = io.BytesIO()
    page.save(buffer, "PNG")
    return buffer.getvalue()


def ticket(data: bytes | None = None, mode: ResolutionMode = TINY, size: tuple[int, int] = (900, 700)) -> Ticket:
    return Ticket(ViewJob(size, mode, GREY, WHITE, ("PNG", "JPEG")), encode(build_page()) if data is None else data)


def run(pool: ImagePool, page: Ticket) -> PageViews:
    pool.put(page)
    return page.views.result(WAIT_S)


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for counts as gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def pool() -> Iterator[ImagePool]:
    """One worker that bears whatever the tests do to it."""
    pool = ImagePool(ImagePipelineSettings(workers=1))
    yield pool
    pool.close()


@pytest.fixture
def build_pool() -> Iterator[Callable[..., ImagePool]]:
    pools: list[ImagePool] = []

    def build(**settings: float) -> ImagePool:
        pools.append(ImagePool(ImagePipelineSettings(**{"workers": 1, **settings})))  # type: ignore[arg-type]
        return pools[-1]

    yield build
    for pool in pools:
        pool.close()


@pytest.mark.parametrize("mode", [TINY, GUNDAM], ids=["tiny", "gundam"])
def test_workers_make_the_views_that_this_process_makes(pool: ImagePool, mode: ResolutionMode) -> None:
    views = run(pool, ticket(mode=mode))
    expected = build_views(build_page(), mode, GREY)
    assert views.grid == expected.grid
    assert torch.equal(views.global_view, expected.global_view)
    assert torch.equal(views.tiles, expected.tiles)


def test_views_keep_their_pixels_when_the_worker_goes_on(pool: ImagePool) -> None:
    first = run(pool, ticket())
    before = first.global_view.clone()
    run(pool, ticket(encode(Image.new("RGB", (900, 700), "red"))))
    assert torch.equal(first.global_view, before)


def test_damaged_files_are_refused_and_cost_no_worker(pool: ImagePool) -> None:
    run(pool, ticket())
    pids = pool.pids
    for data in (b"", b"junk", encode(build_page())[:500]):
        with pytest.raises(DecodeError, match="Failed to load image"):
            run(pool, ticket(data))
    assert pool.pids == pids


def test_a_header_that_lies_about_the_size_is_found_out(pool: ImagePool) -> None:
    with pytest.raises(DecodeError, match="its header said"):
        run(pool, ticket(size=(901, 700)))


def test_an_idle_worker_that_dies_is_replaced(pool: ImagePool) -> None:
    run(pool, ticket())
    before, restarts = pool.pids, metrics.WORKER_RESTARTS._value.get()
    os.kill(before[0], signal.SIGKILL)
    wait_until(lambda: bool(pool.pids) and pool.pids != before)
    run(pool, ticket())
    assert metrics.WORKER_RESTARTS._value.get() == restarts + 1


def test_the_page_of_a_worker_that_dies_is_tried_again(pool: ImagePool) -> None:
    run(pool, ticket())
    (pid,) = pool.pids
    os.kill(pid, signal.SIGSTOP)
    page = ticket()
    pool.put(page)
    wait_until(page.views.running)
    os.kill(pid, signal.SIGKILL)
    assert page.views.result(WAIT_S).grid.num_tiles == 0
    assert pool.pids != [pid]


def test_a_page_that_takes_two_workers_with_it_is_lost(pool: ImagePool, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[WorkerProcess] = []

    def die(worker: WorkerProcess, *_: object) -> None:
        tries.append(worker)
        worker.kill()
        raise WorkerLostError

    with monkeypatch.context() as patch:
        patch.setattr(WorkerProcess, "run", die)
        with pytest.raises(PageLostError):
            run(pool, ticket())
    assert len(set(tries)) == 2
    run(pool, ticket())


def test_a_worker_that_hangs_is_replaced_and_its_page_lost(build_pool: Callable[..., ImagePool]) -> None:
    pool = build_pool(work_timeout_s=20.0)
    run(pool, ticket())
    pool.settings = ImagePipelineSettings(workers=1, work_timeout_s=0.2)
    (pid,) = pool.pids
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(PageLostError):
        run(pool, ticket())
    wait_until(lambda: is_gone(pid))


@pytest.mark.parametrize("program", ["/no/such/program", "/bin/false"])
def test_without_workers_pages_are_refused_soon_and_are_not_to_blame(
    build_pool: Callable[..., ImagePool], monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    pool = build_pool(workers=2)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", program)
        pages = [ticket() for _ in range(5)]
        for page in pages:
            pool.put(page)
        for page in pages:
            with pytest.raises(PoolUnavailableError, match="no process that decodes pages can be started"):
                page.views.result(WAIT_S / 4)
        assert metrics.QUEUE_PAGES._value.get() == 0
    wait_until(lambda: pool.num_ready > 0)
    run(pool, ticket())


def test_a_page_whose_worker_dies_and_cannot_be_replaced_is_not_to_blame(
    build_pool: Callable[..., ImagePool], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = build_pool()
    run(pool, ticket())
    (pid,) = pool.pids
    os.kill(pid, signal.SIGSTOP)
    page = ticket()
    pool.put(page)
    wait_until(page.views.running)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/no/such/program")
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(PoolUnavailableError, match="no process"):
            page.views.result(WAIT_S)
    wait_until(lambda: pool.num_ready > 0)
    run(pool, ticket())


def test_one_worker_that_cannot_start_does_not_keep_the_others_from_working(
    build_pool: Callable[..., ImagePool], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = build_pool(workers=2)
    run(pool, ticket())
    wait_until(lambda: pool.num_ready == 2)
    monkeypatch.setattr(sys, "executable", "/no/such/program")
    os.kill(pool.pids[0], signal.SIGKILL)
    wait_until(lambda: len(pool.pids) == 1)
    for _ in range(3):
        run(pool, ticket())


def test_a_full_queue_makes_callers_wait_and_then_fail(build_pool: Callable[..., ImagePool]) -> None:
    pool = build_pool(queue=1, queue_timeout_s=0.3)
    run(pool, ticket())
    (pid,) = pool.pids
    os.kill(pid, signal.SIGSTOP)
    working, waiting, late = ticket(), ticket(), ticket()
    pool.put(working)
    wait_until(working.views.running)
    pool.put(waiting)
    assert metrics.QUEUE_PAGES._value.get() == 1
    assert not pool.offer(late)
    begin = time.monotonic()
    with pytest.raises(PoolUnavailableError, match="try again"):
        pool.put(late)
    assert time.monotonic() - begin < WAIT_S / 2
    os.kill(pid, signal.SIGCONT)
    working.views.result(WAIT_S)
    waiting.views.result(WAIT_S)
    assert metrics.QUEUE_PAGES._value.get() == 0


def test_pages_that_nobody_waits_for_any_more_are_passed_over(pool: ImagePool) -> None:
    run(pool, ticket())
    (pid,) = pool.pids
    os.kill(pid, signal.SIGSTOP)
    working, dropped = ticket(), ticket()
    pool.put(working)
    wait_until(working.views.running)
    pool.put(dropped)
    assert dropped.views.cancel()
    os.kill(pid, signal.SIGCONT)
    working.views.result(WAIT_S)
    run(pool, ticket())
    assert dropped.views.cancelled()


def test_closing_ends_the_workers_and_refuses_what_waits(build_pool: Callable[..., ImagePool]) -> None:
    pool = build_pool(workers=2)
    run(pool, ticket())
    wait_until(lambda: len(pool.pids) == 2)
    pids = pool.pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    pages = [ticket() for _ in range(5)]
    for page in pages:
        pool.put(page)
    pool.close()
    pool.close()
    assert all(is_gone(pid) for pid in pids)
    for page in pages:
        with pytest.raises(PoolUnavailableError, match="shutting down"):
            page.views.result(WAIT_S)
    with pytest.raises(PoolUnavailableError, match="shutting down"):
        pool.put(ticket())


PARENT = """
import sys, time
from serving.plugin.images.settings import ImagePipelineSettings
from serving.plugin.images.pool import ImagePool
pool = ImagePool(ImagePipelineSettings(workers=2))
pool.start()
while len(pool.pids) < 2:
    time.sleep(0.01)
print(*pool.pids, flush=True)
if sys.argv[1] == "stay":
    time.sleep(1000)
"""


@pytest.mark.parametrize("end", ["stay", "leave"])
def test_no_worker_and_no_shared_memory_outlives_the_parent(end: str) -> None:
    before = set(os.listdir("/dev/shm"))
    command = [sys.executable, "-W", "ignore", "-c", PARENT, end]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        if end == "stay":
            parent.kill()
    assert len(pids) == 2
    wait_until(lambda: all(is_gone(pid) for pid in pids))
    assert not [name for name in set(os.listdir("/dev/shm")) - before if "serving" in name]


def test_workers_import_neither_vllm_nor_torch() -> None:
    heavy = {"vllm", "torch", "transformers", "ray"}
    code = f"import sys, serving.plugin.images.worker; print(*({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("variable", "value"),
    [("WORKERS", "-1"), ("WORKERS", "two"), ("QUEUE", "0"), ("QUEUE_TIMEOUT_S", "0")],
)
def test_wrong_settings_are_refused_by_name(variable: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"SERVING_IMAGE_{variable} must"):
        ImagePipelineSettings.from_environ({f"SERVING_IMAGE_{variable}": value})


def test_settings_are_read_from_the_environment() -> None:
    environ = {"SERVING_IMAGE_WORKERS": "3", "SERVING_IMAGE_WORK_TIMEOUT_S": "1.5"}
    assert ImagePipelineSettings.from_environ(environ) == ImagePipelineSettings(workers=3, work_timeout_s=1.5)
    assert ImagePipelineSettings.from_environ({}) == ImagePipelineSettings()
