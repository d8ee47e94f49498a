"""Rotary position embedding (RoFormer, 2104.09864) in the half-split order that Hugging Face checkpoints use.

The table is not stored: the angles of the step's tokens are computed once per forward pass and shared by all layers, in
float32, whatever the model computes in (bfloat16 cannot tell positions beyond 256 apart).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from alisa.spec import Rope, RopeScaling


def inverse_frequencies(rope: Rope, device: torch.device) -> Tensor:
    """Angle per position of each rotated pair, Float32[rotary_dim / 2]; of any rope that is not `by_length`."""
    assert not rope.by_length, "these angles need lengths"
    frequencies = 1.0 / rope.theta ** _exponents(rope, device)
    scaling = rope.scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        return _scale_llama3(frequencies, scaling)
    if scaling.kind == "divisors":
        return frequencies / torch.tensor(scaling.divisors, device=device)
    return _scale_yarn(frequencies, rope, scaling)


def frequencies_by_length(rope: Rope, lengths: Tensor) -> Tensor:
    """The same for a rope that is `by_length`: `[..., rotary_dim / 2]` for sequences of these lengths Int64[...].

    longrope (2402.13753) divides by factors of its own for each pair, others within the original length than beyond;
    dynamic ("NTK-aware") raises the base as a sequence outgrows it. Hugging Face transformers takes the longest length
    that a batch has come to; here it is what the sequence itself may come to, from its first token on, so that neither
    company nor the moment changes an angle.
    """
    scaling, exponents = rope.scaling, _exponents(rope, lengths.device)
    assert scaling is not None, "only scaled ropes look at lengths"
    lengths = lengths[..., None]
    if scaling.kind == "longrope":
        long, short = (
            1.0 / (torch.tensor(factors, device=lengths.device) * rope.theta**exponents)
            for factors in (scaling.long_factors, scaling.short_factors)
        )
        return torch.where(lengths > scaling.original_max_positions, long, short)
    outgrown = lengths.clamp(min=scaling.original_max_positions) / scaling.original_max_positions
    power = rope.rotary_dim / (rope.rotary_dim - 2)
    return 1.0 / (rope.theta * (scaling.factor * outgrown - (scaling.factor - 1)) ** power) ** exponents


def _exponents(rope: Rope, device: torch.device) -> Tensor:
    return torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32, device=device) / rope.rotary_dim


def attention_factor(rope: Rope) -> float:
    """What sine and cosine are multiplied with: 1 but for yarn and longrope, which sharpen attention in long texts."""
    scaling = rope.scaling
    if scaling is None or scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    growth = math.log(scaling.factor)
    if scaling.kind == "longrope":
        return math.sqrt(1 + growth / math.log(scaling.original_max_positions))
    if scaling.mscale and scaling.mscale_all_dim:
        return (0.1 * scaling.mscale * growth + 1) / (0.1 * scaling.mscale_all_dim * growth + 1)
    return 0.1 * growth + 1


def _scale_llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """LLaMA 3.1: waves longer than the original context are stretched by `factor`, short ones kept, a ramp between.

    The ramp is linear in waves per original context, from `low_freq_factor` (stretched) to `high_freq_factor` (kept).
    """
    waves_in_context = scaling.original_max_positions * frequencies / (2 * math.pi)
    ramp = (waves_in_context - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = ramp.clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def _scale_yarn(frequencies: Tensor, rope: Rope, scaling: RopeScaling) -> Tensor:
    """YaRN (2309.00071): as llama3, with a ramp that is linear in the index of the pair.

    It goes from the pair that turns `beta_fast` times in the original context (kept) to that of `beta_slow` turns.
    """

    def pair_with(turns: float) -> float:
        wave = scaling.original_max_positions / (turns * 2 * math.pi)
        return rope.rotary_dim * math.log(wave) / (2 * math.log(rope.theta))

    first, last = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.rotary_dim - 1)
    pairs = torch.arange(len(frequencies), dtype=torch.float32, device=frequencies.device)
    stretched = ((pairs - first) / (last - first if last != first else 0.001)).clamp(0.0, 1.0)
    return frequencies * (1.0 - stretched) + frequencies / scaling.factor * stretched


class Rotation:
    """The rotation of one step's tokens: made once, applied to q and k of every layer.

    Args:
        positions: Int64[...] logical positions of the tokens.
        frequencies: Float32[rotary_dim / 2] from `inverse_frequencies`, or `[..., rotary_dim / 2]` by length.
        factor: from `attention_factor`.
    """

    __slots__ = ("_half", "_rotary_dim", "cos", "sin")

    def __init__(self, positions: Tensor, frequencies: Tensor, factor: float = 1.0) -> None:
        angles = positions.unsqueeze(-1).to(torch.float32) * frequencies
        cos, sin = angles.cos(), angles.sin()
        if factor != 1.0:
            cos, sin = cos * factor, sin * factor
        self._half = frequencies.shape[-1]
        self._rotary_dim = 2 * self._half
        # `[..., 1, rotary_dim]`: broadcasts over heads. The sign of rotate-half is in the sine: turning a head is then
        # one roll and one multiply-add instead of two slices, a negation and a concatenation.
        self.cos = torch.cat((cos, cos), dim=-1).unsqueeze(-2)
        self.sin = torch.cat((-sin, sin), dim=-1).unsqueeze(-2)

    def __call__(self, x: Tensor) -> Tensor:
        """`x [..., heads, D]` with the first `rotary_dim` values of each head turned; same dtype."""
        head = x if x.shape[-1] == self._rotary_dim else x[..., : self._rotary_dim]
        # In place: for a prompt's q, each further float32 result is as large as the model's products of a layer.
        turned = (head * self.cos).addcmul_(head.roll(self._half, -1), self.sin).to(x.dtype)
        return turned if head is x else torch.cat((turned, x[..., self._rotary_dim :]), dim=-1)
