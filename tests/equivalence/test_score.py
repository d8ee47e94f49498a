"""Teacher-forced scoring in batches that fit the cap: the same numbers, whatever the batches."""

from bisect import bisect_left
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alisa import LLM, SamplingParams
from alisa.cache.codec import make_codec
from alisa.errors import CapacityError
from alisa.lab import scoring as score
from alisa.lab import verify
from alisa.lab.scoring import ScoredItem, Scorer
from alisa.lab.verify import verify_outputs
from alisa.policy.dense import Dense
from alisa.policy.registry import make_policy
from alisa.spec import RowFormat

LENGTHS = ((3, 40), (41, 20), (17, 33), (60, 12), (33, 1))


def make_items(vocab_size):
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, vocab_size, (prompt + out,), generator=generator).tolist() for prompt, out in LENGTHS]
    return [ScoredItem(tokens[:prompt], tokens[prompt:]) for tokens, (prompt, _) in zip(ids, LENGTHS, strict=True)]


def float_codec(llm):
    return make_codec(RowFormat("float32", llm.spec.num_kv_heads, llm.spec.head_dim))


def smallest_cap(llm, item, codec, policy):
    scorer = Scorer.of(llm)
    return bisect_left(
        range(1 << 24), True, key=lambda cap: replace(scorer, kv_cap_bytes=cap).fits(item, codec, policy)
    )


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(50, 200), st.integers(1, 7))
def test_groups_hold_everything_once_and_keep_both_limits(sizes, most, most_items):
    found = list(score.groups(range(len(sizes)), sizes, most, most_items))
    assert [index for group in found for index in group] == list(range(len(sizes)))
    assert all(len(group) <= most_items and sum(sizes[index] for index in group) <= most for group in found)


@pytest.mark.parametrize("policy", ["dense", "swa", "sketch"])
def test_batches_under_a_tight_cap_change_no_likelihood(policy, tiny_model):
    directory = tiny_model("llama-gqa-tied")
    free = LLM(directory, dtype="float32", prefill_chunk=50)
    items = make_items(free.spec.vocab_size)
    chosen, codec = make_policy(policy, 0.5), float_codec(free)
    cap = smallest_cap(free, max(items, key=lambda item: item.num_tokens), codec, chosen)
    tight = LLM(directory, dtype="float32", prefill_chunk=50, kv_device_memory=cap)
    assert len(list(Scorer.of(tight).batches(items, codec, chosen))) > len(
        list(Scorer.of(free).batches(items, codec, chosen))
    )
    for one, other in zip(
        Scorer.of(free).score(chosen, codec, items), Scorer.of(tight).score(chosen, codec, items), strict=True
    ):
        torch.testing.assert_close(one.log_likelihoods, other.log_likelihoods, rtol=0, atol=1e-4)
        assert one.greedy.tolist() == other.greedy.tolist()


def test_an_item_that_can_never_fit_is_refused_with_its_size(tiny_model):
    llm = LLM(tiny_model("llama"), dtype="float32", kv_device_memory=10 * 3 * 2 * 4 * 16 * 4)
    with pytest.raises(CapacityError, match=r"Scoring 72 tokens needs .* and the cap is 15.0 KiB"):
        Scorer.of(llm).score(Dense(), float_codec(llm), make_items(llm.spec.vocab_size))


def test_verify_is_the_same_in_small_samples_and_never_holds_more_rows_than_the_cap(tiny_model, monkeypatch):
    directory = tiny_model("llama")
    free = LLM(directory, dtype="float32", sparsity=0.5)
    prompts = [item.prompt_ids for item in make_items(free.spec.vocab_size)]
    outputs = free.generate(prompts, SamplingParams(max_tokens=24, ignore_eos=True))
    expected = verify_outputs(free, outputs, num_samples=5)
    assert (expected.num_requests, expected.num_tokens) == (5, 5 * 24)
    assert 0 < expected.mean_kl < 10

    open_rows = []
    make_store = score.KVStore
    monkeypatch.setattr(
        score, "KVStore", lambda **options: open_rows.append(options["num_rows"]) or make_store(**options)
    )
    most_rows = 60 + 24
    cap = smallest_cap(free, ScoredItem([3] * 60, [3] * 24), float_codec(free), free.policy)
    tight = LLM(directory, dtype="float32", sparsity=0.5, kv_device_memory=cap)
    # 30 distributions at a time: fewer than any two outputs have
    monkeypatch.setattr(verify, "KEPT_BYTES", 30 * 4 * free.spec.vocab_size)
    found = verify_outputs(tight, outputs, num_samples=5)
    assert len(open_rows) == 2 * 5
    assert max(open_rows) <= most_rows
    assert (found.num_requests, found.num_tokens) == (5, 5 * 24)
    assert found.top1_agreement == expected.top1_agreement
    assert found.mean_kl == pytest.approx(expected.mean_kl, rel=1e-3)
    assert found.lost_mass == pytest.approx(expected.lost_mass, rel=1e-3)


def test_verify_compares_a_very_long_output_as_far_as_it_keeps_distributions(tiny_model, monkeypatch):
    llm = LLM(tiny_model("llama"), policy="dense", dtype="float32")
    outputs = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=40, ignore_eos=True))
    monkeypatch.setattr(verify, "KEPT_BYTES", 10 * 4 * llm.spec.vocab_size)
    report = verify_outputs(llm, outputs)
    assert (report.num_tokens, report.top1_agreement, report.lost_mass) == (10, 1.0, 0.0)
    assert report.mean_kl == pytest.approx(0, abs=1e-6)
