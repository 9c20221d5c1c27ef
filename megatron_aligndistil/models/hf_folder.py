"""Reading a Hugging Face checkpoint folder: tensors by name, a slice at a time, and the files that travel with them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_aligndistil.data.padding import pad_with_another_token
from megatron_aligndistil.data.tokenizer import has_tokenizer
from megatron_aligndistil.errors import CheckpointError
from megatron_aligndistil.models.architecture import Architecture, read_config
from megatron_aligndistil.models.families import family_of
from megatron_aligndistil.models.layout import Shape
from megatron_aligndistil.models.mapping import hf_tensors

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".npz"}
# Weights' indexes, and what a training run may have left beside the model.
_NOT_COPIED = re.compile(r"\.index(\.\w+)?\.json$|^config\.json$|^(optimizer|scheduler|trainer_state|training_args)")
# Tensors of older checkpoints that hold nothing: frequencies are computed, a tied output layer is the embedding.
_IGNORED = re.compile(r".*rotary_emb\.inv_freq$")


class HFFolder:
    """The safetensors files of one folder. Headers are read on opening; tensors only when sliced.

    Raises (on opening):
        CheckpointError: no safetensors, or a file that the index names is missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._open: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for file in self._files():
            try:
                self._open[file] = safe_open(self.path / file, framework="pt")
            except FileNotFoundError:
                raise CheckpointError(
                    f"{self.path} lacks {file}, which its {INDEX_FILE} names; copy it again"
                ) from None
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{self.path / file} cannot be read as safetensors: {error}; copy it again"
                ) from None
            self._file_of.update(dict.fromkeys(self._open[file].keys(), file))

    def _files(self) -> list[str]:
        if (self.path / SINGLE_FILE).is_file():  # transformers, too, looks for it first
            return [SINGLE_FILE]
        index = self.path / INDEX_FILE
        if not index.is_file():
            raise CheckpointError(
                f"{self.path} holds neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors are read: "
                "load the checkpoint with transformers and save it again with save_pretrained"
            )
        try:
            return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{index} is not an index of safetensors files; copy it again") from None

    def get(self, name: str) -> Any:
        """A tensor to slice, as safetensors' `get_slice`."""
        if name not in self._file_of:
            raise CheckpointError(f"{self.path} lacks the tensor {name}")
        return self._open[self._file_of[name]].get_slice(name)

    def dtypes(self) -> set[str]:
        """The dtypes of all tensors, in safetensors' spelling (F32, BF16, ...)."""
        return {self.get(name).get_dtype() for name in self._file_of}

    def check(self, arch: Architecture) -> None:
        """Compare names and shapes with the architecture's, from the headers alone, before anything is read.

        Raises:
            CheckpointError: a tensor is missing, has another shape, or is one that the architecture does not have:
                leaving it out would quietly make another model.
        """
        expected = hf_tensors(arch)
        for name, shape in expected.items():
            found = tuple(self.get(name).get_shape())
            if found != shape:
                raise CheckpointError(
                    f"{self.path / self._file_of[name]} holds {name} with shape {_show(found)}, "
                    f"but the model needs {_show(shape)}"
                )
        tied = {"lm_head.weight"} if arch.tied_embeddings else set()
        extra = [
            name for name in self._file_of if name not in expected and name not in tied and not _IGNORED.match(name)
        ]
        if extra:
            raise CheckpointError(
                f"{self.path / self._file_of[extra[0]]} holds {extra[0]}"
                + (f" and {len(extra) - 1} more tensors" if len(extra) > 1 else "")
                + f", which a model of type {arch.model_type} with this config.json does not have"
            )


def _show(shape: Shape) -> str:
    return "x".join(map(str, shape))


def copy_companions(source: Path, target: Path, arch: Architecture, dtype: torch.dtype) -> None:
    """Copy all that is not weights (tokenizer, generation settings, chat templates, licence) and write config.json.

    config.json is the source's own, with its class and dtype set to what the new weights are. Where a scalar model is
    made from a language model's description, it says one label, and a token for padding that ends no response.
    """
    for file in sorted(source.iterdir()):
        hidden_or_weights = (
            file.name.startswith(".") or file.suffix in _WEIGHT_SUFFIXES or _NOT_COPIED.search(file.name)
        )
        if file.is_file() and not hidden_or_weights:
            shutil.copyfile(file, target / file.name)
    templates = "additional_chat_templates"
    if (source / templates).is_dir():
        shutil.copytree(source / templates, target / templates, dirs_exist_ok=True)
    config = read_config(source)
    config["architectures"] = [family_of(arch.model_type).class_of(arch)]
    if arch.head == "scalar" and Architecture.from_folder(source).head == "lm":
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        if has_tokenizer(target):
            config["pad_token_id"] = pad_with_another_token(target)
    # transformers 5 calls it dtype, older versions torch_dtype and read nothing else.
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    config.update(dict.fromkeys(keys, str(dtype).removeprefix("torch.")))
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
