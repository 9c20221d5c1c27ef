"""Bytes that operations read and write: how much a computation asks of the memory, whatever caches make of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """Counts the sizes of all tensors that operations take and give back, and of those that Triton's passes touch.

    Views move nothing. A tensor that is broadcast counts with the memory that it takes up.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0
        self._kernels = ExitStack()

    def __enter__(self) -> Traffic:
        super().__enter__()
        if torch.cuda.is_available() and find_spec("triton"):
            self._count_kernels()
        return self

    def __exit__(self, *error: Any) -> None:
        self._kernels.close()
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        is_view = any(
            argument.alias_info and not argument.alias_info.is_write for argument in function._schema.arguments
        )
        if not is_view and not str(function).startswith("aten.empty"):
            self.num_bytes += sum(map(_size, _tensors((args, kwargs, result))))
        return result

    def _count_kernels(self) -> None:
        from megatron_aligndistil.ops.triton_passes import TritonPasses

        def counting(name: str, reads: int) -> None:
            original = getattr(TritonPasses, name)

            def call(passes: TritonPasses, *args: Any) -> Any:
                result = original(passes, *args)
                self.num_bytes += reads * _size(passes._logits[0]) + sum(map(_size, _tensors(result)))
                return result

            self._kernels.enter_context(patch.object(TritonPasses, name, call))

        for name, reads in (("statistics", 3), ("distance", 2), ("teacher", 3)):
            counting(name, reads)


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Each tensor of a tree once; what is written in place is both an argument and a result."""
    seen: set[int] = set()
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) and id(leaf) not in seen:
            seen.add(id(leaf))
            yield leaf


def _size(tensor: Tensor) -> int:
    distinct = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 0]
    return int(torch.Size(distinct).numel()) * tensor.element_size()
