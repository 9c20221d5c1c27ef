"""How one Megatron parameter is put together from Hugging Face tensors, for any tensor parallel size.

Every rule says the same thing in the same way: the whole Megatron tensor, tensor parallel ranks one after another, is a
    list
of pieces of Hugging Face tensors along one dimension, and each rank holds an equal, contiguous part of it. Reading a
shard and writing the tensors back are then one piece of code each (mapping.py), whatever the rule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from megatron_aligndistil.models.architecture import Architecture

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Rows (or columns) [start, stop) of a Hugging Face tensor; of zeros, where `source` is None."""

    source: str | None
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class Rule(ABC):
    """One Megatron parameter.

    Attributes:
        split_dim: the dimension that tensor parallel ranks split and that pieces lie along; None when every rank holds
            all.
    """

    split_dim: ClassVar[int | None] = 0

    @abstractmethod
    def tensors(self, arch: Architecture) -> dict[str, Shape]:
        """The Hugging Face tensors it holds, with their shapes. In names, `{}` stands for the layer's number."""

    @abstractmethod
    def pieces(self, arch: Architecture, tp: int) -> list[Piece]:
        """The whole Megatron tensor along `split_dim`, rank 0's part first."""


@dataclass(frozen=True)
class Replicated(Rule):
    """The same vector on every rank (a norm's weight); `size` names the architecture's field with its length."""

    source: str
    size: str = "hidden_size"
    split_dim: ClassVar[int | None] = None

    def tensors(self, arch: Architecture) -> dict[str, Shape]:
        return {self.source: (getattr(arch, self.size),)}

    def pieces(self, arch: Architecture, tp: int) -> list[Piece]:
        return [Piece(self.source, 0, getattr(arch, self.size))]


@dataclass(frozen=True)
class Row(Replicated):
    """A weight of one row [1, H], the same on every rank."""

    def tensors(self, arch: Architecture) -> dict[str, Shape]:
        return {self.source: (1, getattr(arch, self.size))}


@dataclass(frozen=True)
class Vocabulary(Rule):
    """An embedding or output layer [V, H]: rows split over ranks, zero rows at its end.

    `tied` is the tensor that stands in for `source` when the embeddings are tied: Megatron's last pipeline stage then
    keeps a copy of the embedding as its output layer.
    """

    source: str
    tied: str | None = None

    def tensors(self, arch: Architecture) -> dict[str, Shape]:
        return {self._source(arch): (arch.vocab_size, arch.hidden_size)}

    def pieces(self, arch: Architecture, tp: int) -> list[Piece]:
        padding = arch.padded_vocab_size(tp) - arch.vocab_size
        return [Piece(self._source(arch), 0, arch.vocab_size), Piece(None, 0, padding)]

    def is_copy(self, arch: Architecture) -> bool:
        """Whether another parameter already holds this tensor, so that it is read but never written."""
        return arch.tied_embeddings and self.tied is not None

    def _source(self, arch: Architecture) -> str:
        return self.tied if arch.tied_embeddings and self.tied is not None else self.source


@dataclass(frozen=True)
class Columns(Rule):
    """A row-parallel weight [H, in]: its input channels are split.

    `heads` says that these are attention's heads, not feed-forward channels.
    """

    source: str
    heads: bool = False
    split_dim: ClassVar[int | None] = 1

    def tensors(self, arch: Architecture) -> dict[str, Shape]:
        return {self.source: (arch.hidden_size, self._width(arch))}

    def pieces(self, arch: Architecture, tp: int) -> list[Piece]:
        return [Piece(self.source, 0, self._width(arch))]

    def _width(self, arch: Architecture) -> int:
        return arch.num_heads * arch.head_dim if self.heads else arch.ffn_hidden_size


@dataclass(frozen=True)
class GateUp(Rule):
    """The first feed-forward weight [2 · F, H]: each rank holds its gate rows, then its up rows."""

    gate: str
    up: str

    def tensors(self, arch: Architecture) -> dict[str, Shape]:
        shape = (arch.ffn_hidden_size, arch.hidden_size)
        return {self.gate: shape, self.up: shape}

    def pieces(self, arch: Architecture, tp: int) -> list[Piece]:
        bounds = [rank * arch.ffn_hidden_size // tp for rank in range(tp + 1)]
        return [Piece(name, *part) for part in zip(bounds, bounds[1:], strict=False) for name in (self.gate, self.up)]


@dataclass(frozen=True)
class QueryKeyValue(Rule):
    """The fused attention input, weight [rows, H] or bias [rows]: per query group its query heads, its key, its value.

    With more ranks than groups, Megatron still splits these rows evenly (inside a group) and gathers the activations,
    so that the same equal parts are right there too.
    """

    query: str
    key: str
    value: str
    bias: bool = False

    def tensors(self, arch: Architecture) -> dict[str, Shape]:
        tail = () if self.bias else (arch.hidden_size,)
        query, key_value = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        return {self.query: (query, *tail), self.key: (key_value, *tail), self.value: (key_value, *tail)}

    def pieces(self, arch: Architecture, tp: int) -> list[Piece]:
        per_group = arch.num_heads // arch.num_kv_heads * arch.head_dim
        sizes = ((self.query, per_group), (self.key, arch.head_dim), (self.value, arch.head_dim))
        return [
            Piece(name, group * size, (group + 1) * size) for group in range(arch.num_kv_heads) for name, size in sizes
        ]


def shard(pieces: list[Piece], rank: int, tp: int) -> list[Piece]:
    """The pieces of one rank's equal part of a whole tensor. Raises ValueError when the parts would not be equal."""
    total = sum(piece.size for piece in pieces)
    if total % tp:
        raise ValueError(f"{total} rows or columns cannot be split evenly over {tp} ranks")
    first, last = rank * total // tp, (rank + 1) * total // tp
    part, offset = [], 0
    for piece in pieces:
        start, stop = max(first - offset, 0), min(last - offset, piece.size)
        if start < stop:
            part.append(Piece(piece.source, piece.start + start, piece.start + stop))
        offset += piece.size
    return part
