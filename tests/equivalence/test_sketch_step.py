"""Whether a layer of a sketch's step is one native call or many changes no token, and where it can be one, it is."""

import pytest
import torch

from alisa import LLM, SamplingParams
from alisa.kernels.native import library
from alisa.kernels.native.sketch_step import CpuRunningStep
from tests.combinations import each

pytestmark = pytest.mark.skipif(not library.available(), reason=library.unavailable_reason())
LENGTHS = (3, 41, 17, 60)
NEW_TOKENS = 30


@pytest.fixture
def layers_run(monkeypatch):
    """Layers that have run in one call."""
    found = []
    whole = CpuRunningStep.__call__
    monkeypatch.setattr(
        CpuRunningStep, "__call__", lambda self, layer, *rest: (found.append(layer), whole(self, layer, *rest))[1]
    )
    return found


def tokens_of(directory, **options):
    sizes = {"max_num_seqs": len(LENGTHS), "max_model_len": max(LENGTHS) + NEW_TOKENS, "dtype": "float32"}
    with LLM(directory, sparsity=0.7, **sizes, **options) as llm:
        generator = torch.Generator().manual_seed(5)
        size = llm.spec.vocab_size
        prompts = [torch.randint(3, size, (length,), generator=generator).tolist() for length in LENGTHS]
        outputs = llm.generate(prompts, SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True))
        return [output.token_ids for output in outputs], llm.spec


@each(
    2,
    family=["opt", "llama-gqa-tied", "gemma3"],
    policy=["sketch", "sketch-head"],
    kv_dtype=["float32", "bfloat16", "int8", "int4"],
    speculative=["off", "lookup"],
)
def test_one_call_changes_no_token(family, policy, kv_dtype, speculative, tiny_model, layers_run, monkeypatch):
    options = {"policy": policy, "kv_dtype": kv_dtype, "speculative": speculative}
    found, spec = tokens_of(tiny_model(family), **options)
    full = [layer for layer in range(spec.num_layers) if spec.attention.window(layer) is None]
    assert set(layers_run) == set(range(len(full)))
    layers_run.clear()
    monkeypatch.setattr("alisa.kernels.choose.CpuSketchStep", lambda: None)
    assert tokens_of(tiny_model(family), **options)[0] == found
    assert not layers_run


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "sketch", "coverage": 0.9},
        {"policy": "sketch-mean"},
        {"policy": "dense"},
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()),
)
def test_other_steps_are_many_calls(options, tiny_model, layers_run):
    """How much is read is not known before, all is read, or a mean stands in for the rest."""
    tokens_of(tiny_model("llama-gqa-tied"), **options)
    assert not layers_run
