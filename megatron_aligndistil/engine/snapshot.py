"""A model's state as Megatron's distributed checkpoint, in two steps: copied now, written whenever.

Megatron-Core says what each rank saves and under which name; the files are written here, by a thread that issues no
collectives, in the format that `dist_checkpointing.load` reads (docs/decisions/0009-checkpoints.md).
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from megatron_aligndistil.engine.manifest import CheckedFile, FileRecord, sync, write_manifest
from megatron_aligndistil.engine.weights_only import METADATA_FILE


@dataclass
class Part:
    """What one rank has written of a model: where each tensor lies, and its files by name."""

    places: dict[MetadataIndex, _StorageInfo] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)


class Snapshot:
    """This rank's part of the state of one model, as it is now.

    Arguments:
        sharded: Megatron's sharded state dict; used up.
        folder: the checkpoint's folder; must exist when :meth:`write` is called.
        describe: writes config.json and tokenizer into the folder that it is given; called on the first rank, by
            :meth:`write`.
        copy: whether to copy the tensors to host memory of their own, so that what changes them later does not change
            the snapshot. Without it they must stay as they are until :meth:`write` returns.

    Collectives: Megatron's checks of the sharding (object gathers), and one object gather of the plans.
    """

    def __init__(
        self, sharded: dict[str, Any], folder: Path, describe: Callable[[Path], None], *, copy: bool = True
    ) -> None:
        self.folder = folder
        self._describe, self._is_first = describe, dist.get_rank() == 0
        sharded, common = save_preprocess(sharded)
        flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
        planner = MCoreSavePlanner(flatten_state_dict=False)
        planner.set_up_planner(mcore_to_pyt_state_dict(flat), is_coordinator=self._is_first)
        plan = planner.create_local_plan()
        self._metadata = _gather_metadata(planner, plan, self._is_first)
        take = _copy if copy else _on_host
        self._items: list[tuple[WriteItem, Tensor | io.BytesIO]] = [
            (item, take(planner.resolve_data(item))) for item in planner.finish_plan(plan).items
        ]
        # Step counts and the like are changed in place by the next step too.
        buffer = io.BytesIO()
        torch.save(common, buffer)
        self._common = buffer.getbuffer() if self._is_first else None

    def write(self) -> Part:
        """Write this rank's files, and let go of the copies. No collectives; for any thread. Raises OSError."""
        part = Part()
        if self._items:
            name = f"__{dist.get_rank()}_0.distcp"
            file = CheckedFile(self.folder / name)
            try:
                for item, data in self._items:
                    start = file.tell()
                    if isinstance(data, Tensor):
                        torch.save(data, cast(IO[bytes], file))
                    else:
                        file.write(data.getbuffer())
                    part.places[item.index] = _StorageInfo(name, start, file.tell() - start)
            finally:
                part.files[name] = file.close()
        if self._common is not None:
            file = CheckedFile(self.folder / COMMON_STATE_FNAME)
            file.write(self._common)
            part.files[COMMON_STATE_FNAME] = file.close()
            (self.folder / "hf").mkdir(exist_ok=True)
            self._describe(self.folder / "hf")
        self._items.clear()
        return part

    def finish(self, parts: Sequence[Part]) -> None:
        """On the first rank, once all have written: say in files what lies where, and what the files are."""
        assert self._metadata is not None, "only the first rank knows all plans"
        self._metadata.storage_data = {index: place for part in parts for index, place in part.places.items()}
        self._metadata.storage_meta = StorageMeta()
        files = {name: record for part in parts for name, record in part.files.items()}
        # Everybody knows a distributed checkpoint by its metadata.json.
        description = json.dumps(asdict(CheckpointingConfig("torch_dist", 1)))
        for name, content in ((METADATA_FILE, pickle.dumps(self._metadata)), (CONFIG_FNAME, description.encode())):
            file = CheckedFile(self.folder / name)
            file.write(content)
            files[name] = file.close()
        write_manifest(self.folder, files)
        for path in (*(self.folder / "hf").rglob("*"), self.folder / "hf", self.folder):
            sync(path)


def _gather_metadata(planner: MCoreSavePlanner, plan: SavePlan, is_first: bool) -> Metadata | None:
    """What the whole checkpoint will hold, on the first rank."""
    plans: list[Any] | None = [None] * dist.get_world_size() if is_first else None
    dist.gather_object(plan, plans)
    return None if plans is None else planner.create_global_plan(plans)[1]


def _copy(data: Any) -> Tensor | io.BytesIO:
    if not isinstance(data, Tensor):
        return data
    return torch.empty(data.shape, dtype=data.dtype, device="cpu").copy_(data.detach())


def _on_host(data: Any) -> Tensor | io.BytesIO:
    """As it is where it can be: torch writes the whole storage behind a view."""
    if isinstance(data, Tensor) and data.is_cpu and data.untyped_storage().nbytes() == data.nbytes:
        return data.detach()
    return _copy(data)
