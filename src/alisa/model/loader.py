"""From a model directory to a spec and a decoder, and from a spec alone to a decoder with random weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from alisa.errors import ModelError
from alisa.model.decoder import Decoder
from alisa.model.families import find_family
from alisa.model.families.family import Family
from alisa.model.layer import Progress
from alisa.model.linear import LinearMaker
from alisa.model.other_formats import WEIGHTS, found_format
from alisa.model.source import RandomSource
from alisa.model.weights import Checkpoint, CheckpointSource, StoredTensors
from alisa.spec import ModelSpec


def load_spec(directory: Path) -> ModelSpec:
    """The spec of the model in a directory; reads config.json only.

    Raises:
        ModelError: there is no readable config, its family is unknown, or it asks for what is not supported.
    """
    config = read_config(directory)
    return _family(config, directory).to_spec(config)


def checkpoint_dtype(directory: Path) -> str | None:
    """Dtype the weights are stored in (`float16`): what config.json says, else what most tensors in the files have.

    Raises:
        ModelError: there is no readable config, or, when it does not name the dtype, no readable weights.
    """
    config = read_config(directory)
    # transformers 5 writes `dtype`, earlier versions `torch_dtype`.
    for name in ("dtype", "torch_dtype"):
        value = config.get(name)
        if isinstance(value, str):
            return value.removeprefix("torch.")
    return Checkpoint(directory).dtype_name


def load_decoder(
    directory: Path,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    linears: LinearMaker | None = None,
) -> Decoder:
    """A decoder with the weights of a directory, read one tensor at a time.

    Args:
        directory: config.json with safetensors or `.bin` files.
        dtype: what to compute in; the weights are cast to it.
        device: where to run.
        progress: receives (bytes done, bytes in total), in bytes of `dtype`.
        linears: turn weights into linear layers; None: exact ones that are fast here.

    Raises:
        ModelError: the config or the weights are missing, damaged, unsupported or do not fit each other.
    """
    config = read_config(directory)
    family = _family(config, directory)
    return decoder_from(Checkpoint(directory), family, family.to_spec(config), dtype, device, progress, linears)


def decoder_from(
    checkpoint: StoredTensors,
    family: Family,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    linears: LinearMaker | None = None,
) -> Decoder:
    """A decoder with the weights of a checkpoint, wherever its tensors are; the others as in `load_decoder`.

    Raises:
        ModelError: the weights do not fit the spec.
    """
    source = CheckpointSource(checkpoint, family, spec)
    if source.unties_output:
        spec = dataclasses.replace(spec, tied_embeddings=False)
        source = CheckpointSource(checkpoint, family, spec)
    return Decoder(spec, source, dtype=dtype, device=device, progress=progress, linears=linears)


def random_decoder(
    spec: ModelSpec, dtype: torch.dtype, device: torch.device, seed: int = 0, linears: LinearMaker | None = None
) -> Decoder:
    """A decoder of this shape with random weights, for benchmarks; built exactly as a loaded one."""
    source = RandomSource(dtype=dtype, device=device, seed=seed)
    return Decoder(spec, source, dtype=dtype, device=device, linears=linears)


def read_config(directory: Path) -> Mapping[str, Any]:
    """The fields of config.json.

    Raises:
        ModelError: the file is missing or not a JSON object.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        other = found_format(directory, WEIGHTS) if directory.is_dir() else None
        if other is not None:
            raise ModelError(f"{directory} has no config.json, and holds its weights only as {other}.") from error
        raise ModelError(
            f"{directory} has no config.json, so it is not a model directory; give the folder that holds config.json, "
            "the weights and the tokenizer."
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable JSON ({error}); download it again.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds a {type(config).__name__} instead of a JSON object; download it again.")
    return config


def _family(config: Mapping[str, Any], directory: Path) -> Family:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"{directory / 'config.json'} does not name a model_type; download it again.")
    return find_family(model_type)
