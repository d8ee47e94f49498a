"""A mixture of experts in place of an MLP: a router picks a few for each token, and each takes its tokens together.

    tokens ->  sorted by expert  ->  one product for each expert that has any  ->  back, weighted and added up

A token's result depends on itself alone: a product gives a row the same bits whatever others it has, and the results of
a token's experts are added in the order in which the router ranks them (transformers adds by the number of the expert).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from alisa.model.linear import Linear


class Expert(NamedTuple):
    """The products of one expert."""

    up: Linear
    """Gate rows then up rows."""
    down: Linear

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.up.nbytes + self.down.nbytes


class Experts:
    """The experts of one layer.

    Args:
        router: `[..., C] -> [..., experts]`.
        router_bias: what is added to that, `[experts]`; None: nothing.
        experts: by number.
        per_token: how many each token goes through.
        renormalises: their weights are made to sum to 1; else they are shares among all experts.
    """

    def __init__(
        self,
        router: Linear,
        router_bias: Tensor | None,
        experts: Sequence[Expert],
        *,
        per_token: int,
        renormalises: bool,
    ) -> None:
        self._router = router
        self._router_bias = router_bias
        self._experts = tuple(experts)
        self._per_token = per_token
        self._renormalises = renormalises

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        bias = 0 if self._router_bias is None else self._router_bias.nbytes
        return self._router.nbytes + bias + sum(expert.nbytes for expert in self._experts)

    def __call__(self, x: Tensor, activate: Callable[[Tensor], Tensor]) -> Tensor:
        """`x [..., C] -> [..., C]`; `activate` stands between the two products of an expert."""
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = self._route(tokens)
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=len(self._experts)).tolist()
        found = tokens.new_empty(len(order), tokens.shape[1])
        for expert, rows in zip(self._experts, order.split(counts), strict=True):
            if len(rows):
                found[rows] = expert.down(activate(expert.up(tokens[rows // self._per_token])))
        ranked = found.view(len(tokens), self._per_token, -1).float() * weights[..., None]
        return _added_up(ranked).to(x.dtype).view_as(x)

    def _route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Weight Float32[N, per_token] and number Int64[N, per_token] of each token's experts, the heaviest first."""
        scores = self._router(tokens)
        if self._router_bias is not None:
            scores = scores + self._router_bias
        shares = scores.float().softmax(dim=-1)
        weights, chosen = shares.topk(self._per_token, dim=-1)
        return (weights / _added_up(weights)[:, None] if self._renormalises else weights), chosen


def _added_up(terms: Tensor) -> Tensor:
    """The sum over the second dimension, in order: torch's own takes an order that depends on the shape."""
    total = terms[:, 0]
    for term in terms.unbind(1)[1:]:
        total = total + term
    return total
