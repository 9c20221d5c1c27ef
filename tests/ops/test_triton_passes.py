"""The Triton kernels against plain torch, in Triton's interpreter; and that they compile for A100 and H100."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aligndistil.ops.passes import Normalised, Passes, TorchPasses, label_gradient, statistics
from megatron_aligndistil.ops.vocab_parallel import Normaliser
from tests.ops.test_distil import ADAPTIVE, VANILLA, dense, make_case
from tests.shards import assert_same

# Not imported here: the process that interprets has to hear of it first.
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton has no build for this platform")


def _interpret(folder: str) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    """A process, the only one of its group, that was told to interpret kernels before it imported Triton."""
    folder = str(tmp_path_factory.mktemp("interpreter"))
    with ProcessPoolExecutor(1, get_context("spawn"), _interpret, (folder,)) as pool:
        yield pool


def found_by(passes: Passes, base: Literal[1, 2], with_gradient: bool) -> list[Tensor | None]:
    """Everything that the passes find, offsets and coefficients being functions of what they found before."""
    statistics_3KC = passes.statistics()
    offsets_KC = -statistics_3KC[1].log() - 0.1
    num_rows = offsets_KC.size(1)
    column_C1 = torch.arange(num_rows)[:, None] % 3
    distance_C = passes.distance(offsets_KC)
    scale_C = 1 + distance_C if with_gradient else None
    teacher = passes.teacher(base, 20 * distance_C, offsets_KC, 3 * distance_C, scale_C)
    return [statistics_3KC, passes.relative(column_C1), distance_C, *teacher]


def interpreted(logits: list[Tensor], base: Literal[1, 2], with_gradient: bool) -> list[Tensor | None]:
    """What the kernels find; runs in the interpreter's process."""
    from megatron_aligndistil.ops.triton_passes import TritonPasses

    return found_by(TritonPasses(logits, logits[0].dtype), base, with_gradient)


@pytest.mark.parametrize(("num_columns", "base", "with_gradient"), [(3, 1, True), (4096, 2, True), (9001, 1, False)])
def test_kernels_find_what_torch_finds(
    interpreter: ProcessPoolExecutor, num_columns: int, base: Literal[1, 2], with_gradient: bool
) -> None:
    """Logits up to some 60, the first column far below the others, over no, one and several whole blocks."""
    generator = torch.Generator().manual_seed(num_columns)
    policy_Cv = 15 * torch.randn(4, num_columns, dtype=torch.float64, generator=generator)
    policy_Cv[:, 0] -= 60
    logits = [policy_Cv, *(policy_Cv + torch.randn(policy_Cv.shape, generator=generator) for _ in range(2))]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
        typed = [logits_Cv.to(dtype) for logits_Cv in logits]
        actual = interpreter.submit(interpreted, typed, base, with_gradient).result()
        expected = found_by(TorchPasses([logits_Cv.clone() for logits_Cv in typed]), base, with_gradient)
        for one, other in zip(actual, expected, strict=True):
            if one is None or other is None:
                assert one is other
            else:
                assert_same(one, other, tolerance)


def interpreted_loss(case: Any, form: Any, rows: int) -> list[Tensor]:
    """The whole operation on Triton's passes; runs in the interpreter's process."""
    from megatron_aligndistil.ops import distil
    from megatron_aligndistil.ops.triton_passes import TritonPasses
    from tests.ops.test_distil import fused

    distil.make_passes = TritonPasses
    return fused(case, form, rows, len(case.weights[0]), torch.float64)


@pytest.mark.parametrize("form", [ADAPTIVE, VANILLA])
def test_the_loss_on_kernels_is_the_dense_one(interpreter: ProcessPoolExecutor, form: Any) -> None:
    case = make_case(7, 50, 5)
    found = interpreter.submit(interpreted_loss, case, form, 3).result()
    for actual, true in zip(found, dense(case, form), strict=True):
        assert_same(actual, true, 1e-9)


def interpreted_label_gradient(logits: list[Tensor], numbers: list[Tensor], columns_C: Tensor) -> list[Tensor]:
    """With another model and without, and the statistics of one and of two models; in the interpreter's process."""
    from megatron_aligndistil.ops import triton_passes

    return label_gradients(triton_passes.label_gradient, triton_passes.statistics, logits, numbers, columns_C)


def label_gradients(
    label_gradient: Any, statistics: Any, logits: list[Tensor], numbers: list[Tensor], columns_C: Tensor
) -> list[Tensor]:
    own, other = (
        Normalised(logits_Cv.clone(), Normaliser(*parts))
        for logits_Cv, parts in zip(logits, batched(numbers), strict=True)
    )
    grad_C, kl_grad_C = numbers[0], numbers[1]
    alone_Cv = label_gradient(replace(own, logits_Cv=logits[0].clone()), columns_C, grad_C, None, None)
    found = [label_gradient(own, columns_C, grad_C, other, kl_grad_C), alone_Cv]
    return found + [statistics([logits_Cv.clone() for logits_Cv in logits[:count]]) for count in (1, 2)]


def batched(numbers: list[Tensor]) -> list[list[Tensor]]:
    return [numbers[:2], numbers[2:]]


def test_label_gradients_and_statistics(interpreter: ProcessPoolExecutor) -> None:
    """Targets in this shard, at its ends and on other ranks on either side; numbers as they come."""
    generator = torch.Generator().manual_seed(0)
    logits = [5 * torch.randn(6, 5000, dtype=torch.float64, generator=generator) for _ in range(2)]
    numbers = [10 + torch.randn(6, dtype=torch.float64, generator=generator) for _ in range(4)]
    columns_C = torch.tensor([0, 4999, 17, -1, 5000, 4096])
    actual = interpreter.submit(interpreted_label_gradient, logits, numbers, columns_C).result()
    for one, other in zip(actual, label_gradients(label_gradient, statistics, logits, numbers, columns_C), strict=True):
        assert_same(one, other, 1e-12)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus(capability: int) -> None:
    """To machine code, with every logit read in 16-byte loads where rows are aligned; needs no GPU."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_aligndistil.ops import triton_passes

    flags = {"BLOCK": 4096, "BASE": 1, "GRADIENT": True, "K": 3, "OTHER": True}
    sizes = ("num_columns", "stride", "num_rows")
    for kernel, num_reads in (
        (triton_passes._statistics, 3),
        (triton_passes._distance, 2),
        (triton_passes._teacher, 3),
        (triton_passes._label_gradient, 2),
    ):
        names = kernel.arg_names
        types = {name: "constexpr" if name in flags else "i32" if name in sizes else "*fp32" for name in names}
        types |= {name: kind for name, kind in (("gradient", "*bf16"), ("targets", "*i64")) if name in names}
        aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name not in flags}
        constants = {name: value for name, value in flags.items() if name in names}
        source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
        compiled = triton_compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
        assert len(compiled.asm["cubin"]) > 0
        # 4,096 logits in blocks of 256 threads of 4 numbers each
        assert compiled.asm["ptx"].count("ld.global.v4") == num_reads * 4096 // (256 * 4)
