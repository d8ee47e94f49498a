"""Real models, and what transformers makes of the same files; everything here skips where a model was not fetched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from real_models import GEMMA3, SMOLLM2, RealModel
from tokenizers import pre_tokenizers


@dataclass(frozen=True)
class Reference:
    """A model as transformers reads it out of the file, in float32."""

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


def reference(path: Path) -> Reference:
    options = {"gguf_file": path.name, "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, **options).eval()
    return Reference(model, reference_tokenizer(path))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return path_of(SMOLLM2)


@pytest.fixture(scope="session")
def gemma3() -> Path:
    return path_of(GEMMA3)


@pytest.fixture(scope="session")
def smollm2_reference(smollm2) -> Reference:
    return reference(smollm2)
