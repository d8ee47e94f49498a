"""The study of attention: what a policy would read beside dense attention, against plain re-computations."""

import pytest
import torch

from alisa import LLM
from alisa.lab.eval.attention_study import AttentionStudy, _movements, _small_share
from alisa.lab.eval.ranks import spearman
from alisa.lab.eval.shadow import ShadowAttend
from alisa.lab.eval.subject import BASELINE, Subject, Variant
from alisa.lab.eval.windows import Window
from alisa.lab.scoring import ScoredItem

LENGTH, PROMPT = 90, 30


@pytest.fixture(scope="module")
def subject():
    return Subject.of(LLM(dtype="float32"))


def shadow(subject, variant, num_seqs=2):
    ids = torch.randint(3, 2000, (num_seqs, LENGTH), generator=torch.Generator().manual_seed(4))
    layers = []
    attend = ShadowAttend(
        subject.scorer,
        variant.selection_policy(),
        subject.codec(variant),
        num_seqs=num_seqs,
        prompt_len=PROMPT,
        length=LENGTH,
        tell=layers.append,
    )
    with torch.inference_mode():
        subject.scorer.decoder.forward(ids, torch.arange(LENGTH).expand_as(ids), attend)
    return layers


def test_spearman_is_the_correlation_of_ranks_with_ties_shared():
    first = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert spearman(first, first**3) == pytest.approx(1)
    assert spearman(first, -first) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: by hand 4.5 / sqrt(4.5 * 5)
    assert spearman(torch.tensor([0.0, 1.0, 1.0, 7.0]), torch.arange(4.0)) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)


@pytest.mark.parametrize("policy", ["swa", "swa-head", "streaming", "oracle"])
def test_selections_have_the_size_of_the_budget_and_hold_the_new_token(policy, subject):
    variant = Variant(policy, 0.8, "auto")
    budget = variant.selection_policy().budget
    for layer in shadow(subject, variant):
        assert torch.allclose(layer.weights.sum(-1), torch.ones(()))
        for row in range(LENGTH - PROMPT):
            position = PROMPT + row
            expected = sum(budget.split(position)) + 1
            assert (layer.read[:, :, row].sum(-1) == expected).all()
            assert layer.read[:, :, row, position].all()
            assert not layer.read[:, :, row, position + 1 :].any()


def test_the_oracle_captures_more_than_any_other_policy_in_every_row(subject):
    def captured(policy):
        layers = shadow(subject, Variant(policy, 0.8, "auto"))
        return torch.stack([(layer.weights * layer.read_by_head).sum(-1).mean(1) for layer in layers])

    best = captured("oracle")
    for policy in ("local", "streaming", "swa", "h2o"):
        assert (best >= captured(policy) - 1e-5).all(), policy
    assert torch.allclose(captured("dense"), torch.ones(()))


def test_small_weights_are_counted_among_visible_tokens_only(subject):
    layer = shadow(subject, BASELINE)[1]
    shares = _small_share(layer.weights, PROMPT)
    for row in (0, 17, LENGTH - PROMPT - 1):
        visible = layer.weights[0, :, row, : PROMPT + row + 1]
        expected = (visible < 0.01 * visible.amax(-1, keepdim=True)).float().mean()
        assert float(shares[0, row]) == pytest.approx(float(expected), abs=1e-6)


def test_movements_against_sets():
    generator = torch.Generator().manual_seed(0)
    read = torch.rand(1, 1, 20, 30, generator=generator) < 0.3
    read &= torch.arange(30) <= 10 + torch.arange(20)[:, None]
    recent = torch.arange(20) // 4 + 1
    entering, returning = _movements(read, recent, 10)
    for row in range(1, 20):
        now, before = (set(read[0, 0, r].nonzero().flatten().tolist()) for r in (row, row - 1))
        fresh = now - before - {10 + row}
        lately = set().union(
            *(read[0, 0, r].nonzero().flatten().tolist() for r in range(max(0, row - recent[row]), row))
        )
        back = {token for token in fresh if token not in lately} if row >= recent[row] else set()
        assert set(entering[0, 0, row - 1].nonzero().flatten().tolist()) == fresh
        assert set(returning[0, 0, row - 1].nonzero().flatten().tolist()) == back


def test_forgotten_tokens_return_under_the_sketch_and_never_under_swa(subject):
    ids = torch.randint(3, 2000, (2, 200), generator=torch.Generator().manual_seed(9)).tolist()
    study = AttentionStudy("noise", [Window(ScoredItem(row[:40], row[40:]), 100) for row in ids], {})
    swa, sketch, dense = (
        study.measure(subject, variant)
        for variant in (Variant("swa", 0.8, "auto"), Variant("sketch", 0.8, "auto"), BASELINE)
    )
    assert swa.details["returning"] == 0
    assert sketch.details["returning"] > 0.01
    assert swa.details["overlap"] > sketch.details["overlap"]
    assert dense.units == pytest.approx([1, 1])
    assert dense.details["spearman"] == pytest.approx(1)
    assert 0.3 < study.value(swa.units).value < study.value(sketch.units).value < 1
