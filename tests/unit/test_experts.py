"""Experts: what is counted, and that a token does not see who shares its expert."""

import math
from dataclasses import replace

import pytest
import torch

from alisa.model.choose_linear import choose_linear, has_fast_panels
from alisa.model.experts import Expert, Experts
from alisa.model.linear import FrameworkLinears
from alisa.model.loader import random_decoder
from alisa.model.names import layer_shapes
from alisa.model.names import weight_bytes as float_weight_bytes
from alisa.planner.cost import CostModel
from alisa.planner.footprint import weight_bytes
from alisa.planner.load import RunConfig
from alisa.planner.presets import PRESETS
from tests.specs import small_spec

CPU = torch.device("cpu")
SPEC = replace(small_spec(), num_experts=6, experts_per_token=2, ffn_size=48, tied_embeddings=False)


def test_counts_are_those_of_all_experts_and_of_one_token():
    matrices = {name: shape for name, shape in layer_shapes(SPEC).items() if len(shape) == 2}
    attention = sum(math.prod(shape) for name, shape in matrices.items() if "expert" not in name)
    expert = 3 * SPEC.hidden_size * 48
    tables = 2 * SPEC.vocab_size * SPEC.hidden_size
    assert SPEC.num_parameters == SPEC.num_layers * (attention + 6 * expert) + tables
    assert SPEC.step_weights == SPEC.num_layers * (attention + 2 * expert) + tables // 2
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        if has_fast_panels(dtype, CPU):
            assert random_decoder(SPEC, dtype, CPU).weight_bytes == weight_bytes(SPEC, name, packs_tied=True)
        torch_has = random_decoder(SPEC, dtype, CPU, linears=FrameworkLinears(CPU))
        assert torch_has.weight_bytes == float_weight_bytes(SPEC, dtype.itemsize)


def test_a_plan_prices_the_experts_that_have_tokens():
    """One token reads two of six; many read all of them."""
    method = RunConfig("dense", 0.0, "float16", "float16")
    hardware = PRESETS["v100-16gb"]
    cost = CostModel(SPEC, method, hardware)
    weights = SPEC.hidden_size * SPEC.ffn_size
    one = hardware.gemm["float16"].seconds(1, 2 * weights) + hardware.gemm["float16"].seconds(1, weights)
    assert cost._experts_s(1) == pytest.approx(2 * one)
    assert cost._experts_s(1000) > 5.9 * one
    assert CostModel(replace(SPEC, num_experts=0, experts_per_token=0), method, hardware)._experts_s(8) == 0


def make_experts(num_experts=7, size=64, width=96, per_token=3):
    generator = torch.Generator().manual_seed(0)

    def linear(num_out, num_in):
        return choose_linear("float", torch.float32, CPU).layer(
            torch.randn(num_out, num_in, generator=generator) / num_in**0.5, None
        )

    experts = [Expert(linear(width, size), linear(size, width)) for _ in range(num_experts)]
    return Experts(linear(num_experts, size), None, experts, per_token=per_token, renormalises=True)


def test_a_token_does_not_depend_on_its_company():
    experts = make_experts()
    tokens = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    together = experts(tokens, torch.relu)
    for rows in ([0], [3, 4], list(range(17, 50)), [49, 0, 20]):
        assert torch.equal(experts(tokens[rows], torch.relu), together[rows])
    assert torch.equal(experts(tokens.view(5, 10, 64), torch.relu).view(50, 64), together)


def test_it_is_the_weighted_sum_of_the_chosen_experts():
    experts = make_experts()
    token = torch.randn(1, 64, generator=torch.Generator().manual_seed(2))
    shares = experts._router(token)[0].softmax(-1)
    best = shares.topk(3).indices.tolist()
    outputs = {i: experts._experts[i].down(torch.relu(experts._experts[i].up(token))) for i in best}
    expected = sum(shares[i] * outputs[i] for i in best) / sum(shares[i] for i in best)
    torch.testing.assert_close(experts(token, torch.relu), expected)
