"""Budgets of single layers: how they are found, kept in a file and read."""

import json
from dataclasses import asdict, replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alisa.budget import Budget
from alisa.config import EngineConfig
from alisa.engine.budgets import ReadingParams, RequestBudgets
from alisa.errors import InputError
from alisa.policy.layer_budgets import (
    STEPS,
    BudgetedModel,
    LayerBudget,
    LayerBudgets,
    layer_sparsities,
    load_layer_budgets,
    share_out,
)
from tests.specs import small_spec

LAYERS = st.lists(st.sampled_from(STEPS), min_size=1, max_size=5).map(tuple)


@given(num_earlier=st.integers(0, 5000), layers=LAYERS)
def test_the_planner_counts_with_what_every_layer_reads_and_the_most(num_earlier, layers):
    own = [Budget(sparsity).split(num_earlier) for sparsity in layers]
    recent, older = Budget(0.9, layers=layers).split(num_earlier)
    assert recent == min(each for each, _ in own)
    assert recent + older == max(map(sum, own))


def test_a_layer_has_its_own_budget():
    budget = Budget(0.9, 0.8, (0.5, 0.95))
    assert [budget.of_layer(layer) for layer in range(2)] == [Budget(0.5, 0.8), Budget(0.95, 0.8)]
    assert Budget(0.9).of_layer(7) == Budget(0.9)


def test_a_request_with_a_sparsity_of_its_own_has_equal_budgets(tmp_path):
    config = EngineConfig(policy="sketch", sparsity=0.9, budgets=tmp_path / "budgets.json")
    budgets = RequestBudgets(config, on_cpu=True)
    assert budgets.budget(ReadingParams(sparsity=0.95)) == Budget(0.95)
    assert budgets.budget(ReadingParams(coverage=0.8)) == Budget(0.9, 0.8)
    assert budgets.budget(ReadingParams()) is None, "the engine's own, with layers"


CURVES = st.lists(
    st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4).map(lambda values: sorted(values, reverse=True)),
    min_size=1,
    max_size=4,
)


@given(losses=CURVES, sparsity=st.sampled_from([0.9, 0.8, 0.75, 0.6]))
def test_layers_read_no_more_than_is_allowed_together(losses, sparsity):
    steps = (0.9, 0.8, 0.7, 0.6)
    shared = share_out(losses, steps, sparsity)
    assert len(shared) == len(losses)
    assert set(shared) <= set(steps)
    assert sum(1 - share for share in shared) <= len(losses) * (1 - sparsity) + 1e-6


def _convex(falls):
    """A curve whose falls become smaller."""
    curve = [sum(falls)]
    for fall in sorted(falls, reverse=True):
        curve.append(curve[-1] - fall)
    return curve


@given(
    falls=st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=1, max_size=4),
    allowed=st.integers(0, 12),
)
def test_where_falls_become_smaller_nothing_is_better(falls, allowed):
    steps = (0.9, 0.8, 0.7, 0.6)
    losses = [_convex(each) for each in falls]
    allowed = min(allowed, 3 * len(losses))
    shared = share_out(losses, steps, 0.9 - allowed * 0.1 / len(losses))
    found = sum(curve[steps.index(share)] for curve, share in zip(losses, shared, strict=True))
    best = min(
        sum(curve[at] for curve, at in zip(losses, places, strict=True))
        for places in product(range(4), repeat=len(losses))
        if sum(places) <= allowed
    )
    assert found == best


def test_tokens_go_where_they_help_most():
    steep, flat, late = [1.0, 0.2, 0.1], [0.1, 0.09, 0.08], [1.0, 0.99, 0.0]
    assert share_out([steep, flat], (0.9, 0.8, 0.7), 0.85) == (0.8, 0.9)
    # a fall that comes two steps later is seen from the first
    assert share_out([late, flat], (0.9, 0.8, 0.7), 0.8) == (0.7, 0.9)


def budgets(spec, **changes):
    layers = tuple(STEPS[layer % 3] for layer in range(spec.num_layers))
    values = {
        "model": BudgetedModel.of(spec),
        "policy": "sketch",
        "edition": 2,
        "budgets": (LayerBudget(sparsity=0.98, layers=layers),),
        "found": {},
    }
    return LayerBudgets(**(values | changes))


def saved(path, record):
    path.write_text(json.dumps(asdict(record)), encoding="utf-8")
    return path


def test_a_file_gives_the_layers_again(tmp_path):
    spec = small_spec()
    record = budgets(spec)
    path = saved(tmp_path / "budgets.json", record)
    assert load_layer_budgets(path) == record
    assert layer_sparsities(path, spec, "sketch", 0.98) == record.budgets[0].layers
    assert layer_sparsities(None, spec, "sketch", 0.98) == ()


def test_layers_with_a_window_are_left_out(tmp_path):
    spec = small_spec()
    windowed = replace(spec, windows=(8, *[None] * (spec.num_layers - 1)))
    whole = budgets(spec).budgets[0].layers
    record = budgets(windowed, budgets=(LayerBudget(sparsity=0.98, layers=(None, *whole[1:])),))
    path = saved(tmp_path / "budgets.json", record)
    assert layer_sparsities(path, windowed, "sketch", 0.98) == whole[1:]
    with pytest.raises(InputError, match="have none under this --max-model-len"):
        layer_sparsities(path, spec, "sketch", 0.98)


@pytest.mark.parametrize(
    ("changes", "policy", "sparsity", "message"),
    [
        ({}, "sketch", 0.9, "they are for a sparsity of 0.98, not of 0.9"),
        ({}, "sketch-head", 0.98, "they are for sketch .edition 2., not for sketch-head"),
        ({"edition": 1}, "sketch", 0.98, "they are for sketch .edition 1."),
        ({"model": BudgetedModel.of(small_spec(num_heads=8))}, "sketch", 0.98, "they are of another model"),
    ],
)
def test_budgets_for_something_else_are_refused(changes, policy, sparsity, message, tmp_path):
    spec = small_spec()
    path = saved(tmp_path / "budgets.json", budgets(spec, **changes))
    with pytest.raises(InputError, match=message):
        layer_sparsities(path, spec, policy, sparsity)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("policy"), "policy is missing"),
        (lambda values: values["budgets"][0].update(layers=[1.0, 0.5]), "does not have a sparsity from 0"),
        (lambda values: values["budgets"][0].update(layers=[0.5]), "does not have a sparsity from 0"),
        (lambda values: values.update(version=2), "version is 2"),
        (lambda values: values.update(policy="best"), "does not have a sparsity from 0"),
    ],
)
def test_a_file_that_holds_something_else_is_one_sentence(change, message, tmp_path):
    values = asdict(budgets(small_spec()))
    values = json.loads(json.dumps(values))
    change(values)
    path = tmp_path / "budgets.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_layer_budgets(path)


def test_policies_that_read_the_same_everywhere_have_no_budgets():
    with pytest.raises(InputError, match="swa reads the same in all layers, so that it cannot have budgets of each"):
        EngineConfig(policy="swa", budgets="budgets.json")
