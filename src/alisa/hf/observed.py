"""What a model asks of its attention, seen rather than guessed: two tokens are run through it without any attention.

Configurations name heads, windows and scales in many ways, and say nothing of what a model does with its keys. One pass
shows it, and shows what does not fit: layers that compute their attention themselves, keep another state than rows, or
change the keys after the cache has had them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alisa.errors import AlisaError, InputError
from alisa.hf.seam import AttentionRequest, MarkingCache, NewRows, SeamError
from alisa.spec import AttentionShape


class ObservedAttention:
    """The requests of all layers.

    Raises:
        InputError: the model cannot be attached, and why.
    """

    def __init__(self, name: str, requests: dict[int, AttentionRequest], sinks: dict[int, Tensor]) -> None:
        self._name = name
        self.sinks = [sinks[layer] for layer in sorted(sinks)] or None
        """Of each layer, the logits Float32[H] that join its softmax; None: the model has none."""
        self.requests = [requests[layer] for layer in sorted(requests)]
        """In the order of the layers."""
        if sorted(requests) != list(range(len(requests))) or not requests:
            raise self._refusal("it keeps K and V of some layers only")
        first = self.requests[0]
        for request in self.requests:
            if request.unknown:
                raise self._refusal(f"its attention has {' and '.join(_named(request.unknown))}")
            if replace_window(request, None) != replace_window(first, None):
                raise self._refusal("its layers have other heads, scales or caps than each other")
            if request.num_heads % request.num_kv_heads:
                raise self._refusal(f"{request.num_heads} query heads do not share {request.num_kv_heads} KV heads")

    def shape(self, max_len: int) -> AttentionShape:
        """As kernels and policies want it; a window that no sequence outgrows is none."""
        first = self.requests[0]
        windows = tuple(None if (w := request.window) is None or w >= max_len else w for request in self.requests)
        return AttentionShape(
            num_layers=len(self.requests),
            num_heads=first.num_heads,
            num_kv_heads=first.num_kv_heads,
            head_dim=first.head_dim,
            scale=first.head_dim**-0.5,
            windows=windows if any(windows) else (),
            softcap=first.softcap,
            has_sinks=first.has_sinks,
        )

    def _refusal(self, why: str) -> InputError:
        return refusal(self._name, why)


def refusal(name: str, why: str) -> InputError:
    """One sentence: a model cannot be attached."""
    return InputError(f"{name} cannot be attached to alisa: {why}; run it with transformers alone.")


def replace_window(request: AttentionRequest, window: int | None) -> AttentionRequest:
    """The same request with another window."""
    return request._replace(window=window)


_SENTENCES = {
    "sinks": "attention sinks",
    "position_bias": "a bias by position",
}


def _named(unknown: Iterable[str]) -> list[str]:
    return [_SENTENCES.get(name, name) for name in unknown]


def observe(model: PreTrainedModel) -> ObservedAttention:
    """Run two tokens through an attached model, with zeros for attention.

    Raises:
        InputError: the model cannot be attached, and why.
    """
    cache = _ObservingCache(type(model).__name__)
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
    except SeamError as error:
        raise refusal(cache.name, error.why) from error
    except AlisaError:
        raise
    except Exception as error:
        said = str(error).strip().partition("\n")[0].rstrip(".:")
        why = f"two tokens could not be run through it ({type(error).__name__}: {said})"
        raise refusal(cache.name, why) from error
    return cache.observed()


class _ObservingCache(MarkingCache):
    """Takes keys and values, keeps nothing, and writes down what is asked."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self._given: set[int] = set()
        self._requests: dict[int, AttentionRequest] = {}
        self._sinks: dict[int, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """The same tensors, marked."""
        self._given.add(layer_idx)
        return super().update(key_states, value_states, layer_idx)

    def attend(self, layer: int, request: AttentionRequest, new: NewRows, query: Tensor, mask: Tensor | None) -> Tensor:
        """Zeros."""
        self._requests[layer] = request
        if new.sinks is not None:
            self._sinks[layer] = new.sinks.detach().float()
        return torch.zeros_like(query).transpose(1, 2)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Asked by layers whose state is no K and V."""
        raise refusal(self.name, "some of its layers keep another state than K and V (linear attention, convolution)")

    get_recurrent_state = get_conv_state

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """Called by layers that choose tokens themselves."""
        raise refusal(self.name, "its layers choose the tokens that they read themselves")

    def observed(self) -> ObservedAttention:
        """What was asked."""
        if not self._given:
            raise refusal(self.name, "it gives no K and V to its cache")
        if self._given != set(self._requests):
            raise refusal(self.name, "it computes its attention itself, outside transformers' attention interface")
        return ObservedAttention(self.name, self._requests, self._sinks)
