"""A checkpoint directory as a source of our tensors: one or many files, safetensors or `.bin`, any usual prefix.

Everything that can be known from file headers is checked before the first weight is read: files that are missing or cut
short, tensors that are missing or unknown. Then each tensor is read alone, so that nothing is in memory twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from alisa.errors import ModelError
from alisa.model.coded import CodedRows, CodedWeight
from alisa.model.families.family import Family, WeightPiece
from alisa.model.foreign import unwrapped, what_it_is, without_unused
from alisa.model.names import Shape, layer_name, layer_shapes, model_shapes
from alisa.model.other_formats import MARKS, WEIGHTS, found_format, is_other
from alisa.model.packed import PackedTensor, packed_tensors
from alisa.model.pages import page_tensor
from alisa.model.safetensors_file import SafetensorsFile
from alisa.model.torch_file import TorchFile
from alisa.spec import ModelSpec

_SHARD = re.compile(r".*-\d+-of-(\d+)\.(safetensors|bin)")
# Buffers that older libraries saved with the weights, and that are derived from the config here.
_DERIVED = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(attn|attention)\.(masked_)?bias|version)$")


class StoredTensors(Protocol):
    """Tensors in files, by the names that a family's checkpoints have."""

    @property
    def place(self) -> Path:
        """The directory or the file, for messages."""
        ...

    @property
    def description(self) -> str:
        """What describes the model they are of, for messages: `config.json`."""
        ...

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        ...

    def shape(self, name: str) -> Shape:
        """Shape of a tensor, without reading it."""
        ...

    def file_name(self, name: str) -> str:
        """The file a tensor lies in, for messages."""
        ...

    def read(self, name: str, part: int | None = None) -> Tensor:
        """The tensor in a float dtype, in memory of its own; or one part of it along its first dimension."""
        ...

    def read_codes(self, name: str, part: int | None = None) -> CodedRows | None:
        """The same of a matrix that is kept in 4 bits, as it is, in memory of its own; None: it is not."""
        ...


