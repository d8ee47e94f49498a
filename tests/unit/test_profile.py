"""The profile's pieces at their smallest: they run, and the fit finds prices that made the times."""

import pytest
import torch

from alisa.kernels.choose import choose_backend
from alisa.planner.hardware import Gemm
from alisa.planner.profile.clock import fit, seconds
from alisa.planner.profile.products import measure_layer, measure_logits, measure_values
from alisa.planner.profile.rows import measure_prompt, measure_selection
from alisa.planner.profile.tiers import measure_link, measure_lookup, measure_rebuild
from alisa.policy.registry import make_policy
from tests.specs import small_spec

KERNELS = choose_backend(torch.device("cpu"))


def test_a_fit_finds_the_prices():
    amounts = [(1.0, float(rows), float(rows * width)) for rows in (1, 10, 100) for width in (5, 50)]
    times = [2e-5 + 3e-7 * rows + 4e-9 * values for _, rows, values in amounts]
    assert fit(amounts, times) == pytest.approx([2e-5, 3e-7, 4e-9])


def test_no_price_is_negative():
    amounts = [(1.0, float(x)) for x in (1, 2, 3)]
    prices = fit(amounts, [3.0, 2.0, 1.0])
    assert prices[1] == 0
    assert prices[0] > 0


def test_seconds_are_the_median():
    calls = []
    assert seconds(lambda: calls.append(1), repeats=4) >= 0
    assert len(calls) == 5


@pytest.mark.slow
def test_the_parts_can_be_measured(tmp_path):
    layer = measure_layer(torch.float32, Gemm(call_s=0.0, curves=((1.0, ((1.0, 1e-9),)),)))
    assert layer.layer_s > 0
    assert min(layer.rope_s, layer.step_s) >= 0
    assert measure_values(torch.float32) > 0
    assert measure_logits() > 0
    assert all(price > 0 for price in measure_prompt(torch.float32, KERNELS.prefill))
    read, write = measure_link(tmp_path, KERNELS.move_rows)
    assert min(read.bytes_per_s, write.bytes_per_s) > 0
    assert measure_lookup(tmp_path, KERNELS.move_rows, KERNELS.append).call_s >= 0
    assert sum(measure_rebuild(tmp_path, KERNELS.move_rows, torch.float32)) > 0


@pytest.mark.parametrize("policy", ["dense", "swa", "sketch"])
def test_selection_can_be_measured(policy):
    found = measure_selection(make_policy(policy, 0.8), small_spec(), KERNELS.selection)
    assert found.step_s > 0
