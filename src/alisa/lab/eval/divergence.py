"""How far a policy's next tokens are from those of dense attention: tells far smaller differences than perplexity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alisa.lab.eval.layerwise import LayerwiseAttend
from alisa.lab.eval.subject import BASELINE, Subject
from alisa.lab.eval.windows import Window
from alisa.policy.base import SelectionPolicy

LOGIT_ROWS = 256
"""Rows of logits that are made at once."""


class Divergence:
    """KL(dense || policy) of each of some windows, in nats a token, mean over the tokens after the prompt.

    Args:
        subject: the model.
        windows: of equal length. Their dense distributions are kept, `4 * V` bytes a token.
    """

    def __init__(self, subject: Subject, windows: Sequence[Window]) -> None:
        self._subject = subject
        self._windows = windows
        self._dense = self._log_probabilities(BASELINE.selection_policy())

    def __call__(self, policy: SelectionPolicy) -> list[float]:
        """Of each window under a policy."""
        own = self._log_probabilities(policy)
        return [
            float((dense.exp() * (dense - other)).sum(-1).double().mean())
            for dense, other in zip(self._dense, own, strict=True)
        ]

    @torch.inference_mode()
    def _log_probabilities(self, policy: SelectionPolicy) -> list[Tensor]:
        """Float32[R, V] of each window."""
        decoder, item = self._subject.scorer.decoder, self._windows[0].item
        prompt_len, length = len(item.prompt_ids), item.num_tokens
        texts = [[*window.item.prompt_ids, *window.item.output_ids] for window in self._windows]
        ids = torch.tensor(texts, device=decoder.device)
        attend = LayerwiseAttend(
            self._subject.scorer, policy, self._subject.codec(BASELINE), len(ids), prompt_len, length
        )
        positions = torch.arange(length, device=decoder.device).expand_as(ids)
        hidden = decoder.forward(ids, positions, attend, torch.full_like(ids, length))
        return [
            torch.cat([decoder.logits(rows).log_softmax(-1) for rows in row[prompt_len - 1 : -1].split(LOGIT_ROWS)])
            for row in hidden
        ]
