"""What prompts that are read sparsely would lose: without blocks of keys, or single values, that have little weight.

    python benchmarks/sparse_prefill.py --model MODEL.gguf --text TEXT --record benchmarks/results/sparse_prefill.jsonl

Whole windows are read as prompts are, and every token is scored, so that what a layer lost is in the keys of the next.
The rules, for blocks of 64 keys as the native kernel walks them; the first block, two before a query's own and its own
are read in any case, and what one query head of a KV head reads the others read:

    flash    blocks of 64 queries share a choice: the sum over them of exp(q mean(k) - its maximum) is at least this
             part of the largest (FlashPrefill, 2603.06199)
    means64  each query on its own: the fewest blocks that have this part of its weight, by the mean key of each
    means16  the same by the means of 16 keys each
    exact    the same by the weight itself, which only who has read the keys knows: how good a rule could be
    keys     all keys are read, and values only where the weight is at least this part of the largest so far; the others
             count as the mean of the 16 values that they stand among

Those but `flash` make a query's choice from the query and what lies before its block. So neither the pieces that a
prompt is read in nor its company nor what a prefix cache holds of it would change a token.

What is measured: the divergence from dense attention, KL(dense || rule) in nats a token, perplexity, the weight that is
left out, what a query chooses, and which part of the products with keys and values the kernel would be left with, which
makes those that any of the six rows of a strip wants. The products bound what time could be saved; they do not say what
would be. With `--survey` attention stays dense, and every rule is asked what it would have left out for some of the
tokens: no divergence, but any number of rules for the time of one.

Prints one JSON record for each rule.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import exp, log
from pathlib import Path

import torch
from recording import tell
from torch import Tensor

from alisa.config import EngineConfig
from alisa.engine.loaded import LoadedModel, load_model
from alisa.errors import InputError
from alisa.kernels.base import KeyBlock, PrefillKernel
from alisa.lab.bench.stamp import current_stamp
from alisa.lab.eval.documents import read_documents
from alisa.lab.eval.statistics import difference, exponential, mean
from alisa.lab.eval.windows import Window, cut_windows
from alisa.spec import AttentionShape

BLOCK = 64
"""Keys of a block."""
MEANS = {"flash": BLOCK, "means64": BLOCK, "means16": 16, "keys": 16}
"""Keys, or values, that a mean is of."""
LOCAL = 2
"""Blocks before a query's own that it reads in any case."""
STRIP_ROWS = 6
"""Rows (heads of tokens) that the native kernel takes together."""
QUERIES = 256
"""Tokens whose scores are held at once."""
LOGIT_STRIDE = 4
"""The divergence is that of every fourth token."""
SURVEYED = 8
"""Blocks of queries that a survey asks for, of each layer and window."""

RULES = ("means64=0.98", "means16=0.98", "keys=0.003", "exact=0.95", "flash=0.1", "means16=0.95", "keys=0.01")


@dataclass(frozen=True)
class Rule:
    """What is read of a prompt."""

    kind: str
    parameter: float

    @classmethod
    def parse(cls, text: str) -> Rule:
        """`means16=0.95` and the like.

        Raises:
            InputError: it is no rule.
        """
        kind, _, number = text.partition("=")
        try:
            parameter = float(number)
        except ValueError:
            parameter = 0.0
        if kind not in (*MEANS, "exact") or not 0 < parameter < 1:
            raise InputError(f"{text!r} is not a rule; write for example means16=0.95, with a number between 0 and 1.")
        return cls(kind, parameter)


