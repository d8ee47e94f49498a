"""Queries, keys and values in a basis in which 4 bits hold keys and values, and attention outputs turned back.

A head of codes spans its channels from the smallest to the largest in 15 even steps, so that one channel far from the
others costs all of them their precision. Attention stays what it is under

    k' = (k - b) M^-T      q' = q M      v' = v S      out = out' S^T

for any vector b (it adds the same to all scores of a query, which a softmax does not see), any invertible M and any
orthogonal S. They are chosen so that little is lost:

- b is the mean key.
- M balances: the steps of a head are as wide as its widest channel asks for, and what a step is worth goes with the
  same channel of queries. Scores lose least where keys and queries have the same covariance, which M does by the
  geometric mean of that of keys and the inverse of that of queries; for a single channel sqrt(rms k / rms q).
- A cosine transform then spreads every channel over all of them, so that none is far from the others.
- Before that a reflection puts one direction where the transform makes it equal in all channels: there the minimum of
  the head, which has no steps, holds it. For keys it is the first token's, on which much of the weight lies and whose
  key is far from all others; for values it is that of their mean, which may not be taken away, as the first token has
  next to none.

Sources: Tender (arXiv 2406.12930) for b and scales, QuaRot (2404.00456) for turning, StreamingLLM (2309.17453) for the
first token. docs/accuracy.md says what each is worth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alisa.kernels.base import Attend, HeadTurn
from alisa.kernels.native import library
from alisa.kernels.native.turn import CpuTurn
from alisa.kernels.reference.turn import PlainTurn

_SHRINK = 0.05
"""Part of the mean variance that every channel is given in addition: few tokens say little of the smallest ones."""


@dataclass(frozen=True, slots=True)
class HeadStatistics:
    """What is known of the heads of one layer; Float64 on the CPU."""

    mean_key: Tensor
    """[G, D]"""
    first_key: Tensor
    """[G, D]: mean of the first tokens of some sequences."""
    mean_value: Tensor
    """[G, D]"""
    keys: Tensor
    """[G, D, D]: covariance."""
    queries: Tensor
    """[G, D, D]: second moments of all queries of the KV head."""


@dataclass(frozen=True, slots=True)
class KeyTurn:
    """Of one layer."""

    keys: HeadTurn
    queries: HeadTurn

    @classmethod
    def of(cls, heads: HeadStatistics, device: torch.device, *, shifts: bool) -> KeyTurn:
        """For keys of 4 bits; `shifts`: whether the mean may be taken from them."""
        mean = heads.mean_key if shifts else torch.zeros_like(heads.mean_key)
        root, inverse = _power(_shrunk(heads.queries), 0.5), _power(_shrunk(heads.queries), -0.5)
        balance = inverse @ _power(root @ _shrunk(heads.keys) @ root, 0.5) @ inverse
        to_keys, to_queries = _power(balance, -0.5), _power(balance, 0.5)
        spread = spreading(_times(heads.first_key - mean, to_keys))
        to_keys = to_keys @ spread
        return cls(
            make_turn(to_keys, _times(mean, to_keys), device),
            make_turn(to_queries @ spread, torch.zeros_like(mean), device),
        )


@dataclass(frozen=True, slots=True)
class ValueTurn:
    """Of one layer."""

    values: HeadTurn
    outputs: HeadTurn
    """Back again."""

    @classmethod
    def of(cls, heads: HeadStatistics, device: torch.device) -> ValueTurn:
        """For values of 4 bits."""
        spread, nothing = spreading(heads.mean_value), torch.zeros_like(heads.mean_value)
        return cls(make_turn(spread, nothing, device), make_turn(spread.transpose(1, 2), nothing, device))


@dataclass(frozen=True, slots=True)
class RowBasis:
    """Of every layer."""

    keys: Sequence[KeyTurn] | None
    """None: keys of 8 bits stay as they are."""
    values: Sequence[ValueTurn]

    @classmethod
    def of(
        cls, heads: Sequence[HeadStatistics], device: torch.device, *, turns_keys: bool, shifts_keys: bool
    ) -> RowBasis:
        """For values of 4 bits, and for keys too if they are turned; their mean may be taken or not."""
        keys = [KeyTurn.of(layer, device, shifts=shifts_keys) for layer in heads] if turns_keys else None
        return cls(keys, [ValueTurn.of(layer, device) for layer in heads])

    def rows(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """K and V `[..., G, D]` as rows hold them."""
        return k if self.keys is None else self.keys[layer].keys(k), self.values[layer].values(v)

    def around(self, attend: Attend) -> Attend:
        """The seam for a model, from one whose rows are in this basis."""

        def in_basis(layer: int, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
            query = q if self.keys is None else self.keys[layer].queries(q)
            return self.values[layer].outputs(attend(layer, query, *self.rows(layer, k, v), hidden))

        return in_basis


def make_turn(matrices: Tensor, shifts: Tensor, device: torch.device) -> HeadTurn:
    """The fastest form of `x M - shift` on this device, M `[G, D, D]` and shifts `[G, D]` in any float dtype."""
    matrices, shifts = matrices.float().contiguous().to(device), shifts.float().contiguous().to(device)
    return (CpuTurn if device.type == "cpu" and library.available() else PlainTurn)(matrices, shifts)


def spreading(directions: Tensor) -> Tensor:
    """Orthogonal matrices `[G, D, D]` after which each direction `[G, D]` is the same number in all channels.

    All others are spread over the channels as well.
    """
    dim = directions.shape[-1]
    places = torch.arange(dim, dtype=directions.dtype)
    waves = torch.cos(math.pi / dim * places[:, None] * (places + 0.5)) * math.sqrt(2 / dim)  # DCT-II, orthonormal
    waves[0] /= math.sqrt(2)
    length = directions.norm(dim=-1, keepdim=True)
    away = torch.where(length > 0, directions / length, 0.0)
    # To the farther end of the first axis: the difference of two vectors that are nearly the same would be noise.
    away[:, 0] += torch.where(away[:, 0] < 0, -1.0, 1.0)
    away = away / away.norm(dim=-1, keepdim=True)
    return waves - 2 * away[:, :, None] * (away[:, None] @ waves)


def _times(vectors: Tensor, matrices: Tensor) -> Tensor:
    """Row vectors `[G, D]` times matrices `[G, D, D]`."""
    return (vectors[:, None] @ matrices)[:, 0]


def _shrunk(covariance: Tensor) -> Tensor:
    """Covariances `[G, D, D]` with a floor under every variance."""
    variance = covariance.diagonal(dim1=1, dim2=2).mean(dim=1)
    floor = (_SHRINK * variance).clamp_min(1e-12)
    return covariance + floor[:, None, None] * torch.eye(covariance.shape[-1], dtype=covariance.dtype)


def _power(matrices: Tensor, exponent: float) -> Tensor:
    """Powers of symmetric positive matrices `[G, D, D]`: symmetric too, so that no sign of an axis is arbitrary."""
    values, axes = torch.linalg.eigh(matrices)
    values = values.clamp_min(values.amax(dim=-1, keepdim=True) * 1e-12)
    return (axes * values[:, None] ** exponent) @ axes.transpose(1, 2)
