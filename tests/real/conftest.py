"""Real models, and what transformers makes of the same files; everything here skips where a model was not fetched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from real_models import GEMMA3, SMOLLM2, RealModel
from tokenizers import pre_tokenizers

MODELS = {"smollm2": SMOLLM2, "gemma3": GEMMA3}


@dataclass(frozen=True)
class Reference:
    """A model as transformers reads it out of its file, in float32."""

    path: Path
    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase


def path_of(model: RealModel) -> Path:
    """The file of a model; without it the test is skipped."""
    if not model.path.is_file():
        pytest.skip(f"{model.path} is not there; `make models` fetches it")
    return model.path


def reference_tokenizer(path: Path) -> transformers.PreTrainedTokenizerBase:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if path == SMOLLM2.path:
        # What SmolLM2's own tokenizer.json says; transformers 5.23 does not know the name that GGUF has for it, and
        # takes GPT-2's, which differs where digits follow line ends or signs of other scripts (5 of 1000 lines).
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return tokenizer


@pytest.fixture(scope="session", params=MODELS)
def model_path(request) -> Path:
    """The file of each real model."""
    return path_of(MODELS[request.param])


@pytest.fixture(scope="session")
def their_tokenizer(model_path) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer as transformers builds it; for a large vocabulary that takes a while."""
    return reference_tokenizer(model_path)


@pytest.fixture(scope="session")
def reference(model_path, their_tokenizer) -> Reference:
    """The same as transformers has it."""
    options = {"gguf_file": model_path.name, "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path.parent, **options).eval()
    return Reference(model_path, model, their_tokenizer)
