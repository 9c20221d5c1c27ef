"""Let an unmodified Megatron-Core run where there is no CUDA.

Megatron names CUDA in places that have a plain meaning on a CPU: the current device, factory calls with
``device="cuda"``, streams and events (everything is already in order), random state, and a type name that its
optimisers compare. :func:`activate` gives each of them that meaning, once per process. It is never called where CUDA
exists.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")
_FACTORIES = ["arange", "empty", "empty_like", "full", "ones", "ones_like"]
_FACTORIES += ["rand", "randn", "tensor", "zeros", "zeros_like"]
_active = False


def import_megatron() -> None:
    """Import Megatron-Core with its torch.compile decorations left out.

    What they decorate is never fused here, and importing torch's compiler would cost every process a second.
    """
    compiler = torch.compile
    torch.compile = lambda function=None, **_: function if function else (lambda decorated: decorated)  # type: ignore[assignment]
    try:
        import megatron.core.models.gpt  # noqa: F401
    finally:
        torch.compile = compiler


def activate() -> None:
    """Redirect Megatron's uses of CUDA to the CPU for the life of this process."""
    global _active
    if _active:
        return
    if torch.cuda.is_available():
        raise RuntimeError("the CPU backend is only for machines without CUDA")
    import_megatron()
    # torch's own list for `with torch.device(...)`, which must hold the functions as they are now.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    # The type checker is right that methods are replaced here: that is the purpose of this file.
    torch.Tensor.to = _on_cpu(torch.Tensor.to)  # type: ignore[method-assign]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.Tensor.type = _cuda_type_names(torch.Tensor.type)  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    _stand_in_for_streams()
    _stand_in_for_random_state()
    _active = True


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _on_cpu(function: Callable) -> Callable:
    """`function` with any CUDA device among its arguments replaced by the CPU."""

    @functools.wraps(function)
    def redirected(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return function(*args, **kwargs)

    return redirected


def _cuda_type_names(original: Callable) -> Callable:
    """Tensor.type() answers 'torch.cuda.FloatTensor' and so on: Megatron's optimisers accept only these names."""

    @functools.wraps(original)
    def type_of(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return original(self).replace("torch.", "torch.cuda.", 1)
        return original(self, dtype, *args, **kwargs)

    return type_of


class _Stream:
    """A stream or event on a device where every operation has finished when its call returns."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, _stream: Any) -> None: ...

    def wait_event(self, _event: Any) -> None: ...

    def record_event(self, _event: Any = None) -> _Stream:
        return self

    def record(self, _stream: Any = None) -> None: ...

    def wait(self, _stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True


def _stand_in_for_streams() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    # A function each: torch's compiler, where it is imported later, refuses one function under two names.
    cuda.set_device = lambda _device: None
    cuda.synchronize = lambda _device=None: None
    cuda.empty_cache = lambda: None
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = lambda _device=None: _Stream()
    cuda.default_stream = lambda _device=None: _Stream()
    cuda.stream = lambda _stream: contextlib.nullcontext()
    cuda.nvtx.range_push = lambda _message: None
    cuda.nvtx.range_pop = lambda: None


def _stand_in_for_random_state() -> None:
    """Megatron's 'CUDA' random state becomes the CPU's own."""

    def set_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    cuda: Any = torch.cuda
    cuda.get_rng_state = lambda _device=None: torch.get_rng_state()
    cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, _device=None: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)

    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._set_cuda_rng_state = set_state
