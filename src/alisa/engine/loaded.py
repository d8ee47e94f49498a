"""A model that is in memory, ready for any number of engines, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from alisa.attention.kv_cache import Rebuilding, RowSource
from alisa.cache.codec import make_codec
from alisa.config import EngineConfig, WeightFormat
from alisa.kernels.base import Codec
from alisa.kernels.choose import AttentionBackend, choose_backend
from alisa.model.choose_linear import choose_linear, resolve_weight_dtype
from alisa.model.decoder import Decoder
from alisa.model.hub import resolve_model
from alisa.model.precision import resolve_device, resolve_dtype
from alisa.model.stored import open_model
from alisa.model.tokenizer import Tokenizer
from alisa.policy.layer_budgets import layer_sparsities
from alisa.spec import ModelSpec, RowFormat


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Weights, tokenizer and kernels."""

    name: str
    """As it was asked for; `embedded` for the model inside the package."""
    decoder: Decoder
    tokenizer: Tokenizer | None
    """None: prompts are token ids."""
    backend: AttentionBackend
    sampling: Mapping[str, float] = field(default_factory=dict)
    """What the model's files say of how to sample from it, by the fields of `SamplingParams`."""
    weight_format: WeightFormat = "float"
    """What its linear layers are kept in."""

    @property
    def spec(self) -> ModelSpec:
        """Shape and wiring."""
        return self.decoder.spec

    @property
    def dtype(self) -> str:
        """What the model computes in."""
        return str(self.decoder.dtype).removeprefix("torch.")

    @property
    def weight_dtype(self) -> str:
        """What the linear layers are held in, as a dtype where it is one."""
        return self.dtype if self.weight_format == "float" else self.weight_format

    def for_rows(self, kv_dtype: str) -> LoadedModel:
        """The same with a decoder for rows of this format: `Decoder.for_rows`."""
        return replace(self, decoder=self.decoder.for_rows(kv_dtype))

    @property
    def row_source(self) -> RowSource:
        """What its KV cache is planned for; rows that cannot be rebuilt are never deleted."""
        decoder, spec = self.decoder, self.spec
        rebuilding = None
        if decoder.can_rebuild:
            rebuilding = Rebuilding(spec.hidden_size, decoder.dtype, decoder.project_kv)
        return RowSource(spec.attention, spec.max_positions, decoder.device, self.backend, rebuilding)


def embedded_model() -> Path:
    """Directory of the small trained model inside the package."""
    return Path(__file__).parents[1] / "embedded"


def load_model(config: EngineConfig, progress: Callable[[int, int], None] | None = None) -> LoadedModel:
    """The model that a configuration asks for.

    Args:
        config: which model, and in what precision.
        progress: called with (bytes read, bytes in all).

    Raises:
        InputError: the device or a precision is not to be had here.
        ModelError: the model cannot be found, read or run.
    """
    # Opened before anything else is read: a wrong directory or family is refused by its config.
    stored = open_model(embedded_model() if config.model is None else resolve_model(config.model))
    tokenizer = stored.tokenizer()
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, stored.dtype_name(), device)
    weights = resolve_weight_dtype(config.weight_dtype, stored.weight_format, device)
    linears = choose_linear(weights, dtype, device)
    decoder = stored.decoder(dtype, device, progress, linears)
    if config.max_model_len is not None:
        decoder = decoder.within(config.max_model_len)
    backend = choose_backend(decoder.device)
    return LoadedModel(config.model or "embedded", decoder, tokenizer, backend, stored.sampling(), weights)


def layer_budgets(model: LoadedModel, config: EngineConfig) -> tuple[float, ...]:
    """The budgets of the layers that this configuration asks for, as `Budget.layers`.

    Raises:
        InputError: the file cannot be read, or is for another model, policy or sparsity.
    """
    return layer_sparsities(config.budgets, model.spec, config.policy, config.sparsity)


def kv_codec(model: LoadedModel, config: EngineConfig) -> Codec:
    """The codec of the rows that this configuration asks for; `auto` is the dtype of the arithmetic."""
    name = model.dtype if config.kv_dtype == "auto" else config.kv_dtype
    return make_codec(RowFormat(name, model.spec.num_kv_heads, model.spec.head_dim))
