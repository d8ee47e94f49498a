"""A sparse policy gives what alisa's own engine gives; company and caps change nothing."""

import copy

import pytest
import torch

import alisa.hf
from alisa import LLM, SamplingParams
from alisa.errors import InputError
from alisa.outputs import Medium
from alisa.policy.registry import POLICIES
from tests.caps import device_cap
from tests.combinations import each
from tests.hf.families import Prompts, ready
from tests.tiny_models import build

PROMPTS = Prompts((60, 33, 47))
NEW = 40


def said(model, prompts=PROMPTS, **options):
    width = max(prompts.lengths)
    return model.generate(**prompts.padded, max_new_tokens=NEW, **options)[:, width:].tolist()


def said_by_engine(directory, **options):
    params = SamplingParams(max_tokens=NEW, ignore_eos=True)
    return [list(output.token_ids) for output in LLM(directory, **options).generate(PROMPTS.ids, params)]


@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_are_those_of_the_engine(policy, tiny_model):
    model, options = ready(build("llama-gqa-tied")), {"policy": policy, "sparsity": 0.6}
    with alisa.hf.attach(model, **options):
        assert said(model) == said_by_engine(tiny_model("llama-gqa-tied"), **options)


@each(name=["gemma3", "qwen2-windows", "gpt2", "granite", "gpt-oss"], policy=["sketch", "swa"])
def test_tokens_are_those_of_the_engine_with_windows_and_scales(name, policy, tiny_model):
    model, options = ready(build(name)), {"policy": policy, "sparsity": 0.7}
    with alisa.hf.attach(model, **options):
        assert said(model) == said_by_engine(tiny_model(name), **options)


@pytest.mark.parametrize("kv_dtype", ["int8", "int4", "bfloat16"])
def test_rows_may_be_kept_in_few_bits_as_in_the_engine(kv_dtype, tiny_model):
    model, options = ready(build("llama-gqa-tied")), {"policy": "sketch", "sparsity": 0.5, "kv_dtype": kv_dtype}
    with alisa.hf.attach(model, **options):
        assert said(model) == said_by_engine(tiny_model("llama-gqa-tied"), **options)


@pytest.mark.parametrize("coverage", [0.5, 0.9])
def test_a_coverage_reads_as_in_the_engine(coverage, tiny_model):
    model, options = ready(build("llama-gqa-tied")), {"policy": "sketch", "sparsity": 0.5, "coverage": coverage}
    with alisa.hf.attach(model, **options):
        assert said(model) == said_by_engine(tiny_model("llama-gqa-tied"), **options)


def test_a_coverage_without_a_sketch_is_refused():
    options = {"policy": "swa", "coverage": 0.9}
    with pytest.raises(InputError, match="coverage"), alisa.hf.attach(build("gpt2"), **options):
        pass


@pytest.mark.parametrize(
    ("given", "stands_for"),
    [
        ({"quality": "exact"}, {"policy": "dense"}),
        ({"quality": "high"}, {"policy": "sketch", "sparsity": 0.9, "kv_dtype": "int8"}),
        ({"quality": "balanced", "sparsity": 0.5}, {"policy": "sketch", "sparsity": 0.5, "kv_dtype": "k8v4"}),
        ({}, {"policy": "sketch", "sparsity": 0.8, "kv_dtype": "auto"}),
    ],
)
def test_a_quality_stands_for_its_options(given, stands_for, tiny_model):
    model = ready(build("llama-gqa-tied"))
    with alisa.hf.attach(model, **given):
        assert said(model) == said_by_engine(tiny_model("llama-gqa-tied"), **stands_for)


def test_a_quality_that_is_unknown_is_refused():
    with pytest.raises(InputError, match="quality 'best' is unknown"), alisa.hf.attach(build("gpt2"), quality="best"):
        pass


@pytest.mark.parametrize("policy", ["sketch", "swa", "h2o", "sketch-head"])
def test_a_batch_says_what_each_prompt_says_alone(policy):
    model = ready(build("llama-gqa-tied"))
    with alisa.hf.attach(model, policy=policy, sparsity=0.7):
        together = said(model)
        for ids, expected in zip(PROMPTS.ids, together, strict=True):
            alone = model.generate(torch.tensor([ids]), max_new_tokens=NEW)
            assert alone[0, len(ids) :].tolist() == expected


@pytest.mark.parametrize("policy", POLICIES)
def test_a_copy_goes_on_as_its_original_does(policy):
    model, inputs = ready(build("llama-gqa-tied")), PROMPTS.padded
    with alisa.hf.attach(model, policy=policy, sparsity=0.7) as cache_factory:
        cache = cache_factory()
        begun = model.generate(**inputs, past_key_values=cache, max_new_tokens=10)
        inputs = {
            "input_ids": begun,
            "attention_mask": torch.cat((inputs["attention_mask"], torch.ones(3, 10, dtype=torch.int64)), dim=1),
        }
        twin = copy.deepcopy(cache)
        expected = model.generate(**inputs, past_key_values=cache, max_new_tokens=30)
        assert model.generate(**inputs, past_key_values=twin, max_new_tokens=30).equal(expected)


@each(policy=["sketch", "swa", "h2o"], chunk=[1, 7, 32])
def test_chunks_of_a_prompt_change_nothing(policy, chunk):
    model = ready(build("llama-gqa-tied"))
    with alisa.hf.attach(model, policy=policy, sparsity=0.7):
        assert said(model, prefill_chunk_size=chunk) == said(model)


@each(policy=["dense", "sketch", "swa", "h2o"], num_beams=[1, 3])
def test_caps_change_nothing(policy, num_beams, tiny_model):
    sizes = {"max_num_seqs": 3 * num_beams, "max_model_len": 110}
    model, options = ready(build("llama-gqa-tied")), {"policy": policy, "sparsity": 0.6} | sizes
    with alisa.hf.attach(model, **options) as cache_factory:
        expected = said(model, num_beams=num_beams)
        assert cache_factory.kv_bytes(Medium.DISK) == 0
    cap = device_cap(LLM(tiny_model("llama-gqa-tied"), **options), 90 * num_beams)
    with alisa.hf.attach(model, **options, kv_device_memory=cap) as cache_factory:
        cache = cache_factory()
        assert said(model, num_beams=num_beams, past_key_values=cache) == expected
        assert cache_factory.kv_bytes(Medium.DISK) > 0
        assert cache_factory.kv_bytes() + cache_factory.state_bytes <= cap
