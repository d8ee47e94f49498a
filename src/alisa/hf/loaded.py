"""A model of transformers as alisa's engine runs it: its weights in our decoder."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from alisa.config import EngineConfig
from alisa.engine.loaded import LoadedModel
from alisa.kernels.choose import choose_backend
from alisa.model.choose_linear import choose_linear, resolve_weight_dtype
from alisa.model.coded import CodedRows
from alisa.model.families import find_family
from alisa.model.loader import decoder_from
from alisa.model.names import Shape


class ModuleTensors:
    """The weights of a model in memory, under the names that its files have (`alisa.model.weights.StoredTensors`)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.place = Path(model.name_or_path or type(model).__name__)
        self.description = "its configuration"
        self._tensors: dict[str, Tensor] = revert_weight_conversion(model, model.state_dict())

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> Shape:
        """Shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def file_name(self, name: str) -> str:
        """Where it lies: in the model."""
        return self.place.name

    def read(self, name: str, part: int | None = None) -> Tensor:
        """The model's own tensor, not a copy; or one part of it along its first dimension."""
        tensor = self._tensors[name].detach()
        return tensor if part is None else tensor[part]

    def read_codes(self, name: str, part: int | None = None) -> CodedRows | None:
        """None: the model's tensors are floats."""
        return None


def load_from(model: PreTrainedModel, config: EngineConfig) -> LoadedModel:
    """The model in our decoder.

    Embeddings, norms and biases are the model's own memory, and so are the weights of linear layers where they are used
    as they lie, which is on a GPU. On a CPU they are packed, and so copied.

    Raises:
        ModelError: our decoder does not have the model's family, or its configuration asks for what is not supported.
        InputError: weights in fewer bits on another device than a CPU.
    """
    fields = json.loads(model.config.to_json_string())
    family = find_family(fields["model_type"])
    weights = resolve_weight_dtype(config.weight_dtype, "float", model.device)
    linears = choose_linear(weights, model.dtype, model.device)
    decoder = decoder_from(
        ModuleTensors(model), family, family.to_spec(fields), model.dtype, model.device, linears=linears
    )
    if config.max_model_len is not None:
        decoder = decoder.within(config.max_model_len)
    return LoadedModel(type(model).__name__, decoder, None, choose_backend(model.device), weight_format=weights)