class WholePrompt:
    """Attention of a whole prompt under a rule, or dense without one, with float32 scores.

    Layers with a window stay as they are.
    """

    def __init__(self, shape: AttentionShape, kernel: PrefillKernel, rule: Rule | None) -> None:
        self._kernel = kernel
        self._shape = shape
        self._rule = rule
        self._seen = self._chosen = self._made = self._left_out = self._rows = 0.0

    @property
    def chosen(self) -> float:
        """The part of the earlier blocks (`keys`: keys) that queries chose, mean over layers and KV heads."""
        return self._chosen / self._seen

    @property
    def left_out(self) -> float:
        """The weight of what is not read (`keys`: of the values that means stand for), mean over all queries."""
        return self._left_out / self._rows

    @property
    def products(self) -> float:
        """The part of the products with earlier keys and values that is left, with those that a choice takes."""
        assert self._rule is not None, "dense attention makes all of them"
        made, kind = self._made / self._seen, self._rule.kind
        if kind == "keys":
            return 0.5 + 0.5 * (made + 1 / MEANS[kind])
        return made + (0.5 / MEANS[kind] if kind in MEANS else 0.0)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        """See `alisa.kernels.base.Attend`."""
        window = self._shape.window(layer)
        if window is not None:
            own = KeyBlock(0, k[0], v[0])
            return self._kernel(q[0], own, len(own.k), lambda: (), 0, 1, window, self._shape.softcap)[0][None]
        ends = range(QUERIES, q.shape[1] + 1, QUERIES)
        return torch.cat([self.part(q[0, end - QUERIES : end], k[0, :end], v[0, :end]) for end in ends])[None]

    def part(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The last tokens `[T, H, D]` of those with keys and values `[N, G, D]`, whole blocks; returns `[T, H, D]`."""
        grouped = q.float().unflatten(1, (k.shape[1], -1)) * q.shape[2] ** -0.5
        return self._part(grouped, k.float(), v.float()).flatten(1, 2).to(q.dtype)

    def _part(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("tghd,ngd->ghtn", q, k)
        above = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        scores[..., -len(q) :].masked_fill_(above, -torch.inf)
        own = torch.arange(len(k) - len(q), len(k)) // BLOCK
        distance = own[:, None] - torch.arange(len(k) // BLOCK)  # [T, blocks]
        if self._rule is not None:
            if self._rule.kind == "keys":
                return self._without_small(self._rule, scores, v, distance > 0)
            kept = self._blocks(self._rule, q, k, scores, distance)
            self._count(kept & (distance > 0), distance > 0, q.shape[2])
            whole = scores.logsumexp(-1)
            scores.unflatten(-1, (-1, BLOCK)).masked_fill_(~kept[..., None], -torch.inf)
            self._leave_out(1 - (scores.logsumexp(-1) - whole).exp())
        return torch.einsum("ghtn,ngd->tghd", scores.softmax(-1), v)

    def _blocks(self, rule: Rule, q: Tensor, k: Tensor, scores: Tensor, distance: Tensor) -> Tensor:
        """Which blocks each query reads, Bool[G, 1, T, blocks]."""
        if rule.kind == "exact":
            weight = scores.unflatten(-1, (-1, BLOCK)).logsumexp(-1)
        else:
            part = MEANS[rule.kind]
            means = k.unflatten(0, (-1, part)).mean(1)
            weight = torch.einsum("tghd,ngd->ghtn", q, means).unflatten(-1, (-1, BLOCK // part)).logsumexp(-1)
        weight = weight.masked_fill(distance <= 0, -torch.inf)
        if rule.kind == "flash":
            least = torch.finfo(weight.dtype).min  # the first block sees none before it
            relative = (weight - weight.amax(-1, keepdim=True).clamp(min=least)).exp()
            total = relative.unflatten(2, (-1, BLOCK)).sum(3)
            kept = total >= rule.parameter * total.amax(-1, keepdim=True)
            kept = kept.repeat_interleave(BLOCK, dim=2)
        else:
            share, order = weight.softmax(-1).nan_to_num(0.0).sort(descending=True)
            before = share.cumsum(-1) - share
            kept = torch.zeros_like(share, dtype=torch.bool).scatter(-1, order, before < rule.parameter)
        kept |= (distance <= LOCAL) | (distance == distance[:, :1])
        return kept.any(1, keepdim=True) & (distance >= 0)

    def _without_small(self, rule: Rule, scores: Tensor, v: Tensor, earlier: Tensor) -> Tensor:
        """Attention `[T, G, H/G, D]` in which small weights of earlier blocks go to means of values."""
        blocks = scores.unflatten(-1, (-1, BLOCK))
        limit = blocks.amax(-1).cummax(-1).values + log(rule.parameter)
        small = ((blocks < limit[..., None]) & earlier[..., None]).flatten(-2)
        weights = scores.softmax(-1)
        self._leave_out((weights * small).sum(-1))
        rest = (weights * small).unflatten(-1, (-1, MEANS[rule.kind])).sum(-1)
        seen = earlier.repeat_interleave(BLOCK, dim=-1)
        kept = ~small & seen
        self._count(kept, seen, scores.shape[1], pairs=True)
        out = torch.einsum("ghtn,ngd->tghd", weights.masked_fill_(small, 0.0), v)
        return out + torch.einsum("ghtn,ngd->tghd", rest, v.unflatten(0, (-1, MEANS[rule.kind])).mean(1))

    def _leave_out(self, weight: Tensor) -> None:
        """These parts `[G, H/G, T]` of the weights of queries are added up."""
        self._left_out += float(weight.sum())
        self._rows += weight.numel()

    def _count(self, kept: Tensor, seen: Tensor, group: int, *, pairs: bool = False) -> None:
        """What queries and strips have chosen of what they see is added up; strips take `pairs` of keys."""
        self._seen += float(seen.sum())
        self._chosen += float(kept.float().mean((0, 1)).sum())
        # A strip of a power of two tokens, about as many as it holds.
        tokens = 1 << round(log(max(STRIP_ROWS / group, 1), 2))
        strips = kept.any(1).unflatten(1, (-1, tokens)).any(2)
        if pairs:
            strips = strips.unflatten(-1, (-1, 2)).any(-1).repeat_interleave(2, dim=-1)
        of_each = seen.unflatten(0, (-1, tokens)).sum(1)
        self._made += float((strips * of_each).float().mean(0).sum())


class Survey:
    """Dense attention as the engine computes it, of which some tokens are asked for under every rule, too."""

    def __init__(self, shape: AttentionShape, kernel: PrefillKernel, rules: Sequence[Rule]) -> None:
        self._kernel = kernel
        self._shape = shape
        self.prompts = [WholePrompt(shape, kernel, rule) for rule in rules]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        """See `alisa.kernels.base.Attend`."""
        if self._shape.window(layer) is None:
            step = max(q.shape[1] // BLOCK // SURVEYED, 1) * BLOCK
            for end in range(step, q.shape[1] + 1, step):
                for prompt in self.prompts:
                    prompt.part(q[0, end - BLOCK : end], k[0, :end], v[0, :end])
        own, window = KeyBlock(0, k[0], v[0]), self._shape.window(layer)
        return self._kernel(q[0], own, len(own.k), lambda: (), 0, 1, window, self._shape.softcap)[0][None]


def survey(model: LoadedModel, windows: Sequence[Window], rules: Sequence[Rule]) -> list[dict[str, object]]:
    """What records say of the rules where nothing but dense attention was computed."""
    asked = Survey(model.spec.attention, model.backend.prefill, rules)
    for window in windows:
        hidden_states(model, ids_of(window), asked)
    return [_of_rule(rule, prompt) for rule, prompt in zip(rules, asked.prompts, strict=True)]


def _of_rule(rule: Rule, prompt: WholePrompt) -> dict[str, object]:
    return {
        "rule": rule.kind,
        "parameter": rule.parameter,
        "left_out": round(prompt.left_out, 5),
        "chosen": round(prompt.chosen, 4),
        "products": round(prompt.products, 4),
    }


def ids_of(window: Window) -> Tensor:
    """All tokens of a window, Int64[T]."""
    return torch.tensor([*window.item.prompt_ids, *window.item.output_ids])


@torch.inference_mode()
def hidden_states(model: LoadedModel, ids: Tensor, attend: WholePrompt | Survey) -> Tensor:
    """Hidden states `[T, C]`, ready for the logits, of tokens that are read as one prompt."""
    positions = torch.arange(len(ids))[None]
    return model.decoder.forward(ids[None], positions, attend, torch.full_like(positions, len(ids)))[0]


class Scores:
    """Dense attention and rules on the same windows."""

    def __init__(self, model: LoadedModel, windows: Sequence[Window]) -> None:
        self._model = model
        self._ids = [ids_of(window) for window in windows]
        dense = WholePrompt(model.spec.attention, model.backend.prefill, None)
        self._dense = [hidden_states(model, ids, dense) for ids in self._ids]
        self.dense_nll = [self._nll(ids, hidden) for ids, hidden in zip(self._ids, self._dense, strict=True)]

    def of(self, rule: Rule) -> dict[str, object]:
        """What a record says of a rule."""
        attend = WholePrompt(self._model.spec.attention, self._model.backend.prefill, rule)
        divergences: list[float] = []
        nll: list[float] = []
        most = 0.0
        for ids, dense in zip(self._ids, self._dense, strict=True):
            hidden = hidden_states(self._model, ids, attend)
            divergence = self._divergence(dense, hidden)
            divergences.append(float(divergence.mean()))
            most = max(most, float(divergence.max()))
            nll.append(self._nll(ids, hidden))
        kl, lost = mean(divergences), exponential(difference(nll, self.dense_nll))
        one = len(nll) == 1
        return {
            **_of_rule(rule, attend),
            "perplexity": exp(mean(self.dense_nll).value),
            "kl": kl.value,
            "kl_error": None if one else kl.standard_error,
            "kl_most": most,
            "lost": lost.value - 1,
            "lost_error": None if one else lost.standard_error,
        }

    @torch.inference_mode()
    def _nll(self, ids: Tensor, hidden: Tensor) -> float:
        """Nats a token."""
        total = 0.0
        for rows, wanted in zip(hidden[:-1].split(QUERIES), ids[1:].split(QUERIES), strict=True):
            total += float(torch.nn.functional.cross_entropy(self._model.decoder.logits(rows), wanted, reduction="sum"))
        return total / (len(ids) - 1)

    @torch.inference_mode()
    def _divergence(self, dense: Tensor, hidden: Tensor) -> Tensor:
        """Float64[N] of every fourth token."""
        found = []
        for ours, theirs in zip(
            hidden[::LOGIT_STRIDE].split(QUERIES), dense[::LOGIT_STRIDE].split(QUERIES), strict=True
        ):
            wanted = self._model.decoder.logits(theirs).log_softmax(-1)
            found.append((wanted.exp() * (wanted - self._model.decoder.logits(ours).log_softmax(-1))).sum(-1))
        return torch.cat(found).double()


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="as for alisa generate; the model inside the package without it")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rules", nargs="+", default=RULES)
    parser.add_argument("--survey", action="store_true", help="ask all rules in one dense pass")
    parser.add_argument("--record", type=Path, help="append the records to this file")
    options = parser.parse_args()
    rules = [Rule.parse(text) for text in options.rules]
    if options.context % QUERIES:
        raise InputError(f"--context is {options.context}; give a multiple of {QUERIES}.")
    model = load_model(EngineConfig(model=options.model, dtype=options.dtype, weight_dtype="float"))
    shape = model.spec.attention
    if shape.softcap is not None or shape.has_sinks or model.tokenizer is None:
        raise InputError("The rules are written for models with a tokenizer and without caps of scores or sinks.")
    documents = read_documents(options.text)
    windows = cut_windows(model.tokenizer, documents, context=options.context, prefill=1, count=options.windows)
    if options.survey:
        found: Iterator[dict[str, object]] = iter(survey(model, windows, rules))
    else:
        scores = Scores(model, windows)
        found = (scores.of(rule) for rule in rules)
    for figures in found:
        record = {
            "kind": "sparse-prefill",
            "model": Path(model.name).name,
            "text": options.text.name,
            "context": options.context,
            "windows": len(windows),
            **figures,
            "stamp": asdict(current_stamp()),
        }
        tell(record, options.record)


if __name__ == "__main__":
    main()
