"""A model in one GGUF file: spec, tokenizer and decoder, all from its metadata and its blocks."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch

from alisa.config import WeightFormat
from alisa.errors import ModelError
from alisa.model.decoder import Decoder
from alisa.model.families import find_family
from alisa.model.gguf.architectures import find_architecture
from alisa.model.gguf.checkpoint import GgufCheckpoint
from alisa.model.gguf.fields import ArchitectureFields
from alisa.model.gguf.file import GgufFile
from alisa.model.gguf.tokenizer import build_tokenizer
from alisa.model.layer import Progress
from alisa.model.linear import LinearMaker
from alisa.model.tokenizer import Tokenizer
from alisa.model.weights import CheckpointSource
from alisa.spec import ModelSpec, RopeScaling

_ROPE_DIVISORS = "rope_freqs.weight"
"""What the frequencies of the rotated pairs are divided by: all that the format keeps of LLaMA 3's scaling."""

_EXACT_CODES = ("Q4_0", "Q4_1")
"""Formats whose numbers are those of our products; the ranges of Q4_K are rounded to float16."""

_ROUTER = "ffn_gate_inp"
"""Which no format rounds."""

_SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
"""Fields of `SamplingParams` -> values under `general.sampling`."""


class GgufModel:
    """One file, opened by its header.

    Args:
        path: a `.gguf` file.

    Raises:
        ModelError: it is damaged, of an architecture that is not known, or asks for what is not supported.
    """

    def __init__(self, path: Path) -> None:
        self._file = GgufFile(path)
        metadata = self._file.metadata
        kind = metadata.get("general.type", "model")
        if kind != "model":
            raise ModelError(f"{path.name} holds no model but {kind!r} (general.type); give the file of the model.")
        num_files = metadata.get("split.count", 1)
        if num_files > 1:
            raise ModelError(
                f"{path.name} is one of {num_files} parts of a model; join them with llama.cpp's "
                "`llama-gguf-split --merge FIRST.gguf WHOLE.gguf`."
            )
        self._architecture = find_architecture(str(metadata.get("general.architecture")), path.name)
        fields = ArchitectureFields(
            metadata,
            self._file.tensors,
            self._architecture.name,
            read=lambda name: self._file.read(name, torch.float32).tolist(),
        )
        config = self._architecture.read_config(fields)
        fields.finish(path.name)
        self._family = find_family(config["model_type"])
        self.spec = self._with_divisors(self._family.to_spec(config))

    def dtype_name(self) -> str | None:
        """Dtype of most values; None when they are quantised."""
        return self._file.dtype_name

    @property
    def weight_format(self) -> WeightFormat:
        """`int4` where every matrix of the layers is in Q4_0 or Q4_1."""
        kinds = {
            tensor.block_type.name
            for name, tensor in self._file.tensors.items()
            if name.startswith("blk.") and len(tensor.shape) > 1 and _ROUTER not in name
        }
        return "int4" if kinds and kinds.issubset(_EXACT_CODES) else "float"

    @property
    def has_codes(self) -> bool:
        """Whether most weights of the layers are in blocks of 4 bits that are taken over."""
        coded = {True: 0, False: 0}
        for name, tensor in self._file.tensors.items():
            if name.startswith("blk."):
                coded[tensor.block_type.spans is not None] += math.prod(tensor.shape)
        return coded[True] > coded[False]

    def tokenizer(self) -> Tokenizer:
        """Built from the vocabulary in the metadata."""
        return build_tokenizer(self._file.metadata, self._file.path.name)

    def sampling(self) -> dict[str, float]:
        """What `general.sampling` says; most files say nothing."""
        values = {name: self._file.metadata.get(f"general.sampling.{key}") for name, key in _SAMPLING.items()}
        return {name: value for name, value in values.items() if isinstance(value, int | float)}

    def decoder(
        self,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
        linears: LinearMaker | None = None,
    ) -> Decoder:
        """The blocks decoded to `dtype`, one tensor at a time."""
        leave = frozenset({_ROPE_DIVISORS, *self._architecture.metadata_tensors})
        checkpoint = GgufCheckpoint(self._file, self._architecture, self.spec, dtype, leave)
        source = CheckpointSource(checkpoint, self._family, self.spec)
        return Decoder(self.spec, source, dtype=dtype, device=device, progress=progress, linears=linears)

    def _with_divisors(self, spec: ModelSpec) -> ModelSpec:
        if _ROPE_DIVISORS not in self._file.tensors or spec.rope is None:
            return spec
        divisors = tuple(self._file.read(_ROPE_DIVISORS, torch.float32).tolist())
        if len(divisors) != spec.rope.rotary_dim // 2 or spec.rope.scaling is not None:
            raise ModelError(
                f"{self._file.path.name}: {_ROPE_DIVISORS} has {len(divisors)} values, and {spec.rope.rotary_dim // 2} "
                "pairs without any other scaling are needed; convert the model anew."
            )
        return dataclasses.replace(
            spec, rope=dataclasses.replace(spec.rope, scaling=RopeScaling("divisors", divisors=divisors))
        )
