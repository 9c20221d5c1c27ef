"""Writing a safetensors file one tensor at a time.

The library's own `save_file` wants every tensor of a file at once. Names, dtypes and shapes are known beforehand here,
so that the header can be written first and no more than one tensor need be in memory. The format
(github.com/huggingface/ safetensors): the header's length as a 64-bit little-endian number, the header as JSON, then
the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from megatron_aligndistil.models.layout import Shape

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def num_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Size of a tensor's data."""
    return torch.Size(shape).numel() * dtype.itemsize


class SafetensorsWriter:
    """A file whose tensors are all announced on opening and then written in that order. A context manager."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[Shape, torch.dtype]]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without a format
        offset = 0
        for name, (shape, dtype) in tensors.items():
            end = offset + num_bytes(shape, dtype)
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data begin at a multiple of 8 bytes
        self._tensors = dict(tensors)
        self._pending = list(tensors)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor, on any device; it must be the one announced, in dtype and shape too."""
        expected, (shape, dtype) = self._pending.pop(0), self._tensors[name]
        assert (name, tuple(tensor.shape), tensor.dtype) == (expected, shape, dtype), (
            f"{name} is not the tensor announced"
        )
        data = tensor.detach().to("cpu").contiguous().reshape(-1)
        self._file.write(data.view(torch.uint8).numpy().data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        assert kind is not None or not self._pending, f"{self._pending[:1]} and perhaps more were never written"
