"""Sampling rules one by one, and that a request's draws are its own."""

from collections import Counter

import pytest
import torch

from alisa.config import SamplingParams
from alisa.engine.sampler import SampledRow, sample, uniform

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])


def draw(logits, params, token_ids=(), **row):
    """The token that one row of logits gives."""
    return sample(logits[None].clone(), [SampledRow(params, list(token_ids), **row)]).token_ids[0]


def draws(params, count=4000, logits=LOGITS):
    return Counter(draw(logits, params, num_output=i) for i in range(count))


def test_greedy_takes_the_likeliest():
    assert draw(LOGITS, SamplingParams()) == 4


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


RULES = [
    {},
    {"top_p": 0.95},
    {"top_p": 0.999999},
    {"min_p": 0.02},
    {"min_p": 1e-6, "top_p": 0.9999},
    {"top_k": 40},
    {"top_k": 1500},
    {"top_k": 1500, "top_p": 0.99},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("num_tokens", [1000, 1024, 1025, 5000])
@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
def test_draws_are_those_of_the_sorted_vocabulary(rules, num_tokens, spread):
    # Most draws from a flat distribution fall beyond the tokens that are looked at first.
    logits = spread * torch.randn(num_tokens, generator=torch.Generator().manual_seed(num_tokens))
    params = SamplingParams(temperature=0.8, seed=7, **rules)
    expected = [sorted_draw(logits, params, uniform(7, counter)) for counter in range(40)]
    assert [draw(logits, params, num_output=counter) for counter in range(40)] == expected
    assert spread > 1 or len(set(expected)) > 5


def sorted_draw(logits, params, number):
    """Inverse of the cumulative distribution over all tokens, in the order of their likelihood."""
    order = logits.sort(descending=True).indices[: params.top_k or None]
    probs = (logits[order].double() / params.temperature).softmax(0)
    kept = (probs.cumsum(0) - probs < params.top_p) & (probs >= params.min_p * probs[0])
    probs = probs[kept] / probs[kept].sum()
    return int(order[int((probs.cumsum(0) <= number).sum())])


def test_repetition_penalty_lowers_seen_tokens_of_both_signs():
    logits = torch.tensor([[2.0, -1.0, 1.5]])
    sample(logits, [SampledRow(SamplingParams(repetition_penalty=2.0), [0, 1, 0])])
    assert logits.tolist() == [[1.0, -2.0, 1.5]]


def test_draws_do_not_depend_on_the_company():
    rules = SamplingParams(temperature=1.0, seed=11)
    alone = [draw(LOGITS, rules, num_output=i) for i in range(50)]
    other = SamplingParams(temperature=2.0, seed=12)
    together = [
        sample(
            LOGITS.repeat(3, 1), [SampledRow(other, [], 7), SampledRow(rules, [], i), SampledRow(SamplingParams(), [])]
        ).token_ids[1]
        for i in range(50)
    ]
    assert alone == together
    assert len(set(alone)) > 1


def test_seeds_and_counters_give_different_numbers():
    assert len({uniform(seed, counter) for seed in range(20) for counter in range(20)}) == 400
    assert uniform(1, 2) == uniform(1, 2)


def plainly_adjusted(logits, rules, token_ids, num_output):
    """The logits that are drawn from, token by token."""
    found = logits.tolist()
    for token, bias in rules.logit_bias:
        found[token] += bias
    output = list(token_ids)[len(token_ids) - num_output :]
    for token in range(len(found)):
        if token in token_ids and rules.repetition_penalty != 1:
            found[token] *= rules.repetition_penalty if found[token] <= 0 else 1 / rules.repetition_penalty
        found[token] -= rules.frequency_penalty * output.count(token)
        found[token] -= rules.presence_penalty * (token in output)
    return torch.tensor(found)


@pytest.mark.parametrize(
    "rules",
    [
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.75},
        {"frequency_penalty": -2.0, "presence_penalty": 2.0},
        {"logit_bias": {0: 1.25, 3: -100}},
        {"logit_bias": {4: -3}, "presence_penalty": -1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
    ],
)
@pytest.mark.parametrize(("token_ids", "num_output"), [([], 0), ([4, 4], 0), ([1, 4, 0, 0, 0, 2, 4], 5)])
def test_what_changes_logits_is_the_plain_arithmetic(rules, token_ids, num_output):
    params = SamplingParams(**rules)
    logits = torch.stack([LOGITS, LOGITS])
    sample(logits, [SampledRow(SamplingParams(), token_ids, num_output), SampledRow(params, token_ids, num_output)])
    torch.testing.assert_close(logits[0], LOGITS, rtol=0, atol=0)
    # a few roundings of numbers up to 100
    torch.testing.assert_close(logits[1], plainly_adjusted(LOGITS, params, token_ids, num_output), rtol=1e-6, atol=1e-5)


def test_no_end_comes_before_the_least_number_of_tokens():
    rules, ends = SamplingParams(min_tokens=3), frozenset((4, 0))
    chosen = [draw(LOGITS, rules, [7] * num, num_output=num, end_ids=ends) for num in range(5)]
    assert chosen == [1, 1, 1, 4, 4]


@pytest.mark.parametrize("temperature", [0, 1])
def test_log_probabilities_are_those_of_the_plain_logits(temperature):
    rules = SamplingParams(logprobs=3, temperature=temperature, logit_bias={2: 50}, presence_penalty=1.0)
    other = SamplingParams(temperature=temperature)
    sampled = sample(torch.stack([LOGITS + 1, LOGITS]), [SampledRow(other, [1]), SampledRow(rules, [2], 1)])
    expected = LOGITS.double().log_softmax(0)
    assert sampled.token_ids[1] == 2
    assert list(sampled.logprobs) == [1]
    found = sampled.logprobs[1]
    assert found.token_id == 2
    assert found.logprob == pytest.approx(float(expected[2]), abs=1e-6)
    assert [token for token, _ in found.top] == [4, 0, 1]
    assert [value for _, value in found.top] == pytest.approx(expected[[4, 0, 1]].tolist(), abs=1e-6)


def test_a_token_that_cannot_come_has_a_finite_log_probability():
    rules = SamplingParams(logprobs=2)
    [found] = sample(torch.tensor([[1.0, -torch.inf]]), [SampledRow(rules, [])]).logprobs.values()
    assert found.top == ((0, 0.0), (1, -9999.0))
