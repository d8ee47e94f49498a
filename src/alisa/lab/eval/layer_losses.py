"""What each layer loses when it reads less: one pass over a text, for `alisa tune`.

The model runs densely, all tokens of a window at once, and in every layer the policy decodes the same tokens at several
sparsities. What comes out of that is compared with what dense attention gives, and dropped: every layer sees the input
that it has densely, so that each is measured by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from alisa.errors import InputError
from alisa.lab.eval.layerwise import LayerSession, dense_attention
from alisa.lab.eval.subject import Subject, Variant
from alisa.lab.eval.windows import Window
from alisa.policy.registry import make_policy


class LayerLoss(NamedTuple):
    """Of a layer at one sparsity, mean over the decoded tokens."""

    error: float
    """Squared error of the heads' outputs, by the square of what they are densely."""
    unread: float
    """Share of the attention weight, by the policy, on tokens that are not read; mean over heads."""
    reused: float | None
    """Share of the older tokens that it reads which the layer before reads, too; None: there is none before."""


@torch.inference_mode()
def measure_layer_losses(
    subject: Subject,
    policy: str,
    sparsities: Sequence[float],
    windows: Sequence[Window],
    progress: Callable[[], None] = lambda: None,
) -> list[list[LayerLoss]]:
    """For each layer without a sliding window, the loss at each of the sparsities.

    Args:
        subject: the model.
        policy: a name from the registry, `PolicyEntry.by_layer`.
        sparsities: what is tried.
        windows: of equal length.
        progress: called after each layer.

    Raises:
        InputError: every layer has a sliding window.
    """
    if not subject.spec.attention.full_layers().num_layers:
        raise InputError(
            "Every layer of this model has a sliding window, and reads exactly that: nothing is shared out."
        )
    decoder = subject.scorer.decoder
    ids = torch.tensor(
        [[*window.item.prompt_ids, *window.item.output_ids] for window in windows], device=decoder.device
    )
    attend = _MeasuringAttend(subject, policy, sparsities, windows, progress)
    positions = torch.arange(ids.shape[1], device=decoder.device).expand_as(ids)
    decoder.forward(ids, positions, attend, torch.full_like(ids, ids.shape[1]))
    return attend.losses


class _MeasuringAttend:
    """Dense attention that measures."""

    def __init__(
        self,
        subject: Subject,
        policy: str,
        sparsities: Sequence[float],
        windows: Sequence[Window],
        progress: Callable[[], None],
    ) -> None:
        codec = subject.codec(Variant("dense", 0.0, "auto"))
        item = windows[0].item
        self._prompt_len, self._length = len(item.prompt_ids), item.num_tokens
        sizes = (codec, len(windows), self._prompt_len, self._length)
        self._sessions = [LayerSession(subject.scorer, make_policy(policy, s), *sizes) for s in sparsities]
        self._shape = subject.spec.attention
        self._progress = progress
        self._sets: list[Tensor] = []
        self.losses: list[list[LayerLoss]] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        """One layer: q `[B, T, H, D]`, k and v `[B, T, G, D]`, returns `[B, T, H, D]`."""
        window, softcap = self._shape.window(layer), self._shape.softcap
        out = torch.stack([dense_attention(*sequence, window, softcap) for sequence in zip(q, k, v, strict=True)])
        if window is None:
            former = self._sets
            own: list[LayerLoss] = []
            sets: list[Tensor] = []
            for number, session in enumerate(self._sessions):
                error, unread, reads = self._decoded(session, out, q, k, v, hidden)
                reused = _share(reads, former[number]) if former else None
                sets.append(reads)
                own.append(LayerLoss(error, unread, reused))
            self._sets = sets
            self.losses.append(own)
            self._progress()
        return out

    def _decoded(
        self, session: LayerSession, dense: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor
    ) -> tuple[float, float, Tensor]:
        """Error, unread share, and the older tokens that are read, Bool[B, R, T]."""
        session.prefill(q, k, v, hidden)
        num_rows = self._length - self._prompt_len
        outs, shares = torch.empty_like(dense[:, self._prompt_len :]), torch.zeros(num_rows)
        reads = torch.zeros(len(q), num_rows, self._length, dtype=torch.bool)
        for start, end in session.steps():
            rows = slice(start - self._prompt_len, end - self._prompt_len)
            outs[:, rows] = session.decode(start, end, q, k, v, hidden)
            weight = session.weight_read
            shares[rows] = 1.0 if weight is None else weight.view(len(q), end - start, -1).mean(dim=(0, 2))
            selection = session.selection
            for token, (count, positions) in enumerate(zip(selection.num_tokens, selection.by_query(), strict=True)):
                older = positions[0, : count - 1 - (count - 1) // 2].to("cpu", torch.int64)
                sequence, row = divmod(token, end - start)
                reads[sequence, rows.start + row, older] = True
        wanted = dense[:, self._prompt_len :].float()
        errors = (outs.float() - wanted).square().sum(dim=(2, 3)) / wanted.square().sum(dim=(2, 3))
        return float(errors.mean()), float(1 - shares.mean()), reads


def _share(reads: Tensor, former: Tensor) -> float:
    """The part of what is read that was read before."""
    return float((reads & former).sum() / reads.sum().clamp(min=1))
