"""Low-bit copies of keys and values and the attention they give, in plain torch: the reference of every sketch kernel.

    vector = minimum + step * code

for each token and part of a head, with a step and a minimum of its own. Copies of keys give approximate attention
weights, by which tokens are ranked; copies of values say what the tokens that are not read would have added.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from alisa.kernels.base import Sketch
from alisa.kernels.reference.softcap import softcapped

_FLOAT16_MAX = 65504.0


def make_sketch(vectors: Tensor, bits: int, parts: int = 1) -> Sketch:
    """Quantise keys or values `[N, G, D]` between their own minimum and maximum, per token and part of a head.

    With P = ceil(D / parts * bits / 8), byte i holds the codes i, i + P, i + 2P, ..., lowest bits first: a kernel gets
    runs of consecutive codes by shifts alone. Bits are 2, 4 or 8.

    Returns:
        Codes UInt8[N, G * parts, P] and (step, minimum) Float16[N, G * parts, 2]: the vector to half a step and what
        float16 rounds.
    """
    values = vectors.float().unflatten(-1, (parts, -1)).flatten(1, 2)
    low, high = values.aminmax(dim=-1, keepdim=True)
    minimum = (low.clamp(-_FLOAT16_MAX, _FLOAT16_MAX) + 0.0).half()  # + 0: no negative zero
    reach = (high - minimum.float()) / (2**bits - 1)
    step = (reach.clamp(0.0, _FLOAT16_MAX) + 0.0).half()
    inverse = torch.where(step > 0, 1 / step.float(), 0.0)
    codes = ((values - minimum.float()) * inverse).clamp(0, 2**bits - 1).round().to(torch.uint8)
    num_planes = 8 // bits
    planes = pad(codes, (0, -values.shape[-1] % num_planes)).unflatten(-1, (num_planes, -1))
    packed = (planes << _shifts(bits, vectors.device)).sum(dim=-2).to(torch.uint8)
    return Sketch(packed, torch.cat((step, minimum), dim=-1), bits, parts)


def unsketch(sketched: Sketch, head_dim: int) -> Tensor:
    """The vectors Float32[N, G, D] that the codes stand for."""
    codes, ranges, bits, parts = sketched
    planes = (codes.unsqueeze(-2) >> _shifts(bits, codes.device)) & (2**bits - 1)
    values = planes.flatten(-2)[..., : head_dim // parts]
    return (values.float() * ranges[..., :1].float() + ranges[..., 1:].float()).view(len(codes), -1, head_dim)


def sketch_rows(sketched: Sketch, ids: Tensor) -> Sketch:
    """Rows `ids` Int64[N] of a sketch."""
    return sketched._replace(codes=sketched.codes.index_select(0, ids), ranges=sketched.ranges.index_select(0, ids))


def _shifts(bits: int, device: torch.device) -> Tensor:
    """Where each plane begins in a byte, UInt8[planes, 1]."""
    return torch.arange(0, 8, bits, device=device, dtype=torch.uint8)[:, None]


def sketch_scores(
    query: Tensor,
    keys: Sketch,
    starts: Tensor,
    lengths: Tensor,
    width: int,
    num_sets: int,
    softcap: float | None = None,
) -> Tensor:
    """Approximate weights Float32[B, num_sets, width], summed over the heads of each set: what tokens are ranked by.

    Arguments as in `SelectionKernels.sketch_select`.
    """
    return sketch_weights(query, keys, starts, lengths, width, softcap).unflatten(1, (num_sets, -1)).sum(dim=2)


def sketch_weights(
    query: Tensor, keys: Sketch, starts: Tensor, lengths: Tensor, width: int, softcap: float | None = None
) -> Tensor:
    """Approximate weights Float32[B, H, width] of every head, 0 from `lengths[b]` on."""
    head_dim = query.shape[-1]
    rows = sketch_rows(keys, token_ids(starts, lengths, width))
    return attention_weights(query, unsketch(rows, head_dim), lengths, head_dim**-0.5, softcap)


def token_ids(starts: Tensor, lengths: Tensor, width: int) -> Tensor:
    """Int64[B * width]: the rows of every sequence, its last one repeated after its end."""
    columns = torch.arange(width, device=starts.device)
    return (starts[:, None] + columns.minimum(lengths[:, None] - 1)).view(-1)


def attention_weights(
    query: Tensor, keys: Tensor, lengths: Tensor, scale: float, softcap: float | None = None
) -> Tensor:
    """Softmax weights Float32[B, H, S] of query `[B, H, D]` over keys Float32[B * S, G, D]; 0 from `lengths[b]` on."""
    num_seqs, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    keys = keys.view(num_seqs, -1, num_kv_heads, head_dim).permute(0, 2, 3, 1)  # [B, G, D, S]
    hidden = torch.arange(keys.shape[-1], device=keys.device) >= lengths[:, None]
    grouped = query.float().view(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim) * scale
    scores = grouped @ keys
    if softcap is not None:
        scores = softcapped(scores, softcap)
    weights = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(dim=-1)
    return weights.view(num_seqs, num_heads, -1)


def value_not_read(weights: Tensor, values: Tensor, positions: Tensor, counts: Tensor) -> Tensor:
    """What the tokens that are not read add: Float32[B, H, D], their values at the weights Float32[B, H, S].

    Values Float32[B * S, G, D]; of positions Int32[B * J, K] `counts` Int32[B * J] are real.
    """
    num_seqs, num_heads, width = weights.shape
    num_kv_heads, head_dim = values.shape[1:]
    real = torch.arange(positions.shape[1], device=positions.device) < counts[:, None]
    places = torch.where(real, positions, width).to(torch.int64)  # padding goes to a column that is left out
    read = places.new_zeros(len(positions), width + 1, dtype=torch.bool).scatter_(1, places, value=True)[:, :width]
    of_sets = weights.view(len(positions), -1, width)
    left = of_sets.masked_fill(read[:, None], 0.0).view(num_seqs, num_kv_heads, -1, width)
    rest = left @ values.view(num_seqs, width, num_kv_heads, head_dim).transpose(1, 2)
    return rest.view(num_seqs, num_heads, head_dim)


def weight_read(weights: Tensor, positions: Tensor, counts: Tensor, lengths: Tensor) -> Tensor:
    """Shares Float32[B, H]: the part of each head's weights Float32[B, H, S] that lies on the tokens read.

    Positions Int32[B * J, K], of which `counts` Int32[B * J] are real; `lengths` Int32[B] tokens there are. A share is
    exactly 1 where everything is read: rounding must not show there.
    """
    num_seqs, num_heads, _ = weights.shape
    set_heads = num_seqs * num_heads // len(positions)
    real = torch.arange(positions.shape[1], device=positions.device) < counts[:, None]
    of_sets = weights.view(len(positions), set_heads, -1)
    chosen = positions.to(torch.int64)[:, None].expand(-1, set_heads, -1)
    shares = (of_sets.gather(2, chosen) * real[:, None]).sum(dim=2).view(num_seqs, num_heads)
    everything = counts.view(num_seqs, -1)[:, :1] >= lengths[:, None]
    return shares.masked_fill(everything, 1.0)
