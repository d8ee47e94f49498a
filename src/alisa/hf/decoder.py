"""Any decoder of transformers as alisa's engine, scoring and evaluations drive one: its forward pass, our attention."""

from __future__ import annotations

from inspect import signature
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from alisa.config import EngineConfig
from alisa.engine.loaded import LoadedModel
from alisa.errors import InputError, ModelError
from alisa.hf.attach import use_our_attention
from alisa.hf.handed import handed_forward
from alisa.hf.observed import observe, refusal
from alisa.kernels.base import Attend, AttendAll
from alisa.kernels.choose import choose_backend
from alisa.model.decoder import Decoder
from alisa.model.hub import resolve_model
from alisa.model.precision import resolve_device, resolve_dtype
from alisa.model.tokenizer import Tokenizer
from alisa.spec import ModelSpec


class TransformersDecoder(Decoder):
    """A model of transformers behind the methods of `Decoder`; its configuration is changed for good.

    What `forward` returns are the logits already: transformers puts no seam between the two that all models have. A
    prompt costs the logits of all its tokens.

    Args:
        model: in evaluation mode.

    Raises:
        InputError: it attends in a way that alisa does not.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        name = type(model).__name__
        if "position_ids" not in signature(model.forward).parameters:
            raise refusal(name, "it takes no positions, so that prompts cannot be packed")
        use_our_attention(model)
        config = model.config.get_text_config(decoder=True)
        rope = getattr(config, "rope_parameters", None) or {}
        if {"dynamic", "longrope"} & {str(each) for each in _values(rope)}:
            raise refusal(name, "it rotates by the length of the longest sequence in a batch")
        self._observed = observe(model)
        max_positions = getattr(config, "max_position_embeddings", None)
        if max_positions is None:
            raise refusal(name, "its configuration does not say how long a sequence may be")
        shape = self._observed.shape(max_positions)
        self.model = model
        self.dtype = model.dtype
        self.device = model.device
        self._row_basis = None
        self._bases = {}
        self._whole = None
        # What is not said here is not asked of a decoder: it is for pricing and building one of ours.
        self.spec = ModelSpec(
            family=str(config.model_type),
            num_layers=shape.num_layers,
            hidden_size=config.hidden_size,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            ffn_size=0,
            vocab_size=config.vocab_size,
            max_positions=max_positions,
            norm="rmsnorm",
            norm_eps=0.0,
            activation="silu",
            gated_mlp=True,
            rope=None,
            windows=shape.windows,
            softcap=shape.softcap,
            has_sinks=shape.has_sinks,
        )

    @property
    def can_rebuild(self) -> bool:
        """Layer inputs are not seen, so that no row can be made again."""
        return False

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    @property
    def sinks(self) -> tuple[Tensor, ...] | None:
        """See `Decoder.sinks`."""
        return None if self._observed.sinks is None else tuple(self._observed.sinks)

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        attend: Attend,
        lengths: Tensor | None = None,
        attend_all: AttendAll | None = None,
    ) -> Tensor:
        """Logits `[B, T, V]` of tokens and positions Int64[B, T]; the others as in `Decoder.forward`, by `attend`."""
        return handed_forward(self.model, tokens, positions, self._seam(attend))

    def logits(self, hidden: Tensor) -> Tensor:
        """What `forward` returned, as Float32[N, V]."""
        return hidden.to(torch.float32)


def load_transformers(config: EngineConfig) -> LoadedModel:
    """The model that a configuration asks for, in transformers; every family that `alisa.hf.attach` takes.

    Raises:
        InputError: no model is named, weights in 8 bits are asked for, or the model attends as alisa does not.
        ModelError: the model cannot be found or read.
    """
    if config.model is None or config.weight_dtype not in ("auto", "float"):
        raise InputError(
            "--engine hf runs a --model that transformers reads, a directory or a hub id, with its weights as they are."
        )
    directory: Path = resolve_model(config.model)
    if not directory.is_dir():
        raise InputError(f"--engine hf reads directories and hub ids, and {directory} is a file; leave --engine out.")
    tokenizer = Tokenizer.load(directory)
    device = resolve_device(config.device)
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    except (OSError, ValueError) as error:
        raise ModelError(f"transformers cannot load {config.model}: {error}") from error
    dtype = resolve_dtype(config.dtype, str(model.dtype).removeprefix("torch."), device)
    decoder = TransformersDecoder(model.to(device=device, dtype=dtype).eval())
    if config.max_model_len is not None:
        decoder = decoder.within(config.max_model_len)
    return LoadedModel(f"{config.model} in transformers", decoder, tokenizer, choose_backend(device))


def _values(rope: object) -> list[object]:
    """All kinds of scaling named in rotary parameters, those of each layer type too."""
    if not isinstance(rope, dict):
        return []
    nested = [value for each in rope.values() for value in _values(each)]
    return [rope.get("rope_type"), *nested]
