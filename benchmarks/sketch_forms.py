"""Whether the sketch of the keys may be smaller: on some channels only, or in bit planes that are not all read.

    python benchmarks/sketch_forms.py --model SMOLLM2 --calibration BOOK --text DATA/wikitext2 \
        --record benchmarks/results/sketch_forms.jsonl

A form says what is known of a key. All forms are in plain torch here, with the same 2-bit copies of the values for the
tokens that are not read, and tokens that are read are read in full:

    4 bits             as `sketch` is
    3 bits             the cheaper copy that needs nothing else
    75 %, 60 %         ThinK (2407.21018): 4 bits of some channels of each KV head. Once for the model and not for each
                       prompt, because a copy is made when its token comes: the channels with the largest
                       (sum over query heads of mean q^2) * var k on another text. The mean of a channel that is left
                       out is the same for all tokens, so that no softmax sees it.
    75 % pairs, ...    the same with whole rotary pairs
    2 + 2 planes       bit planes (2409.17870): the upper two bits of all tokens rank them, the twice as many best as
                       are read get the lower two as well, and the best of these are read; the others keep their weight
                       by two bits

What is found on windows of a text: perplexity, and KL(dense || form), which tells smaller differences; both against
"4 bits" by pairs. `bytes` are those of a key's copy that a step reads, of one token and KV head; the value's are the
same for all. `kernel` is the time of the native kernel that ranks heads of as many values as a form has channels, over
that of whole ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from time import thread_time

import torch
from recording import tell
from torch import Tensor

from alisa.config import EngineConfig
from alisa.kernels.base import Attended, Chosen, Ranking, SelectionKernels, Sketch
from alisa.kernels.choose import choose_backend
from alisa.kernels.reference.sketch import token_ids, value_not_read, weight_read
from alisa.kernels.reference.softcap import softcapped
from alisa.lab.bench.stamp import current_stamp
from alisa.lab.eval.documents import read_documents
from alisa.lab.eval.layerwise import LayerwiseAttend, dense_attention
from alisa.lab.eval.statistics import difference, exponential, mean
from alisa.lab.eval.subject import BASELINE, Subject
from alisa.lab.eval.windows import Window, cut_windows
from alisa.llm import LLM
from alisa.policy.base import PolicyState, SelectionPolicy
from alisa.policy.registry import make_policy
from alisa.policy.sketch import KeySketch, KeyState
from alisa.policy.state_bytes import VALUE_BITS, key_bits, num_parts
from alisa.spec import AttentionShape


@dataclass(frozen=True, eq=False)
class Form:
    """What a sketch keeps of the keys."""

    name: str
    bits: int
    planes: int | None = None
    """Bits that are read of all tokens; None: all."""
    channels: tuple[Tensor, ...] = ()
    """Of each layer Int64[G, n], ascending: those that are kept; empty: all."""

    def key_bytes(self, head_dim: int, read: float) -> float:
        """Bytes read for a token and KV head, its range included; `read` is the share of tokens that are refined."""
        width = self.channels[0].shape[1] if self.channels else head_dim
        bits = self.bits if self.planes is None else self.planes + (self.bits - self.planes) * read
        return width * bits / 8 + 4 * num_parts(head_dim)


@dataclass(frozen=True)
class FormPolicy(KeySketch):
    """`sketch` with keys of some form."""

    form: Form | None = None
    layer: int = 0

    def of_layer(self, layer: int) -> FormPolicy:
        """Forms differ by layer."""
        return replace(self, layer=layer)

    def start(
        self,
        shape: AttentionShape,
        *,
        max_num_seqs: int,
        num_tokens: int,
        max_len: int,
        device: torch.device,
        kernels: SelectionKernels,
    ) -> PolicyState:
        """Of one layer."""
        return FormState(self, shape, kernels, max_num_seqs=max_num_seqs, num_tokens=num_tokens, device=device)


class FormState(KeyState):
    """What the codes stand for, Float32[1, T, G, D]: keys, keys by the upper planes alone, and values."""

    def __init__(
        self,
        policy: FormPolicy,
        shape: AttentionShape,
        kernels: SelectionKernels,
        *,
        max_num_seqs: int,
        num_tokens: int,
        device: torch.device,
    ) -> None:
        super().__init__(policy, shape, kernels, max_num_seqs=max_num_seqs, num_tokens=num_tokens, device=device)
        assert policy.form is not None, "there is one"
        self._form = policy.form
        self._channels = policy.form.channels[policy.layer] if policy.form.channels else None
        self._scale, self._parts = shape.scale, num_parts(shape.head_dim)
        size = (shape.num_kv_heads, shape.head_dim)
        self._fine, self._coarse, self._values = (self._new_table((1,), size, torch.float32)[0] for _ in range(3))
        self._rest = torch.empty(0)

    def combine(self, layer: int, attended: Attended) -> Tensor:
        """As `sketch` does."""
        return self._kernels.rest_blend(attended.out, self._shares, self._rest)

    def _keep(self, layer: int, ids: Tensor, keys: Tensor, values: Tensor) -> None:
        form, kept = self._form, keys.float()
        if self._channels is not None:
            index = self._channels.expand(len(keys), -1, -1)
            few = rounded(kept.gather(-1, index), form.bits, self._parts)
            kept = torch.zeros_like(kept).scatter_(-1, index, few)
        else:
            kept = rounded(kept, form.bits, self._parts)
        self._fine.index_copy_(0, ids, kept)
        if form.planes is not None:
            self._coarse.index_copy_(0, ids, rounded(keys.float(), form.bits, self._parts, form.planes))
        self._values.index_copy_(0, ids, rounded(values.float(), VALUE_BITS, self._parts))

    def _choose(self, layer: int, query: Tensor, ranking: Ranking) -> Chosen:
        ids = token_ids(ranking.starts, ranking.lengths, ranking.width)
        logits = self._logits(query, self._fine.index_select(0, ids), ranking)
        older_counts, among = ranking.older_counts, None
        if self._form.planes is not None:
            coarse = self._logits(query, self._coarse.index_select(0, ids), ranking)
            more = (2 * older_counts).minimum(ranking.older_ends)
            counts = ranking.counts - older_counts + more
            best = self._best(coarse.softmax(-1), ranking, more, counts)
            real = torch.arange(best.shape[1]) < counts[:, None]
            among = torch.zeros(len(best), ranking.width + 1, dtype=torch.bool)
            among = among.scatter_(1, torch.where(real, best, ranking.width).long(), value=True)[:, :-1]
            logits = torch.where(among[:, None], logits, coarse)
        weights = logits.softmax(-1)
        positions = self._best(weights, ranking, older_counts, ranking.counts, among)
        self._rest = value_not_read(weights, self._values.index_select(0, ids), positions, ranking.counts)
        shares = weight_read(weights, positions, ranking.counts, ranking.lengths)
        return Chosen(positions, shares, ranking.counts)

    def _logits(self, query: Tensor, keys: Tensor, ranking: Ranking) -> Tensor:
        """Float32[B, H, S] of query `[B, H, D]` and keys Float32[B * S, G, D]; channels that are not kept are 0."""
        num_seqs, num_heads, head_dim = query.shape
        keys = keys.view(num_seqs, -1, *keys.shape[1:]).permute(0, 2, 3, 1)
        grouped = query.float().view(num_seqs, keys.shape[1], -1, head_dim) * self._scale
        scores = grouped @ keys
        if ranking.softcap is not None:
            scores = softcapped(scores, ranking.softcap)
        hidden = torch.arange(keys.shape[-1]) >= ranking.lengths[:, None]
        return scores.masked_fill(hidden[:, None, None], -torch.inf).view(num_seqs, num_heads, -1)

    def _best(
        self, weights: Tensor, ranking: Ranking, older: Tensor, counts: Tensor, among: Tensor | None = None
    ) -> Tensor:
        """Positions Int32[B, K] by weights Float32[B, H, S] of all heads; None: among all."""
        scores = weights.sum(dim=1)
        if among is not None:
            scores = scores.masked_fill(~among, -1.0)
        starts = torch.arange(len(counts)) * ranking.width
        return self._kernels.select(
            scores.reshape(-1), starts, ranking.older_ends, older, counts, int(counts.max()), ranking.width
        )


def rounded(vectors: Tensor, bits: int, parts: int, planes: int | None = None) -> Tensor:
    """What codes of so many bits between minimum and maximum of each part of a head stand for, `[N, G, D]`.

    As `alisa.kernels.reference.sketch.make_sketch`, for any number of bits. With `planes` only so many upper bits are
    known, and the others are taken to be in the middle.
    """
    values = vectors.unflatten(-1, (parts, -1))
    low, high = values.aminmax(dim=-1, keepdim=True)
    minimum = low.half().float()
    step = ((high - minimum) / (2**bits - 1)).half().float()
    codes = ((values - minimum) / step.where(step > 0, torch.ones(()))).round().clamp(0, 2**bits - 1)
    if planes is not None:
        left = 2 ** (bits - planes)
        codes = codes.div(left, rounding_mode="floor") * left + (left - 1) / 2
    return (minimum + step * codes).flatten(-2)


@torch.inference_mode()
def channel_scores(subject: Subject, windows: Sequence[Window]) -> list[Tensor]:
    """What each channel of each KV head adds to the spread of scores, Float32[G, D], for each layer that chooses."""
    decoder, shape = subject.scorer.decoder, subject.spec.attention
    scores: list[Tensor] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        window = shape.window(layer)
        if window is None:
            squares = q.float().square().mean(dim=(0, 1)).view(k.shape[2], -1, k.shape[3]).sum(dim=1)
            # The first key lies far from all others, and is read in any case.
            scores.append(squares * k[:, 1:].float().flatten(0, 1).var(dim=0))
        return torch.stack([dense_attention(*each, window, shape.softcap) for each in zip(q, k, v, strict=True)])

    ids = torch.tensor([[*window.item.prompt_ids, *window.item.output_ids] for window in windows])
    decoder.forward(ids, torch.arange(ids.shape[1]).expand_as(ids), attend, torch.full_like(ids, ids.shape[1]))
    return scores


def kept_channels(scores: Sequence[Tensor], share: float, parts: int, *, pairs: bool) -> tuple[Tensor, ...]:
    """The best channels of each layer and KV head, Int64[G, n]; `pairs`: a channel and the one half a head after it."""
    found = []
    for layer in scores:
        count = int(share * layer.shape[1]) // (2 * parts) * 2 * parts
        if pairs:
            halves = layer.unflatten(1, (2, -1)).sum(dim=1)
            best = halves.topk(count // 2, dim=1).indices
            best = torch.cat((best, best + halves.shape[1]), dim=1)
        else:
            best = layer.topk(count, dim=1).indices
        found.append(best.sort(dim=1).values)
    return tuple(found)


class Measure:
    """Perplexity, and divergence from dense attention, of each of some windows of equal length.

    Args:
        subject: the model.
        windows: their dense distributions are kept, `4 * V` bytes a token.
    """

    def __init__(self, subject: Subject, windows: Sequence[Window]) -> None:
        self._subject, self._windows = subject, windows
        self._dense: list[Tensor] = []
        self.dense_nats, _ = self(BASELINE.selection_policy())

    @torch.inference_mode()
    def __call__(self, policy: SelectionPolicy) -> tuple[list[float], list[float]]:
        """Negative log likelihoods and divergences, in nats a token; the first call is that of dense attention."""
        decoder, item = self._subject.scorer.decoder, self._windows[0].item
        prompt_len, length = len(item.prompt_ids), item.num_tokens
        ids = torch.tensor([[*window.item.prompt_ids, *window.item.output_ids] for window in self._windows])
        codec = self._subject.codec(BASELINE)
        attend = LayerwiseAttend(self._subject.scorer, policy, codec, len(ids), prompt_len, length)
        hidden = decoder.forward(ids, torch.arange(length).expand_as(ids), attend, torch.full_like(ids, length))
        nats, divergences = [], []
        for index, (row, tokens) in enumerate(zip(hidden[:, prompt_len - 1 : -1], ids[:, prompt_len:], strict=True)):
            own = torch.cat([decoder.logits(some).log_softmax(-1) for some in row.split(256)])
            nats.append(-float(own.gather(1, tokens[:, None]).double().mean()))
            if len(self._dense) <= index:
                self._dense.append(own)
            dense = self._dense[index]
            divergences.append(float((dense.exp() * (dense - own)).sum(-1).double().mean()))
        return nats, divergences


def kernel_times(head_dims: Sequence[int], num_tokens: int = 4096, rounds: int = 25) -> dict[int, float]:
    """Seconds of this thread for ranking and completing one sequence, 9 heads of 3 KV heads, by length of a head."""
    kernels = choose_backend(torch.device("cpu")).selection
    generator = torch.Generator().manual_seed(0)
    of_lengths = {}
    for head_dim in head_dims:
        shape = AttentionShape(1, 9, 3, head_dim, head_dim**-0.5)
        policy = make_policy("sketch", 0.9)
        state = policy.start(
            shape,
            max_num_seqs=1,
            num_tokens=num_tokens,
            max_len=num_tokens,
            device=torch.device("cpu"),
            kernels=kernels,
        )
        keys, values = (torch.randn(num_tokens, 3, head_dim, generator=generator) for _ in range(2))
        sketches: list[Sketch] = [state._key_sketches[0], state._value_sketches[0]]
        for sketch, vectors in zip(sketches, (keys, values), strict=True):
            kernels.sketch_append(sketch, torch.arange(num_tokens), vectors)
        one = torch.tensor([num_tokens], dtype=torch.int32)
        older = torch.tensor([num_tokens // 20], dtype=torch.int32)
        ranking = Ranking(
            torch.zeros(1, dtype=torch.int64),
            one,
            one - 1 - older,
            older,
            2 * older + 1,
            int(2 * older + 1),
            num_tokens,
            1,
        )
        query = torch.randn(1, 9, head_dim, generator=generator)
        of_lengths[head_dim] = lambda query=query, own=sketches, ranking=ranking: kernels.sketch_select(
            query, own[0], ranking
        )
    times: dict[int, list[float]] = {head_dim: [] for head_dim in head_dims}
    for _ in range(rounds):
        for head_dim, work in of_lengths.items():
            started = thread_time()
            for _ in range(4):
                work()
            times[head_dim].append(thread_time() - started)
    return {head_dim: median(found) for head_dim, found in times.items()}


def main() -> None:
    """All forms at every sparsity."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", type=Path, required=True, help="another text, which says what channels count")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95])
    parser.add_argument("--context", type=int, default=640)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--record", type=Path, help="append the records to this file")
    args = parser.parse_args()
    subject = Subject.of(LLM(config=EngineConfig(model=args.model, dtype=args.dtype)))

    def windows(text: Path, count: int) -> list[Window]:
        documents = read_documents(text)
        return cut_windows(subject.tokenizer, documents, context=args.context, prefill=args.prefill, count=count)

    shape = subject.spec.attention
    parts, bits = num_parts(shape.head_dim), key_bits("auto", shape.head_dim)
    scores = channel_scores(subject, windows(args.calibration, 4))
    forms = [Form(f"{bits} bits", bits), Form(f"{bits - 1} bits", bits - 1)]
    for share in (0.75, 0.6):
        for pairs in (False, True):
            name = f"{100 * share:.0f} % pairs" if pairs else f"{100 * share:.0f} %"
            forms.append(Form(name, bits, channels=kept_channels(scores, share, parts, pairs=pairs)))
    forms.append(Form(f"{bits // 2} + {bits // 2} planes", bits, planes=bits // 2))
    measure = Measure(subject, windows(args.text, args.windows))
    times = (
        kernel_times(sorted({64, *(form.channels[0].shape[1] for form in forms if form.channels)}))
        if parts == 1
        else {}
    )
    for sparsity in args.sparsity:
        base = make_policy("sketch", sparsity)
        own = {"`sketch`": measure(base)}
        for form in forms:
            own[form.name] = measure(FormPolicy(base.budget, form=form))
            print(form.name, sparsity, own[form.name], file=sys.stderr, flush=True)
        found = {}
        four = own[forms[0].name]
        for name, (nats, divergences) in own.items():
            lost, more = exponential(difference(nats, measure.dense_nats)), exponential(difference(nats, four[0]))
            kl, against = mean(divergences), difference(divergences, four[1])
            form = next((form for form in forms if form.name == name), forms[0])
            width = form.channels[0].shape[1] if form.channels else shape.head_dim
            has_kernel = form.bits == bits and form.planes is None
            found[name] = {
                "bytes": round(form.key_bytes(shape.head_dim, 1.5 * (1 - sparsity)), 1),
                "lost": lost.value - 1,
                "lost_error": lost.standard_error,
                "lost_more": more.value - 1,
                "lost_more_error": more.standard_error,
                "kl": kl.value,
                "kl_error": kl.standard_error,
                "kl_more": against.value,
                "kl_more_error": against.standard_error,
                "kernel": round(times[width] / times[64], 3) if has_kernel and width in times else None,
            }
        record = {
            "benchmark": "sketch_forms",
            "model": Path(subject.name).name,
            "sparsity": sparsity,
            "calibration": args.calibration.name,
            "text": args.text.name,
            "context": args.context,
            "prefill": args.prefill,
            "windows": args.windows,
            "dense": exponential(mean(measure.dense_nats)).value,
            "forms": found,
            "stamp": asdict(current_stamp()),
        }
        tell(record, args.record)


if __name__ == "__main__":
    main()
