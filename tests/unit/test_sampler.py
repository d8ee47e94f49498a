"""Sampling rules one by one, and that a request's draws are its own."""

from collections import Counter

import pytest
import torch

from alisa.config import SamplingParams
from alisa.engine.sampler import sample, uniform

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])


def draws(params, count=4000, logits=LOGITS):
    return Counter(sample(logits[None].clone(), [params], [[]], [i])[0] for i in range(count))


def test_greedy_takes_the_likeliest():
    assert sample(LOGITS[None].clone(), [SamplingParams()], [[]], [0]) == [4]


def test_temperature_draws_from_the_softmax():
    counts = draws(SamplingParams(temperature=0.7, seed=3))
    for token, expected in enumerate((LOGITS / 0.7).softmax(0).tolist()):
        # five standard deviations of a binomial of 4000 draws
        assert abs(counts[token] / 4000 - expected) < 5 * (expected * (1 - expected) / 4000) ** 0.5 + 1e-9


@pytest.mark.parametrize(
    ("rules", "allowed"),
    [
        ({"top_k": 1}, {4}),
        ({"top_k": 3}, {4, 0, 1}),
        ({"top_k": 50}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.6}, {4}),  # 0.64 alone passes 0.6
        ({"top_p": 0.7}, {4, 0}),
        ({"min_p": 0.3}, {4, 0}),  # exp(-1) = 0.37 of the likeliest, exp(-2) = 0.14
        ({"top_k": 3, "min_p": 0.3}, {4, 0}),
    ],
)
def test_filters_keep_exactly_their_tokens(rules, allowed):
    assert set(draws(SamplingParams(temperature=1.0, seed=5, **rules))) == allowed


def test_repetition_penalty_lowers_seen_tokens_of_both_signs():
    logits = torch.tensor([[2.0, -1.0, 1.5]])
    sample(logits, [SamplingParams(repetition_penalty=2.0)], [[0, 1, 0]], [0])
    assert logits.tolist() == [[1.0, -2.0, 1.5]]


def test_draws_do_not_depend_on_the_company():
    rules = SamplingParams(temperature=1.0, seed=11)
    alone = [sample(LOGITS[None].clone(), [rules], [[]], [i])[0] for i in range(50)]
    other = SamplingParams(temperature=2.0, seed=12)
    together = [
        sample(LOGITS.repeat(3, 1), [other, rules, SamplingParams()], [[]] * 3, [7, i, 0])[1] for i in range(50)
    ]
    assert alone == together
    assert len(set(alone)) > 1


def test_seeds_and_counters_give_different_numbers():
    assert len({uniform(seed, counter) for seed in range(20) for counter in range(20)}) == 400
    assert uniform(1, 2) == uniform(1, 2)
