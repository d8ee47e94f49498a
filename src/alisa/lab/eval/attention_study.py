"""How sparse attention is, and how well each policy follows it: the analysis of ALISA's section 3, for any policy.

weight sparsity   share of a row's weights below 1 % of its largest (figure 3), by layer and by place in the window
captured          share of the dense weight that lies on what a policy reads
spearman          rank correlation, over tokens, of the weight they get on average under the policy and under dense
                  attention (figure 4)
overlap           share of what a step reads that the step before has read too: what prefetching can rely on
entering          tokens a step reads that the step before has not, the new token aside: what must be fetched
returning         share of what is read that no step of the last k had read; 0: forgotten tokens stay forgotten
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from alisa.budget import Budget
from alisa.errors import InputError
from alisa.lab.eval.documents import read_documents
from alisa.lab.eval.measurement import UnitResults, fingerprint
from alisa.lab.eval.ranks import spearman
from alisa.lab.eval.shadow import ShadowAttend, ShadowLayer
from alisa.lab.eval.statistics import Estimate, difference, mean
from alisa.lab.eval.subject import Subject, Variant
from alisa.lab.eval.windows import Window, cut_windows

SMALL_SHARE = 0.01
"""A weight below this share of its row's largest counts as zero (ALISA, section 3)."""

NUM_STEP_CLASSES = 8
"""Parts that the decoded tokens of a window are grouped into."""

_WEIGHTS_BYTES = 1 << 28
"""Most memory for the attention weights of one layer."""


