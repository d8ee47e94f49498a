"""Rounding to 4 bits: no span is worse off than with the nearest levels of its range, and most are better."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alisa.model.linear_int4 import quantise_spans
from alisa.spec import SPAN


def numbers(levels, scales, minima):
    return levels.double() * scales.double().unsqueeze(-1) + minima.double().unsqueeze(-1)


def nearest(values):
    """Values `[N, spans, SPAN]` at the nearest of 16 levels between their ends, in float64."""
    low, high = values.double().aminmax(dim=-1, keepdim=True)
    step = (high - low) / 15
    return low + ((values - low) / torch.where(step > 0, step, 1)).round() * step


def squares(difference):
    return difference.double().square().sum(dim=-1)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.sampled_from([1e-4, 0.02, 1.0, 300.0]),
    offset=st.sampled_from([0.0, 1.0, -30.0]),
    outliers=st.integers(0, 3),
    few=st.booleans(),
)
def test_no_span_is_worse_off_than_with_the_nearest_levels(seed, size, offset, outliers, few):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(8, 3, SPAN, generator=generator)
    values[..., :outliers] *= 20
    if few:
        values = values.clamp(0, 1).round()  # two values, and spans that have one alone
    values = (values + offset) * size
    found = quantise_spans(values.flatten(1))
    assert found.levels.max() <= 15
    # float16 moves scale and minimum by 2^-11 of them or by half of its least step, and so a value by `moved`.
    moved = 2.0**-11 * (15 * found.scales.abs() + found.minima.abs()).double() + 16 * 2.0**-25
    root = squares(nearest(values) - values).sqrt()
    assert (squares(numbers(*found) - values).sqrt() <= 1.0001 * root + SPAN**0.5 * moved).all()


def test_rounding_takes_a_seventh_off_the_squared_error():
    """Of normal numbers."""
    values = torch.randn(64, 32, SPAN, generator=torch.Generator().manual_seed(2))
    ratio = (
        squares(numbers(*quantise_spans(values.flatten(1))) - values).sum() / squares(nearest(values) - values).sum()
    )
    assert 0.8 < ratio < 0.88


def test_numbers_on_a_grid_stay_on_it():
    """Weights that were decoded from blocks with all 16 levels: their scales and minima are found again."""
    generator = torch.Generator().manual_seed(3)
    levels = torch.randint(0, 16, (64, 4, SPAN), generator=generator)
    levels[..., 5], levels[..., 9] = 0, 15
    scales = (0.01 + torch.rand(64, 4, generator=generator)).half()
    minima = (-8 * torch.rand(64, 4, generator=generator)).half()
    found = quantise_spans(numbers(levels, scales, minima).float().flatten(1))
    assert torch.equal(found.levels, levels.to(torch.uint8))
    assert torch.equal(found.scales, scales)
    assert torch.equal(found.minima, minima)


def test_the_end_of_a_row_is_filled_up():
    found = quantise_spans(torch.full((2, 40), 0.75))
    assert found.levels.shape == (2, 2, SPAN)
    assert (numbers(*found).flatten(1)[:, :40] - 0.75).abs().max() < 2e-3