class Checkpoint:
    """The tensors of a model directory by their names in the files.

    Args:
        directory: holds `model.safetensors` or `pytorch_model.bin`, or their shards with an index.

    Raises:
        ModelError: no weight files, a missing shard, or a damaged file.
    """

    def __init__(self, directory: Path) -> None:
        self.place = directory
        self.description = "config.json"
        self._files: dict[str, SafetensorsFile | TorchFile | PackedTensor] = {}
        in_safetensors: dict[str, SafetensorsFile] = {}
        mark = found_format(directory, MARKS)
        if mark is not None:
            raise ModelError(f"{directory} holds no plain model: {mark}.")
        for path in weight_files(directory):
            if path.suffix == ".safetensors":
                opened = SafetensorsFile(path)
                in_safetensors |= dict.fromkeys(opened.names, opened)
            else:
                file = TorchFile(path)
                self._files |= dict.fromkeys(file.names, file)
        packed = packed_tensors(in_safetensors)
        halves = {half for tensor in packed.values() for half in tensor.halves}
        self._files |= {name: file for name, file in in_safetensors.items() if name not in halves}
        self._files |= packed

    @property
    def names(self) -> list[str]:
        """Names of all tensors in all files."""
        return list(self._files)

    @property
    def dtype_name(self) -> str:
        """Dtype of most tensors, `float16` for example."""
        counts: dict[str, int] = {}
        for name, file in self._files.items():
            dtype = file.dtype_name(name)
            counts[dtype] = counts.get(dtype, 0) + 1
        return max(counts, key=counts.__getitem__)

    def shape(self, name: str) -> Shape:
        """Shape of a tensor, without reading it."""
        return self._files[name].shape(name)

    def file_name(self, name: str) -> str:
        """The file a tensor lies in, for messages."""
        return self._files[name].path.name

    def read(self, name: str, part: int | None = None) -> Tensor:
        """The tensor in its stored dtype, in memory of its own; or one part of it along its first dimension."""
        return self._files[name].read(name, part)

    def read_codes(self, name: str, part: int | None = None) -> CodedRows | None:
        """None: these files hold floats."""
        return None


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights, safetensors before `.bin`, every shard present.

    Raises:
        ModelError: there are none, or the index names files that are not there.
    """
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index = directory / f"{stem}{suffix}.index.json"
        single = directory / f"{stem}{suffix}"
        if single.is_file():
            return [single]
        if index.is_file():
            return _shards(index)
        found = sorted(path for path in directory.glob(f"*{suffix}") if not is_other(path.name, WEIGHTS))
        if suffix == ".safetensors" and found:
            return _complete(found)
    other = found_format(directory, WEIGHTS)
    if other is not None:
        raise ModelError(f"{directory} holds its weights only as {other}.")
    raise ModelError(
        f"{directory} holds no weights: neither model.safetensors nor pytorch_model.bin, whole or in shards with an "
        "index; download the repository again or give another directory."
    )


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index.name} is damaged: it should map tensors to files; download it again.") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ModelError(
            f"{len(missing)} of {len(names)} weight files of {index.parent} are missing: {_some(missing)}; "
            "download them again."
        )
    return [index.parent / name for name in names]


def _complete(found: list[Path]) -> list[Path]:
    """The files themselves, when their own `-of-` count says that all shards are there."""
    match = _SHARD.fullmatch(found[0].name)
    if match and len(found) != int(match.group(1)):
        raise ModelError(
            f"{len(found)} of {int(match.group(1))} weight files are in {found[0].parent}; download the missing ones."
        )
    return found


class CheckpointSource:
    """Stored tensors read through a family's name map.

    Args:
        checkpoint: the files.
        family: says where our tensors are, and which prefixes its repositories use.
        spec: the model, as its config describes it.

    Raises:
        ModelError: tensors are missing or unknown; the message names the first few of each.
    """

    def __init__(self, checkpoint: StoredTensors, family: Family, spec: ModelSpec) -> None:
        self._checkpoint = checkpoint
        self._spec = spec
        stored = [name for name in checkpoint.names if not name.startswith(family.ignored)]
        self._names = {family.canonical(unwrapped(name)): name for name in without_unused(stored)}
        self._parts: dict[str, tuple[WeightPiece, ...]] = {}
        for name in model_shapes(spec):
            self._parts[name] = family.model_parts[name]
        for layer in range(spec.num_layers):
            for part in layer_shapes(spec):
                self._parts[layer_name(layer, part)] = family.layer_pieces(part, layer)
        self._check_names(family)

    @property
    def unties_output(self) -> bool:
        """Whether a model whose config ties the embeddings has an output projection of its own in its files.

        Hugging Face transformers 5 keeps both when they differ, and so does this library.
        """
        output = self._names.get("lm_head.weight")
        if output is None or not self._spec.tied_embeddings:
            return False
        (table,) = self._parts["embed.weight"]
        return not torch.equal(self._checkpoint.read(output), self._checkpoint.read(self._names[table.name]))

    def read(self, name: str, shape: Shape) -> Tensor:
        """The tensor under our name, its pieces taken out of the files and joined along the rows.

        Raises:
            ModelError: the pieces do not make up the shape.
        """
        parts = self._parts[name]
        piece = self._take(parts[0], name, shape)
        if tuple(piece.shape) == shape:
            return piece
        # Piece by piece into the whole, so that never all pieces and the whole are held at once.
        joined = page_tensor(shape, piece.dtype)
        num_rows = 0
        for index, part in enumerate(parts):
            piece = piece if index == 0 else self._take(part, name, shape)
            end = num_rows + piece.shape[0]
            if piece.shape[1:] != joined.shape[1:] or end > shape[0]:
                raise self._misshapen(parts, name, shape)
            joined[num_rows:end] = piece
            num_rows = end
        if num_rows != shape[0]:
            raise self._misshapen(parts, name, shape)
        return joined

    def read_codes(self, name: str, shape: Shape) -> CodedWeight | None:
        """See `WeightSource`: all pieces, when at least one is kept in 4 bits.

        Raises:
            ModelError: the pieces do not make up the shape.
        """
        parts = self._parts[name]
        coded = [self._take_codes(part, name, shape) for part in parts]
        if all(codes is None for codes in coded):
            return None
        pieces = tuple(
            self._take(part, name, shape) if codes is None else codes for part, codes in zip(parts, coded, strict=True)
        )
        if sum(piece.shape[0] for piece in pieces) != shape[0] or any(piece.shape[1:] != shape[1:] for piece in pieces):
            raise self._misshapen(parts, name, shape)
        return pieces

    def _take_codes(self, part: WeightPiece, name: str, shape: Shape) -> CodedRows | None:
        codes = self._checkpoint.read_codes(self._names[part.name], part.expert)
        if codes is None or part.take is None:
            return codes
        try:
            return codes.moved(part.take(torch.arange(codes.shape[0]), self._spec))
        except (RuntimeError, IndexError) as error:
            raise self._misshapen((part,), name, shape) from error

    def _take(self, part: WeightPiece, name: str, shape: Shape) -> Tensor:
        tensor = self._checkpoint.read(self._names[part.name], part.expert)
        if part.take is None:
            return tensor
        try:
            # A copy, so that the rest of a fused tensor is not kept alive by a view.
            return part.take(tensor, self._spec).clone(memory_format=torch.contiguous_format)
        except (RuntimeError, IndexError) as error:
            raise self._misshapen((part,), name, shape) from error

    def _check_names(self, family: Family) -> None:
        wanted = {part.name for parts in self._parts.values() for part in parts}
        missing = sorted(wanted - self._names.keys())
        known_extra = wanted | {"lm_head.weight"}
        extra = sorted(name for name in self._names.keys() - known_extra if not _DERIVED.search(name))
        if not missing and not extra:
            return
        reasons = []
        if missing:
            reasons.append(f"{len(missing)} tensors are missing ({_some(missing)})")
        if extra:
            reasons.append(f"{len(extra)} are not part of a {family.model_type} model ({_some(extra)})")
        raise ModelError(
            f"The weights in {self._checkpoint.place} do not fit {self._checkpoint.description} ({family.model_type}, "
            f"{self._spec.num_layers} layers): {' and '.join(reasons)}; {what_it_is(missing, extra)}."
        )

    def _misshapen(self, parts: Sequence[WeightPiece], name: str, shape: Shape) -> ModelError:
        originals = [self._names[part.name] for part in parts]
        found = ", ".join(f"{original} {list(self._checkpoint.shape(original))}" for original in originals)
        return ModelError(
            f"{self._checkpoint.file_name(originals[0])}: {found} cannot make up {name} {list(shape)} as "
            f"{self._checkpoint.description} describes it; the two are of different models, download both again."
        )


def _some(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