@dataclass
class LayerFigures:
    """Means over the windows seen so far, one entry for each window."""

    captured: list[float] = field(default_factory=list)
    captured_by_step: list[list[float]] = field(default_factory=list)
    weight_sparsity_by_step: list[list[float]] = field(default_factory=list)
    spearman: list[float] = field(default_factory=list)
    overlap: list[float] = field(default_factory=list)
    entering: list[float] = field(default_factory=list)
    returning: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class AttentionStudy:
    """Windows of a text; a unit is the share of dense weight that a policy captures in one of them."""

    task: str
    windows: Sequence[Window]
    settings: Mapping[str, object]
    kind = "sparsity"
    metric = "captured mass"

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.windows[0].item.num_tokens

    def measure(self, subject: Subject, variant: Variant) -> UnitResults:
        """Run the windows densely and let the policy look on."""
        prompt_len = len(self.windows[0].item.prompt_ids)
        num_rows = self.length - prompt_len
        recent = torch.tensor([Budget(variant.sparsity).recent(prompt_len + row) for row in range(num_rows)])
        layers = [LayerFigures() for _ in range(subject.spec.attention.full_layers().num_layers)]

        def tell(found: ShadowLayer) -> None:
            _add(layers[found.layer], found, recent.to(found.read.device), prompt_len)

        at_once = max(1, _WEIGHTS_BYTES // (4 * subject.spec.num_heads * num_rows * self.length))
        for start in range(0, len(self.windows), at_once):
            items = [window.item for window in self.windows[start : start + at_once]]
            self._run(subject, variant, [[*item.prompt_ids, *item.output_ids] for item in items], prompt_len, tell)
        units = [mean([layer.captured[index] for layer in layers]).value for index in range(len(self.windows))]
        return UnitResults(units, _details(layers))

    def value(self, units: Sequence[float]) -> Estimate:
        """Captured share of the dense weight."""
        return mean(units)

    def versus(self, units: Sequence[float], baseline: Sequence[float]) -> Estimate:
        """Minus the share that is lost."""
        return difference(units, baseline)

    @torch.inference_mode()
    def _run(
        self,
        subject: Subject,
        variant: Variant,
        ids: list[list[int]],
        prompt_len: int,
        tell: Callable[[ShadowLayer], None],
    ) -> None:
        codec = subject.codec(variant)
        decoder = subject.scorer.decoder.for_rows(codec.format.dtype)
        tokens = torch.tensor(ids, device=decoder.device)
        positions = torch.arange(self.length, device=decoder.device).expand_as(tokens)
        attend = ShadowAttend(
            subject.scorer,
            variant.selection_policy(),
            codec,
            num_seqs=len(ids),
            prompt_len=prompt_len,
            length=self.length,
            tell=tell,
        )
        decoder.forward(tokens, positions, attend, torch.full_like(tokens, self.length))


def attention_study_of(subject: Subject, path: Path, *, context: int, prefill: int, num_windows: int) -> AttentionStudy:
    """The study of one text; arguments as for perplexity.

    Raises:
        InputError: the text, or a length, is not usable.
    """
    subject.check_length(context, "A window of --context")
    if subject.spec.attention.full_layers().num_layers == 0:
        raise InputError(f"every layer of {subject.name} has a sliding window and reads it whole: nothing is chosen.")
    if not 1 <= prefill <= context - 2 * NUM_STEP_CLASSES:
        raise InputError(f"--prefill is {prefill}; allowed is 1 up to {context - 2 * NUM_STEP_CLASSES} of {context}.")
    windows = cut_windows(subject.tokenizer, read_documents(path), context=context, prefill=prefill, count=num_windows)
    settings = {
        "context": context,
        "prefill": prefill,
        "windows": len(windows),
        "text": fingerprint([window.item for window in windows]),
    }
    return AttentionStudy(path.name, windows, settings)


def _add(figures: LayerFigures, found: ShadowLayer, recent: Tensor, prompt_len: int) -> None:
    """Add the windows of one layer."""
    captured = (found.weights * found.read_by_head).sum(dim=-1).mean(dim=1)  # [B, R]
    figures.captured += captured.mean(dim=1).tolist()
    figures.captured_by_step += _by_step(captured)
    figures.weight_sparsity_by_step += _by_step(_small_share(found.weights, prompt_len))
    figures.spearman += _correlations(found, prompt_len)
    entering, returning = _movements(found.read, recent, prompt_len)
    count = found.read.sum(dim=-1).float()  # [B, J, R]
    later = (entering.sum(-1) / (count[:, :, 1:] - 1).clamp_min(1)).mean(dim=(1, 2))
    figures.overlap += (1 - later).tolist()
    figures.entering += entering.sum(dim=-1).float().mean(dim=(1, 2)).tolist()
    figures.returning += (returning.sum(-1) / count[:, :, 1:]).mean(dim=(1, 2)).tolist()


def _small_share(weights: Tensor, prompt_len: int) -> Tensor:
    """Share of each row's weights below 1 % of its largest, mean over heads, [B, R]."""
    small = (weights < SMALL_SHARE * weights.amax(dim=-1, keepdim=True)).sum(dim=-1).float()
    ahead = weights.shape[-1] - prompt_len - 1 - torch.arange(weights.shape[2], device=weights.device)
    visible = prompt_len + 1 + torch.arange(weights.shape[2], device=weights.device)
    return ((small - ahead) / visible).mean(dim=1)


def _correlations(found: ShadowLayer, prompt_len: int) -> list[float]:
    """Spearman of each window: average weight of every token that a later row could read."""
    kept = found.weights * found.read_by_head
    kept = kept / kept.sum(dim=-1, keepdim=True)
    length = kept.shape[-1]
    # Row i is the token prompt_len + i; a token is visible to itself and to those after it.
    num_rows = length - torch.arange(length, device=kept.device).clamp_min(prompt_len)
    dense, sparse = (weights.sum(dim=(1, 2)) / num_rows for weights in (found.weights, kept))
    return [spearman(one, other) for one, other in zip(dense, sparse, strict=True)]


def _movements(read: Tensor, recent: Tensor, prompt_len: int) -> tuple[Tensor, Tensor]:
    """What rows 1 and on read that the row before has not, and what of it no row of the last k has; Bool[B, J, R-1, T].

    A row's own token is new and counts as neither.
    """
    num_rows, length = read.shape[-2:]
    rows = torch.arange(num_rows, dtype=torch.int32, device=read.device)
    own = torch.arange(length, device=read.device) == (prompt_len + rows)[:, None]
    entering = read[:, :, 1:] & ~read[:, :, :-1] & ~own[1:]
    last = torch.where(read, rows[:, None], -1).cummax(dim=2).values[:, :, :-1]
    absent = rows[1:, None] - last - 1
    return entering, entering & (absent >= recent[1:, None])


def _by_step(rows: Tensor) -> list[list[float]]:
    """Means of [B, R] over consecutive parts of the rows, for each window."""
    return torch.stack([part.mean(dim=1) for part in rows.tensor_split(NUM_STEP_CLASSES, dim=1)], dim=1).tolist()


def _details(layers: Sequence[LayerFigures]) -> dict[str, object]:
    """Means over windows, by layer and over all layers."""

    def by_step(name: str) -> list[list[float]]:
        tables = [torch.tensor(getattr(layer, name)).mean(dim=0).tolist() for layer in layers]
        return [[round(value, 5) for value in table] for table in tables]

    details: dict[str, object] = {
        "weight_sparsity_by_layer_and_step": by_step("weight_sparsity_by_step"),
        "captured_by_layer_and_step": by_step("captured_by_step"),
    }
    for name in ("spearman", "overlap", "entering", "returning"):
        by_layer = [mean(getattr(layer, name)).value for layer in layers]
        details[name] = round(mean(by_layer).value, 6)
        details[f"{name}_by_layer"] = [round(value, 5) for value in by_layer]
    return details
