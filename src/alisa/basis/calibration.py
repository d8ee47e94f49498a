"""What queries, keys and values of a model are like, from one pass over tokens that are drawn at random.

A text is not needed: which channels of a head are large depends on the weights far more than on what is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from alisa.basis.row_basis import HeadStatistics, RowBasis
from alisa.kernels.base import Attend, KeyBlock
from alisa.kernels.reference.prefill import prefill_attention
from alisa.spec import CODE_BITS, AttentionShape

NUM_TOKENS = 1024
NUM_FIRST = 16
"""Sequences of one token, which show what first tokens are like."""
_LED_BY = 16
"""Tokens at the begin of a sequence that are left out of means: the first ones are like no others."""

Forward = Callable[[Tensor, Tensor, Attend, Tensor], Tensor]
"""`Decoder.forward`."""


def find_row_basis(
    kv_dtype: str,
    shape: AttentionShape,
    vocab_size: int,
    max_positions: int,
    forward: Forward,
    device: torch.device,
    sinks: Sequence[Tensor] | None,
) -> RowBasis | None:
    """The basis that suits rows of this format; None where they have no 4 bits.

    Args:
        kv_dtype: format of the rows.
        shape: of the model's attention.
        vocab_size: token ids are below it.
        max_positions: the longest sequence that it takes.
        forward: runs it.
        device: where it is.
        sinks: of each layer, Float32[H]; None: the model has none.
    """
    k_bits, v_bits = CODE_BITS.get(kv_dtype, (None, None))
    if v_bits != 4:
        return None
    heads = head_statistics(shape, vocab_size, min(NUM_TOKENS, max_positions), forward, device, sinks)
    # A cap of scores and the logit of a sink know how large scores are, not only how they differ.
    shifts_keys = shape.softcap is None and not shape.has_sinks
    return RowBasis.of(heads, device, turns_keys=k_bits == 4, shifts_keys=shifts_keys)


@torch.inference_mode()
def head_statistics(
    shape: AttentionShape,
    vocab_size: int,
    length: int,
    forward: Forward,
    device: torch.device,
    sinks: Sequence[Tensor] | None,
) -> list[HeadStatistics]:
    """Of every layer, from a sequence of `length` tokens; the others as in `find_row_basis`."""
    tokens = torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(0)).to(device)
    first_keys: list[Tensor] = []
    found: list[HeadStatistics] = []

    def attend_first(layer: int, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        first_keys.append(_wide(k[:, 0]).mean(dim=0))
        return _dense(shape, sinks, layer, q, k, v)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        led_by = min(_LED_BY, length - 1)
        found.append(_statistics(first_keys[layer], *(_wide(values[0, led_by:]) for values in (q, k, v))))
        return _dense(shape, sinks, layer, q, k, v)

    firsts = tokens[:NUM_FIRST, None]
    forward(firsts, torch.zeros_like(firsts), attend_first, torch.ones_like(firsts))
    forward(tokens[None], torch.arange(length, device=device)[None], attend, torch.full_like(tokens[None], length))
    return found


def _wide(values: Tensor) -> Tensor:
    return values.to("cpu", torch.float64)


def _dense(
    shape: AttentionShape, sinks: Sequence[Tensor] | None, layer: int, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    logits = None if sinks is None else sinks[layer]
    sequences = (
        prefill_attention(own_q, KeyBlock(0, *own), len(own_q), tuple, 0, 1, shape.window(layer), shape.softcap, logits)
        for own_q, *own in zip(q, k, v, strict=True)
    )
    return torch.stack([out for out, _ in sequences])


def _statistics(first_key: Tensor, q: Tensor, k: Tensor, v: Tensor) -> HeadStatistics:
    """Of q `[N, H, D]`, k and v `[N, G, D]` in float64."""
    mean = k.mean(dim=0)
    groups = q.unflatten(1, (k.shape[1], -1)).transpose(1, 2).flatten(0, 1)  # [N * H / G, G, D]
    return HeadStatistics(mean, first_key, v.mean(dim=0), _moments(k - mean), _moments(groups))


def _moments(heads: Tensor) -> Tensor:
    """Mean of the outer products of `[N, G, D]`: `[G, D, D]`."""
    of_heads = heads.transpose(0, 1)
    return of_heads.transpose(1, 2) @ of_heads / len(heads)
