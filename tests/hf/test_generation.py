"""`custom_generate=alisa.hf.generate`: alisa's engine under transformers' processors, criteria and streamers."""

import pytest
import torch
import transformers
from transformers import DynamicCache, TextStreamer

import alisa.hf
from alisa import LLM, SamplingParams
from alisa.config import EngineConfig
from alisa.errors import InputError, ModelError
from tests.hf.families import OURS, Prompts, family, ready
from tests.tiny_models import build

PROMPTS = Prompts((20, 13, 5))
DENSE = EngineConfig(policy="dense")


def generated(model, prompts=PROMPTS, engine_config=DENSE, **options):
    options = {"max_new_tokens": 20, "custom_generate": alisa.hf.generate, "engine_config": engine_config} | options
    return model.generate(**prompts.padded, **options)


@pytest.mark.parametrize("name", OURS)
def test_every_family_of_ours_says_what_transformers_says(name):
    model = family(name)
    assert generated(model).equal(model.generate(**PROMPTS.padded, max_new_tokens=20))


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 9, "eos_token_id": [7, 50, 90]},
        {"eos_token_id": list(range(60))},
        {"bad_words_ids": [[5], [40, 41]]},
        {"max_new_tokens": 1},
        {"num_return_sequences": 1, "suppress_tokens": list(range(3, 60))},
    ],
)
def test_processors_and_ends_are_those_of_transformers(options):
    model = family("llama-gqa-tied")
    expected = model.generate(**PROMPTS.padded, **({"max_new_tokens": 20} | options))
    assert generated(model, **options).equal(expected)


class _EndsAt(transformers.StoppingCriteria):
    def __init__(self, length):
        self.length = length
        self.calls = []

    def __call__(self, input_ids, scores, **kwargs):
        self.calls.append(tuple(input_ids.shape))
        return torch.tensor([row.sum() % 3 == 0 for row in input_ids])


def test_criteria_of_the_user_end_sequences_one_by_one():
    model = family("llama-gqa-tied")
    expected = model.generate(**PROMPTS.padded, max_new_tokens=20, stopping_criteria=[_EndsAt(5)], eos_token_id=119)
    criteria = _EndsAt(5)
    assert generated(model, stopping_criteria=[criteria], eos_token_id=119).equal(expected)
    assert {rows for rows, _ in criteria.calls} > {1}


def test_few_places_serve_many_prompts():
    model, prompts = family("llama-gqa-tied"), Prompts(tuple(range(3, 15)))
    config = EngineConfig(policy="dense", max_num_seqs=2, prefill_chunk=16)
    assert generated(model, prompts, config).equal(model.generate(**prompts.padded, max_new_tokens=20))


@pytest.mark.parametrize("policy", ["sketch", "swa", "h2o"])
def test_a_sparse_policy_says_what_the_offline_face_says(policy, tiny_model):
    prompts, options = Prompts((60, 33, 47)), {"policy": policy, "sparsity": 0.6}
    llm = LLM(tiny_model("llama-gqa-tied"), **options)
    outputs = llm.generate(prompts.ids, SamplingParams(max_tokens=40, ignore_eos=True))
    found = generated(ready(build("llama-gqa-tied")), prompts, EngineConfig(**options), max_new_tokens=40)
    assert found[:, 60:].tolist() == [list(output.token_ids) for output in outputs]


def test_draws_follow_the_seed_and_not_the_company():
    model, options = family("llama-gqa-tied"), {"do_sample": True, "temperature": 1.5, "top_k": 50}

    def drawn(prompts):
        torch.manual_seed(5)
        return generated(model, prompts, **options)[:, max(prompts.lengths) :]

    together = drawn(PROMPTS)
    assert drawn(PROMPTS).equal(together)
    few_places = EngineConfig(policy="dense", max_num_seqs=1)
    torch.manual_seed(5)
    assert generated(model, engine_config=few_places, **options)[:, 20:].equal(together)
    assert not torch.equal(generated(model, **options)[:, 20:], together)


def test_draws_are_as_likely_as_the_model_says():
    model, prompts = family("llama-gqa-tied"), Prompts((6,) * 400)
    prompts.ids[:] = [prompts.ids[0]] * 400
    with torch.no_grad():
        expected = model(torch.tensor(prompts.ids[:1])).logits[0, -1].softmax(dim=-1)
    torch.manual_seed(0)
    engine_config = EngineConfig(policy="dense", max_num_seqs=400)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 1, "engine_config": engine_config}
    counts = torch.bincount(generated(model, prompts, **options)[:, -1], minlength=120)
    likely = expected.topk(5).indices
    spread = (expected * (1 - expected) / 400).sqrt()
    assert ((counts / 400 - expected)[likely].abs() < 4 * spread[likely]).all()


class _Words:
    def decode(self, ids, **options):
        return " ".join(f"w{int(i)}" for i in ids) + " "


def test_streamers_see_the_tokens(capsys):
    model, prompt = family("llama-gqa-tied"), Prompts((9,))
    said = generated(model, prompt, max_new_tokens=6, token_streamer=TextStreamer(_Words(), skip_prompt=True))
    assert capsys.readouterr().out.split() == [f"w{i}" for i in said[0, 9:].tolist()]


def test_one_decoder_serves_many_calls_and_shares_what_it_can():
    model = family("llama-gqa-tied")
    engine = alisa.hf.EngineGenerate(model, DENSE)
    assert engine._loaded.decoder._embed.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    expected = model.generate(**PROMPTS.padded, max_new_tokens=20)
    for _ in range(2):
        assert model.generate(**PROMPTS.padded, max_new_tokens=20, custom_generate=engine).equal(expected)


def test_a_dictionary_comes_out_where_one_is_wanted():
    model = family("llama-gqa-tied")
    found = generated(model, return_dict_in_generate=True)
    assert found.sequences.equal(generated(model))


def test_other_families_are_refused():
    with pytest.raises(ModelError, match="'cohere' are not supported"):
        generated(family("Cohere"))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"num_beams": 2}, "beams"),
        ({"output_scores": True, "return_dict_in_generate": True}, "scores"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "attention weights"),
        ({"prefix_allowed_tokens_fn": lambda batch_id, ids: [5, 6]}, "the place in the batch"),
        ({"max_new_tokens": 200}, "lower max_new_tokens"),
    ],
)
def test_other_ways_of_generating_are_refused(options, why):
    with pytest.raises(InputError, match=why):
        generated(family("llama-gqa-tied"), **options)


def test_earlier_tokens_and_embeddings_are_refused():
    model, prompt = family("llama-gqa-tied"), Prompts((9,))
    cache = DynamicCache(config=model.config)
    model.generate(**prompt.padded, past_key_values=cache, max_new_tokens=2)
    longer = Prompts((12,))
    with pytest.raises(InputError, match="a cache of earlier tokens"):
        generated(model, longer, past_key_values=cache)
    embeds = model.get_input_embeddings()(torch.tensor(prompt.ids)).detach()
    with pytest.raises(InputError, match="embeddings"):
        model.generate(inputs_embeds=embeds, max_new_tokens=2, custom_generate=alisa.hf.generate)


@pytest.mark.parametrize(
    ("mask", "why"), [([1] * 6 + [0] * 2, "pad on the left"), ([0] * 8, "sequence 1 .* all padding")]
)
def test_padding_that_is_not_before_a_sequence_is_refused(mask, why):
    prompt = torch.tensor(Prompts((8,)).ids)
    with pytest.raises(InputError, match=why):
        family("llama-gqa-tied").generate(
            prompt, attention_mask=torch.tensor([mask]), max_new_tokens=2, custom_generate=alisa.hf.generate
        )
