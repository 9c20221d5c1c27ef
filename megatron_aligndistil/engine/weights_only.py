"""Reading Megatron's distributed checkpoints without running anything that is in them.

megatron-core 0.16.1 reads ``common.pt`` with torch's restricted unpickler where torch does so by default (since 2.6,
unless the environment says otherwise). It reads ``.metadata`` with Python's own, and objects beside the tensors with
``weights_only=False``; both would call any function that a file names. Here all are read with a short list of what may
be named.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import torch as megatron_torch
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import CachedMetadataFileSystemReader
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
from torch.distributed.checkpoint import Metadata, ReadItem
from torch.distributed.checkpoint.metadata import StorageMeta, TensorStorageMetadata

from megatron_aligndistil.errors import CheckpointError

METADATA_FILE = ".metadata"
# What describes tensors and files in .metadata: data classes and enumerations, which do nothing when they are made.
_NAMES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"Path", "PosixPath"},
    "collections": {"OrderedDict", "defaultdict"},
    "builtins": {"list", "dict", "set", "tuple"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _NAMES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{METADATA_FILE} names {module}.{name}, and reading it would run that")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError(f"{METADATA_FILE} refers to data outside of it")


def read_metadata(folder: str | Path) -> Metadata:
    """What a distributed checkpoint holds, from its ``.metadata``.

    Raises UnpicklingError where the file is damaged, or names anything but what describes tensors and files.
    """
    with (Path(folder) / METADATA_FILE).open("rb") as file:
        metadata = _Unpickler(file).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"{METADATA_FILE} does not describe a checkpoint")
    return metadata


def check_common(folder: str | Path) -> None:
    """Raise UnpicklingError where ``common.pt`` is damaged, or names anything but containers, numbers and tensors."""
    try:
        torch.load(Path(folder) / COMMON_STATE_FNAME, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"names {named[1]}, and reading it would run that" if named else "is damaged"
        raise pickle.UnpicklingError(f"{COMMON_STATE_FNAME} {what}") from error


class _Reader(CachedMetadataFileSystemReader):
    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        cached: Metadata | None = vars(self)["_cached_metadata"]
        if cached is None:
            self._cached_metadata = cached = read_metadata(self.path)
            cached.storage_meta = cached.storage_meta or StorageMeta()
            cached.storage_meta.load_id = self.load_id
        return cached


class _Planner(MCoreLoadPlanner):
    def _validate_global_shapes(self, metadata: Metadata, sharded_tensors: Iterable[ShardedTensor]) -> None:
        stored = metadata.state_dict_metadata
        wrong = {}
        for tensor in sharded_tensors:
            there = stored.get(tensor.key)
            if not isinstance(there, TensorStorageMetadata):
                wrong[tensor.key] = f"{tensor.key} is not there"
            elif tuple(there.size) != tuple(tensor.global_shape):
                wrong[tensor.key] = f"{tensor.key} is {_show(there.size)} there and {_show(tensor.global_shape)} here"
        if wrong:
            rest = f", and {len(wrong) - 3} more tensors" if len(wrong) > 3 else ""
            raise CheckpointError(", ".join(list(wrong.values())[:3]) + rest)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def _show(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


@contextmanager
def weights_only() -> Iterator[None]:
    """Inside, `dist_checkpointing.load` builds nothing but tensors, plain containers and Megatron's settings."""
    before = megatron_torch.MCoreLoadPlanner, megatron_torch._get_filesystem_reader
    megatron_torch.MCoreLoadPlanner = _Planner
    megatron_torch._get_filesystem_reader = lambda folder, cache_metadata=False: _Reader(folder)
    try:
        yield
    finally:
        megatron_torch.MCoreLoadPlanner, megatron_torch._get_filesystem_reader = before
