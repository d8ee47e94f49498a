"""Tiny random models of every family that the cache is tried on: those of our decoder, and those it does not have."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import torch
import transformers

from tests import tiny_models

_SMALL = {
    "vocab_size": 120,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

OTHERS = {
    "Apertus": {},
    "Arcee": {},
    "BioGpt": {},
    "BitNet": {},
    "Cohere": {},
    "Cohere2": {"sliding_window": 7},
    "Cwm": {"sliding_window": 9},
    "Ernie4_5": {},
    "Exaone4": {"sliding_window": 8},
    "FlexOlmo": {},
    "GPTBigCode": {},
    "Gemma": {},
    "Glm": {},
    "Glm4": {},
    "GraniteMoe": {},
    "Helium": {},
    "HunYuanDenseV1": {},
    "Nemotron": {},
    "Olmo": {},
    "Olmo3": {"sliding_window": 6},
    "Olmoe": {},
    "Persimmon": {},
    "Phi": {},
    "Qwen2Moe": {},
    "SeedOss": {},
    "VaultGemma": {"sliding_window": 10},
}
"""Prefixes of config classes, and what the config has in addition."""

OURS = (
    "gemma2",
    "gemma3",
    "gpt2",
    "gpt-oss",
    "granite",
    "llama-gqa-tied",
    "ministral",
    "mistral-window",
    "mixtral",
    "olmo2",
    "opt",
    "phi3-longrope",
    "pythia",
    "qwen2-windows",
    "qwen3",
    "qwen3-moe",
    "smollm3",
    "stablelm",
    "starcoder2",
)

FAMILIES = (*OURS, *OTHERS)


def small_config(name: str, **fields: object) -> transformers.PreTrainedConfig:
    """The config of class `{name}Config`, small."""
    return getattr(transformers, f"{name}Config")(**(_SMALL | fields))


@cache
def family(name: str) -> transformers.PreTrainedModel:
    """A tiny model of a family, in eager attention; made once."""
    if name in OURS:
        return ready(tiny_models.build(name))
    return redrawn(transformers.AutoModelForCausalLM.from_config(small_config(name, **OTHERS[name])))


def redrawn(model: transformers.PreTrainedModel, seed: int = 0) -> transformers.PreTrainedModel:
    """The model with every parameter drawn anew, at a size that matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1.0 + 0.2 * noise if is_norm else 0.15 * noise)
    return ready(model)


def ready(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Evaluation, eager attention, and no token that ends a text."""
    model.eval().set_attn_implementation("eager")
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


@dataclass(frozen=True)
class Prompts:
    """Random prompts of several lengths, and the same padded on the left."""

    lengths: tuple[int, ...]
    seed: int = 0
    ids: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        ids = [torch.randint(3, 120, (n,), generator=generator).tolist() for n in self.lengths]
        object.__setattr__(self, "ids", ids)

    @property
    def padded(self) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask`, Int64[B, S]."""
        width = max(self.lengths)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in self.ids])
        mask = torch.tensor([[0] * (width - n) + [1] * n for n in self.lengths])
        return {"input_ids": ids, "attention_mask": mask}
