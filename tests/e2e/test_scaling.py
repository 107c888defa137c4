"""Replicas come and go with the work, and change under load, on a real Ray cluster with scripted engines."""

from __future__ import annotations

import asyncio
from pathlib import Path

from e2e.scripted_stack import Clients, run_scripted_stack, wait_for_replicas

# A request is about 100 units of work here, and a replica has room for 1,000: ten at once.
SCRIPT = {"tokens_per_s": 100, "output_tokens": 100, "kv_tokens": 1000, "max_num_seqs": 16}


async def test_replicas_come_with_the_work_and_go_with_it_and_no_request_fails(tmp_path: Path) -> None:
    scaling = {"min_replicas": 1, "max_replicas": 3, "target_load": 0.7, "upscale_delay_s": 1, "downscale_delay_s": 2}
    model = {"num_replicas": 3, "autoscaling": scaling}
    with run_scripted_stack(tmp_path, SCRIPT, model=model) as stack:
        assert await wait_for_replicas(stack, 1, timeout_s=5) < 5
        await asyncio.sleep(3)
        assert await wait_for_replicas(stack, 1, timeout_s=1) < 1, "without work it stays at the least"
        few, many = Clients(stack.url, 2, 100), Clients(stack.url, 30, 100)
        async with few.at_work():
            async with many.at_work():
                up_s = await wait_for_replicas(stack, 3, timeout_s=40)
            down_s = await wait_for_replicas(stack, 1, timeout_s=40)
            num_done = few.num_done
            await asyncio.sleep(2)
            assert few.num_done > num_done, "what is left still serves"
    print(f"up after {up_s:.1f} s, down after {down_s:.1f} s; {few.num_done + many.num_done} requests")
    assert not few.failures + many.failures
