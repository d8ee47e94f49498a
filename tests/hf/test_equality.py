"""With the dense policy an attached model says what it says in eager attention, token for token."""

import copy

import pytest
import torch
from transformers import DynamicCache, TextStreamer

import alisa.hf
from tests.hf.families import FAMILIES, OTHERS, Prompts, family

PROMPTS = Prompts((20, 13, 5))

WAYS = {
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "many": {"do_sample": True, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 6},
    "chunks of one": {"prefill_chunk_size": 1},
    "penalty": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
}


def generate(model, prompts=PROMPTS, max_new_tokens=20, **options):
    torch.manual_seed(3)
    return model.generate(**prompts.padded, max_new_tokens=max_new_tokens, **options)


def attached(model, prompts=PROMPTS, **options):
    with alisa.hf.attach(model, policy="dense", max_model_len=128):
        return generate(model, prompts, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_says_the_same_in_a_padded_batch(name):
    model = family(name)
    assert attached(model).equal(generate(model))


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_generating_gives_the_same(way):
    model = family("llama-gqa-tied")
    assert attached(model, **WAYS[way]).equal(generate(model, **WAYS[way]))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_way_of_generating_gives_the_same_in_every_family(name, way):
    model = family(name)
    assert attached(model, **WAYS[way]).equal(generate(model, **WAYS[way]))


def test_families_are_more_than_ours():
    assert len(FAMILIES) >= 25
    assert len(OTHERS) >= 25


@pytest.mark.parametrize("num_beams", [1, 2, 3, 4])
def test_beams_keep_their_scores(num_beams):
    model = family("llama-gqa-tied")
    options = {"num_beams": num_beams, "return_dict_in_generate": True, "output_scores": True}
    expected, found = generate(model, **options), attached(model, **options)
    assert found.sequences.equal(expected.sequences)
    torch.testing.assert_close(found.scores[-1], expected.scores[-1], rtol=1e-3, atol=1e-3)


def test_prompt_lookup_gives_what_greedy_gives():
    model, prompt = family("llama-gqa-tied"), Prompts((20,))
    assert attached(model, prompt, prompt_lookup_num_tokens=3).equal(generate(model, prompt))


def test_an_assistant_gives_what_greedy_gives():
    model, assistant, prompt = family("llama-gqa-tied"), family("Arcee"), Prompts((20,))
    assert attached(model, prompt, assistant_model=assistant).equal(generate(model, prompt))


def test_the_batch_says_what_each_prompt_says_alone():
    model = family("qwen2-windows")
    together = attached(model)
    for index, ids in enumerate(PROMPTS.ids):
        with alisa.hf.attach(model, policy="dense"):
            alone = model.generate(torch.tensor([ids]), max_new_tokens=20)
        assert alone[0, len(ids) :].equal(together[index, 20:])


def test_a_forward_pass_has_the_logits_of_eager_attention():
    model, inputs = family("gemma2"), PROMPTS.padded
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs).logits
        with alisa.hf.attach(model, policy="dense"):
            found = model(**inputs).logits
    torch.testing.assert_close(found[real], expected[real], rtol=1e-3, atol=1e-3)


def test_a_conversation_goes_on():
    model, first = family("llama-gqa-tied"), Prompts((12,))
    turn = torch.randint(3, 120, (1, 7), generator=torch.Generator().manual_seed(8))

    def talk(cache):
        said = model.generate(torch.tensor(first.ids), past_key_values=cache, max_new_tokens=9)
        longer = torch.cat((said, turn), dim=1)
        return model.generate(longer, past_key_values=cache, max_new_tokens=9)

    expected = talk(DynamicCache(config=model.config))
    with alisa.hf.attach(model, policy="dense") as cache_factory:
        assert talk(cache_factory()).equal(expected)


@pytest.mark.parametrize("policy", ["dense", "sketch", "swa", "h2o", "sketch-mean", "local"])
def test_a_text_that_is_broken_off_goes_on_as_if_it_were_not(policy):
    model, prompt = family("llama-gqa-tied"), torch.tensor(Prompts((40,)).ids)
    with alisa.hf.attach(model, policy=policy, sparsity=0.6) as cache_factory:
        whole, cache = model.generate(prompt, max_new_tokens=40), cache_factory()
        begun = model.generate(prompt, past_key_values=cache, max_new_tokens=15)
        everything = torch.ones_like(begun)  # a token that was said may be that for padding
        rest = model.generate(begun, attention_mask=everything, past_key_values=cache, max_new_tokens=25)
        assert rest.equal(whole)


@pytest.mark.parametrize("policy", ["dense", "sketch", "sketch-mean"])
def test_a_copied_prefix_serves_several_prompts(policy):
    model, prefix = family("llama-gqa-tied"), Prompts((30,)).ids[0]
    with alisa.hf.attach(model, policy=policy, sparsity=0.5) as cache_factory, torch.no_grad():
        shared = cache_factory()
        model(torch.tensor([prefix]), past_key_values=shared)
        for seed in (5, 6):
            prompt = torch.tensor([prefix + Prompts((9,), seed).ids[0]])
            own = copy.deepcopy(shared)
            found = model.generate(prompt, past_key_values=own, max_new_tokens=30)
            assert found.equal(model.generate(prompt, max_new_tokens=30))
        assert shared.get_seq_length() == len(prefix)


def test_only_the_new_tokens_may_be_passed_with_the_whole_mask():
    model, prompt = family("llama-gqa-tied"), torch.tensor(Prompts((20,)).ids)
    with alisa.hf.attach(model, policy="dense") as cache_factory, torch.no_grad():
        cache = cache_factory()
        model(prompt[:, :12], past_key_values=cache)
        mask = torch.ones_like(prompt)
        found = model.generate(prompt[:, 12:], attention_mask=mask, past_key_values=cache, max_new_tokens=9)
        assert found[:, 8:].equal(model.generate(prompt, max_new_tokens=9)[:, 20:])


def test_embeddings_may_take_the_place_of_ids():
    model, prompts = family("llama-gqa-tied"), Prompts((14, 9))
    inputs = prompts.padded
    embeds = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}
    embeds["attention_mask"] = inputs["attention_mask"]
    expected = model.generate(**embeds, max_new_tokens=12)
    with alisa.hf.attach(model, policy="dense"):
        assert model.generate(**embeds, max_new_tokens=12).equal(expected)


def test_two_models_run_in_turns():
    one, two = family("llama-gqa-tied"), family("gemma3")
    expected = [generate(model) for model in (one, two)]
    with alisa.hf.attach(one, policy="dense"), alisa.hf.attach(two, policy="dense"):
        assert [generate(model).tolist() for model in (one, two, one)] == [
            expected[index].tolist() for index in (0, 1, 0)
        ]


class _Words:
    def decode(self, ids, **options):
        return " ".join(f"w{int(i)}" for i in ids) + " "


def test_streamers_see_the_tokens(capsys):
    model, prompt = family("llama-gqa-tied"), torch.tensor(Prompts((9,)).ids)
    with alisa.hf.attach(model, policy="dense"):
        said = model.generate(prompt, max_new_tokens=6, streamer=TextStreamer(_Words(), skip_prompt=True))
    assert capsys.readouterr().out.split() == [f"w{i}" for i in said[0, 9:].tolist()]
