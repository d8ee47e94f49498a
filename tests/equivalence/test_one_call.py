"""Whether a step is one native call, one for each layer or many changes nothing, and where it can be one, it is."""

import pytest
import torch

from alisa import LLM, SamplingParams
from alisa.attention.session import KVSession
from alisa.kernels.native import library
from alisa.kernels.native.kernels import CpuKernels
from alisa.kernels.native.sketch_step import CpuRunningStep, CpuSketchSteps
from tests.combinations import each

pytestmark = pytest.mark.skipif(not library.available(), reason=library.unavailable_reason())
LENGTHS = (3, 41, 17, 60)
NEW_TOKENS = 30


class Calls:
    """What has run in native calls."""

    def __init__(self):
        self.layers = []
        """Numbers of the layers that were calls of their own."""
        self.steps = []
        """How many layers of a step by a sketch were one call together."""
        self.fixed = []
        """The same of a step that reads alike in all layers."""

    def clear(self):
        for each_of in (self.layers, self.steps, self.fixed):
            each_of.clear()


@pytest.fixture
def calls(monkeypatch):
    found = Calls()
    layer, step = CpuRunningStep.__call__, CpuSketchSteps.in_all_layers

    def one_layer(self, number, *rest):
        found.layers.append(number)
        return layer(self, number, *rest)

    def all_layers(self, running, of_layer, *rest):
        found.steps.append(len(of_layer))
        return step(self, running, of_layer, *rest)

    fixed = CpuKernels.in_all_layers

    def all_alike(self, layers, *rest):
        found.fixed.append(len(layers))
        return fixed(self, layers, *rest)

    monkeypatch.setattr(CpuKernels, "in_all_layers", all_alike)
    monkeypatch.setattr(CpuRunningStep, "__call__", one_layer)
    monkeypatch.setattr(CpuSketchSteps, "in_all_layers", all_layers)
    return found


def answers_of(directory, **options):
    """Tokens and their exact log probabilities."""
    sizes = {"max_num_seqs": len(LENGTHS), "max_model_len": max(LENGTHS) + NEW_TOKENS, "dtype": "float32"}
    with LLM(directory, sparsity=0.7, **sizes, **options) as llm:
        generator = torch.Generator().manual_seed(5)
        size = llm.spec.vocab_size
        prompts = [torch.randint(3, size, (length,), generator=generator).tolist() for length in LENGTHS]
        outputs = llm.generate(prompts, SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=1))
        return [(output.token_ids, output.logprobs) for output in outputs], llm.spec


@each(
    2,
    family=["opt", "llama-gqa-tied", "gemma3"],
    policy=["sketch", "sketch-head"],
    kv_dtype=["float32", "bfloat16", "int8", "int4"],
    speculative=["off", "lookup"],
)
def test_one_call_changes_nothing(family, policy, kv_dtype, speculative, tiny_model, calls, monkeypatch):
    options = {"policy": policy, "kv_dtype": kv_dtype, "speculative": speculative}
    found, spec = answers_of(tiny_model(family), **options)
    full = [layer for layer in range(spec.num_layers) if spec.attention.window(layer) is None]
    if len(full) == spec.num_layers and kv_dtype != "int4":
        assert set(calls.steps) == {spec.num_layers}
        assert not calls.layers
    else:  # windows are not the policy's, and a basis of the rows is turned into between the layers
        assert set(calls.layers) == set(range(len(full)))
        assert not calls.steps
    calls.clear()
    with monkeypatch.context() as patched:
        patched.setattr(KVSession, "attend_all", None)
        assert answers_of(tiny_model(family), **options)[0] == found
    assert set(calls.layers) == set(range(len(full)))
    calls.clear()
    monkeypatch.setattr("alisa.kernels.choose.CpuSketchStep", lambda: None)
    assert answers_of(tiny_model(family), **options)[0] == found
    assert not calls.layers
    assert not calls.steps


@each(
    2,
    family=["opt", "llama-gqa-tied", "gemma3"],
    policy=["dense", "local", "streaming"],
    kv_dtype=["float32", "bfloat16", "int8", "int4"],
    speculative=["off", "lookup"],
)
def test_one_call_of_a_step_that_reads_alike_changes_nothing(
    family, policy, kv_dtype, speculative, tiny_model, calls, monkeypatch
):
    options = {"policy": policy, "kv_dtype": kv_dtype, "speculative": speculative}
    found, spec = answers_of(tiny_model(family), **options)
    whole = not any(spec.attention.windows) and kv_dtype != "int4"
    assert set(calls.fixed) == ({spec.num_layers} if whole else set())
    calls.clear()
    monkeypatch.setattr(KVSession, "attend_all", None)
    assert answers_of(tiny_model(family), **options)[0] == found
    assert not calls.fixed


def test_a_policy_that_keeps_tokens_hears_of_those_that_others_read(tiny_model, calls):
    """Drafts: what dense attention verifies, in many calls, is in the sketch when the next draft is made."""
    answers_of(tiny_model("llama-gqa-tied"), policy="sketch", exact=True)
    assert not calls.fixed


def test_steps_that_go_either_way_under_a_cap_give_the_same(tiny_model):
    """Some with all of their rows on the device, some with rows elsewhere."""
    found, capped = (
        answers_of(tiny_model("llama-gqa-tied"), policy="dense", **sizes)[0]
        for sizes in ({}, {"kv_device_memory": "28KiB", "kv_disk_memory": "1GiB"})
    )
    assert capped == found


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "sketch", "coverage": 0.9},
        {"policy": "sketch-mean"},
        {"policy": "swa"},
        {"policy": "h2o"},
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()),
)
def test_other_steps_are_many_calls(options, tiny_model, calls):
    """How much is read is not known before, a mean stands in for the rest, or history decides."""
    answers_of(tiny_model("llama-gqa-tied"), **options)
    assert not [*calls.layers, *calls.steps, *calls.fixed]
