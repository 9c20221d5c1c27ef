"""One measurement of the benchmark, in processes of its own: `python -m benchmarks.measure '{"variant": ..., ...}'`.

Prints one JSON object: seconds of each repetition, peak memory beyond inputs and gradients, collectives and memory
traffic of one repetition, and the loss with the norms of its gradients, which have to agree between variants.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.traffic import Traffic
from benchmarks.variants import VARIANTS, Inputs
from megatron_aligndistil.ops.head import LMHead, VocabShard

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Measure what the first argument describes, on as many processes as torchrun's environment says."""
    case: dict[str, Any] = json.loads(sys.argv[1])
    tp = int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(case["threads"])
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if case["cuda"] else torch.device("cpu")
    if case["cuda"]:
        torch.cuda.set_device(device)
    if tp > 1:
        dist.init_process_group("nccl" if case["cuda"] else "gloo")
    inputs = make_inputs(case, tp, device)
    run = VARIANTS[case["variant"]]
    counted = _count_collectives()
    trained = inputs.policy.hidden_TH, inputs.policy.weight_vH

    def once() -> float:
        for tensor in trained:
            tensor.grad = None
        loss = run(inputs)
        loss.backward()
        _synchronise(device)
        return loss.item()

    memory = _Memory(device)
    result: dict[str, Any] = {"loss": once()}  # warms up too
    gradients = [tensor.grad for tensor in trained if tensor.grad is not None]
    result["peak_bytes"] = memory.peak_bytes() - sum(grad.numel() * grad.element_size() for grad in gradients)
    result["gradient_norms"] = [float(grad.double().norm()) for grad in gradients]
    result["collectives"] = dict(counted)
    result["seconds"] = []
    for _ in range(case["repetitions"]):
        _synchronise(device)
        began = time.perf_counter()
        once()
        result["seconds"].append(time.perf_counter() - began)
    with Traffic() as traffic:
        once()
    result["traffic_bytes"] = traffic.num_bytes
    if case["cuda"]:
        result["bandwidth"] = _bandwidth(device)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(result))
    if tp > 1:
        dist.destroy_process_group()


def make_inputs(case: dict[str, Any], tp: int, device: torch.device) -> Inputs:
    """Logits of a realistic spread, the dpo and reverse models near the policy on either side."""
    T, V, H = case["T"], case["V"], case["H"]
    rank = int(os.environ.get("RANK", "0"))
    size = -(-V // tp)
    start = rank * size
    shard = VocabShard(start, min(size, V - start), V, dist.group.WORLD if tp > 1 else None)
    dtype = _DTYPES[case["dtype"]]
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, device=device)

    hidden_TH = draw(T, H)
    shard_generator = torch.Generator(device).manual_seed(1 + rank)
    weight_vH = 3 * H**-0.5 * torch.randn(shard.size, H, generator=shard_generator, device=device)

    def head(noise: float, grad: bool) -> LMHead:
        hidden = (hidden_TH + noise * draw(T, H)).to(dtype)
        return LMHead(hidden.requires_grad_(grad), weight_vH.to(dtype, copy=True).requires_grad_(grad), shard)

    targets_T = torch.randint(0, V, (T,), generator=generator, device=device)
    weights_T = torch.full((T,), 1 / T, device=device)
    return Inputs(head(0.05, True), head(0.2, False), head(0.2, False), targets_T, weights_T)


class _Memory:
    """Peak of allocated memory from now on: the allocator's on a GPU, of the process on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
            self._before = _status("VmRSS")

    def peak_bytes(self) -> int:
        peak = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _status("VmHWM")
        return peak - self._before


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def _count_collectives() -> dict[str, int]:
    """Calls and bytes sent by this process, counted from now on."""
    counted = {"calls": 0, "bytes": 0}

    def counting(function: Any, argument: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counted["calls"] += 1
            counted["bytes"] += args[argument].numel() * args[argument].element_size()
            return function(*args, **kwargs)

        return call

    dist.all_reduce = counting(dist.all_reduce, 0)
    dist.all_gather_into_tensor = counting(dist.all_gather_into_tensor, 1)
    return counted


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    _synchronise(device)
    began = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    _synchronise(device)
    return 10 * 2 * source.numel() / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
