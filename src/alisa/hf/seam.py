"""Where transformers and alisa meet: one attention function and one mask function, under one public name.

A model in transformers hands the keys and values of new tokens to its cache and what it gets back to an attention
function, which is not told of the cache. So a cache of ours gives back the new keys as they came, with a mark on the
tensor that says whose they are; the attention function finds the mark and asks its owner. The rows of earlier tokens
never become tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache

from alisa.errors import InputError

NAME = "alisa"
"""What `config._attn_implementation` says while a model is attached."""

_MARK = "_alisa_new_rows"
_WINDOW = "_alisa_window"

_MOST_TOKENS = 1 << 20
"""Windows are shorter."""

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""batch, head, query, key -> whether the query sees the key: transformers' description of a mask."""

_CHANGES_MEANING = ("sinks", "position_bias", "indices", "block_indices", "cu_seq_lens_q")
"""Arguments of attention functions that make another attention of it; None of them is one that may be left out."""


class SeamError(InputError):
    """A call does not fit the seam.

    Args:
        why: the fact, a sentence without an end.
        cure: what to do about it.
    """

    def __init__(self, why: str, cure: str) -> None:
        super().__init__(f"{why}; {cure}.")
        self.why = why


class AttentionRequest(NamedTuple):
    """How a layer wants its attention done; the same in every step."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float
    window: int | None
    softcap: float | None
    has_sinks: bool
    unknown: tuple[str, ...]
    """What it asks for in addition, which we do not do."""


class RowOwner(Protocol):
    """A batch of sequences in a cache."""

    def attend(self, layer: int, request: AttentionRequest, new: NewRows, query: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of query `[B, H, T, D]` as `[B, T, H, D]`; mask Bool[B, S]: which tokens are no padding."""
        ...


@dataclass(slots=True)
class NewRows:
    """Keys and values `[B, G, T, D]` that a model has just given to its cache, until it attends to them."""

    owner: RowOwner
    layer: int
    k: Tensor
    v: Tensor
    sinks: Tensor | None = None
    """`[H]`: a logit that joins the softmax of each head, where the model has them; known when it attends."""


class MarkingCache(Cache):
    """A cache that hands new keys and values on to `attend`, and has no tokens itself; a `RowOwner`."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """The same tensors, marked."""
        return marked(NewRows(self, layer_idx, key_states, value_states))

    def attend(self, layer: int, request: AttentionRequest, new: NewRows, query: Tensor, mask: Tensor | None) -> Tensor:
        """See `RowOwner`."""
        raise NotImplementedError

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """No tokens."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The new tokens."""
        return query_length, 0


def scaled(query: Tensor, request: AttentionRequest) -> Tensor:
    """Query `[B, H, T, D]` as `[B, T, H, D]`, with what its scale is other than the kernels' 1 / sqrt(D)."""
    factor = request.scaling * request.head_dim**0.5
    return query.transpose(1, 2) if factor == 1.0 else query.transpose(1, 2) * factor


def marked(new: NewRows) -> tuple[Tensor, Tensor]:
    """The new keys and values as a cache hands them on."""
    setattr(new.k, _MARK, new)
    return new.k, new.v


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """What transformers calls for every layer: query `[B, H, T, D]`, key and value `[B, G, T, D]` of the new tokens.

    Returns:
        The output `[B, T, H, D]`, and no weights.

    Raises:
        InputError: the model was called without a cache of ours, in training, or asks for what we do not do.
    """
    new = getattr(key, _MARK, None)
    if not isinstance(new, NewRows):
        raise SeamError(
            "the keys that it attends to are not those that alisa's cache was given",
            "leave past_key_values and use_cache out of a call of an attached model, or pass "
            "past_key_values=cache_factory()",
        )
    delattr(key, _MARK)
    if query.requires_grad:
        raise SeamError("attention over a KV cache has no gradients", "call the model under torch.no_grad()")
    unknown = [name for name in _CHANGES_MEANING if others.get(name) is not None]
    if not (module.is_causal if is_causal is None else is_causal):
        unknown.append("is_causal=False")
    if value.shape != key.shape:
        unknown.append(f"values of {value.shape[-1]} and keys of {key.shape[-1]} numbers a head")
    masked = getattr(attention_mask, _WINDOW, sliding_window)
    if masked != sliding_window:
        unknown.append(f"a window of {masked} tokens in its mask and {sliding_window} in its attention")
    request = AttentionRequest(
        query.shape[1],
        key.shape[1],
        key.shape[3],
        key.shape[3] ** -0.5 if scaling is None else float(scaling),
        sliding_window,
        softcap,
        s_aux is not None,
        tuple(unknown),
    )
    new.sinks = s_aux
    return new.owner.attend(new.layer, request, new, query, attention_mask), None


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = False,
    **others: object,
) -> Tensor | None:
    """What a model has instead of a mask of every query and key: Bool[B, S], which tokens are no padding; None: all.

    Raises:
        InputError: the mask is more than causal attention, a window and padding.
    """
    if not allow_is_causal_skip or mask_function is None:
        raise SeamError(
            "its mask is not plainly causal (bidirectional, prefix or packed tokens, or one of its own)",
            "run this call outside alisa.hf.attach",
        )
    if attention_mask is None or attention_mask.dim() != 2:
        return attention_mask
    padding = attention_mask[:, -kv_length:]
    if q_length > 1:
        setattr(padding, _WINDOW, _window_of(mask_function))
    return padding


def _window_of(mask_function: MaskFunction) -> int | None:
    """Tokens that each query sees, itself included; None: all before it."""
    last = _MOST_TOKENS - 1
    zero = torch.tensor(0)
    seen = [int(mask_function(zero, zero, torch.tensor(q), torch.arange(q + 1)).sum()) for q in (last, last - 1)]
    if seen == [last + 1, last]:
        return None
    if seen[0] != seen[1]:
        raise SeamError("it attends in chunks of the sequence", "run this call outside alisa.hf.attach")
    return seen[0]


def register() -> None:
    """Transformers knows both functions by `NAME`; doing it again changes nothing."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, padding_mask)


def check_eager() -> None:
    """Raise InputError where a model is being compiled, exported or traced: marks on tensors do not survive that."""
    # The last: the compiler gave up on a frame, which runs as it is while its callers are compiled. Torch has no public
    # way to ask for that. The error has no constructor of its own, because the compiler hands on no other.
    eval_frame = torch._C._dynamo.eval_frame
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or eval_frame.get_eval_frame_callback() is not None:
        raise InputError("a model attached to alisa cannot be compiled or exported; leave alisa.hf.attach first.")
