"""A model as it lies on this machine, a directory or a GGUF file, before its weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from alisa.config import WeightFormat
from alisa.model.decoder import Decoder
from alisa.model.gguf.model import GgufModel
from alisa.model.layer import Progress
from alisa.model.linear import LinearMaker
from alisa.model.loader import checkpoint_dtype, load_decoder, load_spec
from alisa.model.own_sampling import read_sampling
from alisa.model.tokenizer import Tokenizer
from alisa.spec import ModelSpec


class StoredModel(Protocol):
    """What every form of a model can tell and make."""

    @property
    def spec(self) -> ModelSpec:
        """Shape and wiring."""
        ...

    def dtype_name(self) -> str | None:
        """Dtype the weights are stored in (`float16`); None: they are quantised.

        Raises:
            ModelError: the files are damaged.
        """
        ...

    @property
    def weight_format(self) -> WeightFormat:
        """The format with the fewest bits that keeps the numbers of its layers' matrices as they are stored."""
        ...

    @property
    def has_codes(self) -> bool:
        """Whether most weights of its layers are kept in 4 bits that `--weight-dtype int4` runs as they are."""
        ...

    def tokenizer(self) -> Tokenizer:
        """The tokenizer with the chat template.

        Raises:
            ModelError: there is none that can be read.
        """
        ...

    def sampling(self) -> dict[str, float]:
        """Fields of `SamplingParams` that the model's files set; empty where they ask for nothing special.

        Raises:
            ModelError: a file is damaged.
        """
        ...

    def decoder(
        self,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
        linears: LinearMaker | None = None,
    ) -> Decoder:
        """A decoder with the weights, read one tensor at a time.

        Args:
            dtype: what to compute in.
            device: where to run.
            progress: receives (bytes done, bytes in total), in bytes of `dtype`.
            linears: turn weights into linear layers; None: exact ones that are fast here.

        Raises:
            ModelError: the weights are missing, damaged or do not fit.
        """
        ...


class ModelDirectory:
    """A directory in the form of the Hugging Face hub.

    Args:
        directory: config.json with weights and tokenizer.

    Raises:
        ModelError: there is no readable config, its family is unknown, or it asks for what is not supported.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.spec = load_spec(directory)

    def dtype_name(self) -> str | None:
        """What config.json says, or what most tensors have."""
        return checkpoint_dtype(self._directory)

    @property
    def weight_format(self) -> WeightFormat:
        """These directories hold floats."""
        return "float"

    @property
    def has_codes(self) -> bool:
        """The same."""
        return False

    def tokenizer(self) -> Tokenizer:
        """From tokenizer.json, or from vocabulary and merges."""
        return Tokenizer.load(self._directory)

    def sampling(self) -> dict[str, float]:
        """What generation_config.json says."""
        return read_sampling(self._directory)

    def decoder(
        self,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
        linears: LinearMaker | None = None,
    ) -> Decoder:
        """Safetensors or `.bin` files."""
        return load_decoder(self._directory, dtype, device, progress, linears)


def open_model(path: Path) -> StoredModel:
    """The model in a directory or a GGUF file; config or metadata are read at once.

    Raises:
        ModelError: it is not a model that can run here.
    """
    return GgufModel(path) if path.is_file() else ModelDirectory(path)
