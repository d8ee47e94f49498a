"""Teacher-forced scoring layer by layer: all tokens of a window pass the decoder at once.

Decoding feeds one token through all layers and then the next. When the tokens are given, the order may be turned: all
tokens pass layer 0, then layer 1, and so on. Every linear layer is then one large product that reads the weights once,
instead of once per token, which is what makes scoring with a large model slow. What is read by attention stays as it
is: every layer passes through a session of its own (`LayerSession`), the prompt densely, as prefill does, and then as
decode steps do: row by row, or several rows in a step as where drafts are verified, which gives the same bits.

It holds for policies whose layers do not look at each other, which is true of all in `alisa.policy`; a policy that
chooses from another layer's attention would have to be decoded. Rounding differs from that of decoding, because the
products have other shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from alisa.attention.build import build_session
from alisa.budget import state_tokens
from alisa.cache.manager import CacheManager
from alisa.cache.store import KVStore
from alisa.errors import InputError
from alisa.kernels.base import Codec, KeyBlock, Selection
from alisa.kernels.reference.prefill import prefill_attention
from alisa.lab.scoring import ScoredItem, ScoredOutput, Scorer, groups
from alisa.outputs import Phase
from alisa.policy.base import SelectionPolicy
from alisa.policy.dense import Dense
from alisa.scheduler.plan import Opened, ScheduledChunk, StepPlan

LOGITS_BYTES = 1 << 28
"""Most memory for logits that are held at once."""
STEP_TOKENS = 64
"""Tokens, of all sequences, that a decode step makes where the policy allows more than one of each."""


@torch.inference_mode()
def score_layerwise(
    scorer: Scorer, policy: SelectionPolicy, codec: Codec, items: Sequence[ScoredItem]
) -> list[ScoredOutput]:
    """What `Scorer.score` gives for items that all have the same prompt and output lengths.

    Rows of one layer are held at a time, so that the cap allows larger batches.
    """
    assert len({(len(item.prompt_ids), len(item.output_ids)) for item in items}) == 1, "items differ in length"
    most_tokens = scorer.kv_cap_bytes // codec.format.row_bytes
    sizes = [item.num_tokens for item in items]
    outputs: list[ScoredOutput] = []
    for batch in groups(range(len(items)), sizes, most_tokens, scorer.max_batch):
        outputs += _score_batch(scorer, policy, codec, [items[index] for index in batch])
    return outputs


def _score_batch(
    scorer: Scorer, policy: SelectionPolicy, codec: Codec, items: Sequence[ScoredItem]
) -> list[ScoredOutput]:
    decoder = scorer.decoder.for_rows(codec.format.dtype)
    ids = torch.tensor([[*item.prompt_ids, *item.output_ids] for item in items], device=decoder.device)
    positions = torch.arange(ids.shape[1], device=decoder.device).expand_as(ids)
    attend = LayerwiseAttend(scorer, policy, codec, len(items), len(items[0].prompt_ids), ids.shape[1])
    hidden = decoder.forward(ids, positions, attend, torch.full_like(ids, ids.shape[1]))
    rows_at_once = max(1, LOGITS_BYTES // (4 * decoder.spec.vocab_size))
    first = len(items[0].prompt_ids) - 1
    outputs: list[ScoredOutput] = []
    for row, tokens in zip(hidden[:, first:-1], ids[:, first + 1 :], strict=True):
        likelihoods: list[Tensor] = []
        greedy: list[Tensor] = []
        for states, wanted in zip(row.split(rows_at_once), tokens.split(rows_at_once), strict=True):
            logits = decoder.logits(states)
            likelihoods.append(logits.log_softmax(dim=-1).gather(1, wanted[:, None])[:, 0].cpu())
            greedy.append((logits.argmax(dim=-1) == wanted).cpu())
        tokens_read = attend.tokens_read[len(outputs)]
        outputs.append(ScoredOutput(torch.cat(likelihoods), torch.cat(greedy), tokens_read))
    return outputs


class LayerwiseAttend:
    """Attention of whole sequences of equal length: a dense prompt, then row by row what the policy selects.

    Args:
        scorer: gives the decoder's spec and the kernels.
        policy: asked anew in every layer.
        codec: what the rows go through.
        num_seqs: B.
        prompt_len: tokens of the dense part.
        length: T, tokens of each sequence.
    """

    def __init__(
        self, scorer: Scorer, policy: SelectionPolicy, codec: Codec, num_seqs: int, prompt_len: int, length: int
    ) -> None:
        self._sessions = layer_sessions(scorer, policy, codec, num_seqs, prompt_len, length)
        self._shape = scorer.decoder.spec.attention
        self._codec = codec
        self._reads_all = isinstance(policy, Dense)
        self._num_seqs, self._prompt_len, self._length = num_seqs, prompt_len, length
        self.tokens_read = [0] * num_seqs
        """By each sequence, summed over decode steps and layers."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        """One layer: q `[B, T, H, D]`, k and v `[B, T, G, D]`, returns `[B, T, H, D]`."""
        out = torch.empty_like(q)
        window = self._shape.window(layer)
        if window is not None:
            prompts = (values[:, : self._prompt_len] for values in (q, k, v))
            for seq, (queries, keys, values) in enumerate(zip(*prompts, strict=True)):
                out[seq, : self._prompt_len] = dense_attention(queries, keys, values, window, self._shape.softcap)
        else:
            out[:, : self._prompt_len] = self._session(layer).prefill(q, k, v, hidden)
        if self._reads_all or window is not None:
            self._read_all(q, k, v, window, out)
            lengths = range(self._prompt_len + 1, self._length + 1)
            read = sum(lengths) if window is None else sum(min(length, window) for length in lengths)
            self.tokens_read = [count + read for count in self.tokens_read]
        else:
            session = self._session(layer)
            for start, end in session.steps():
                out[:, start:end] = session.decode(start, end, q, k, v, hidden)
                for token, count in enumerate(session.selection.num_tokens):
                    self.tokens_read[token // (end - start)] += count
        return out

    def _session(self, layer: int) -> LayerSession:
        """That of a layer without a window."""
        return self._sessions[self._shape.among_full(layer)]

    def _read_all(self, q: Tensor, k: Tensor, v: Tensor, window: int | None, out: Tensor) -> None:
        """Everything after the prompt attends to all that its layer sees: no need to go row by row."""
        for seq in range(self._num_seqs):
            keys, values = self._codec.decode(self._codec.encode(k[seq], v[seq]))
            keys, values = keys.to(q.dtype), values.to(q.dtype)
            attended = dense_attention(q[seq], keys, values, window, self._shape.softcap)
            out[seq, self._prompt_len :] = attended[self._prompt_len :]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, softcap: float | None) -> Tensor:
    """Attention of a whole sequence, q `[T, H, D]`, k and v `[T, G, D]` -> `[T, H, D]`; no choice is made."""
    return prefill_attention(q, KeyBlock(0, k, v), len(k), tuple, 0, 1, window, softcap)[0]


def layer_sessions(
    scorer: Scorer, policy: SelectionPolicy, codec: Codec, num_seqs: int, prompt_len: int, length: int
) -> list[LayerSession]:
    """A `LayerSession` for each layer without a window; layers with the same budget share one."""
    layers = range(scorer.decoder.spec.attention.full_layers().num_layers)
    policies = [policy.of_layer(layer) for layer in layers]
    sessions = {own: LayerSession(scorer, own, codec, num_seqs, prompt_len, length) for own in dict.fromkeys(policies)}
    return [sessions[own] for own in policies]


class LayerSession:
    """A session of one layer without a window, that whole sequences of equal length pass through, layer after layer.

    Args:
        scorer: gives the decoder's spec and the kernels.
        policy: started anew for every layer.
        codec: what the rows go through.
        num_seqs: B.
        prompt_len: tokens that are read densely.
        length: T, tokens of each sequence.
    """

    def __init__(
        self, scorer: Scorer, policy: SelectionPolicy, codec: Codec, num_seqs: int, prompt_len: int, length: int
    ) -> None:
        decoder, backend = scorer.decoder, scorer.kernels
        if decoder.spec.has_sinks:
            raise InputError(
                "The layers of this model have sinks, and measuring layer by layer knows nothing of them; take --mode "
                "decode."
            )
        self._prompt_len, self._length = prompt_len, length
        # Of policies that could verify drafts, a step reads several tokens as so many steps would, and costs one.
        self._at_once = max(1, STEP_TOKENS // num_seqs) if policy.can_truncate else 1
        self._sequences = tuple(Opened(seq, str(seq), length, prompt_len) for seq in range(num_seqs))
        store = KVStore(
            num_layers=1,
            codec=codec,
            num_rows=num_seqs * length,
            max_num_seqs=num_seqs,
            max_length=length,
            device=decoder.device,
            append=backend.append,
        )
        self._session = build_session(
            CacheManager(store),
            policy,
            backend,
            replace(decoder.spec.attention, num_layers=1, windows=()),
            decoder.device,
            max_num_seqs=num_seqs,
            state_tokens=num_seqs * state_tokens(length),
            max_len=length,
        )
        self._is_open = False

    @property
    def selection(self) -> Selection:
        """What the last decode step read."""
        return self._session.selection

    @property
    def weight_read(self) -> Tensor | None:
        """The part Float32[B, H] of the weight that lies on it, by the policy: `PolicyState.weight_read`."""
        return self._session.state.weight_read(0)

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        """A new layer begins: its prompts are read; the output `[B, prompt_len, H, D]`."""
        indices = tuple(sequence.req_idx for sequence in self._sequences)
        plan = StepPlan(
            0,
            Phase.DEVICE,
            prefill=True,
            chunks=tuple(ScheduledChunk(req_idx, 0, self._prompt_len) for req_idx in indices),
            opened=self._sequences,
            closed=indices if self._is_open else (),
        )
        self._is_open = True
        self._session.begin(plan)
        packed = [values[:, : self._prompt_len].flatten(0, 1)[None] for values in (q, k, v, hidden)]
        out = self._session.attend(0, *packed)
        self._session.end()
        return out.view(len(indices), self._prompt_len, *q.shape[2:])

    def steps(self) -> Iterator[tuple[int, int]]:
        """First token, and the one after the last, of every decode step of a layer."""
        for start in range(self._prompt_len, self._length, self._at_once):
            yield start, min(start + self._at_once, self._length)

    def decode(self, start: int, end: int, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        """These tokens of every sequence, as a decode step makes them; the output `[B, end - start, H, D]`.

        Only policies that can take tokens back have more than one of a sequence in a step.
        """
        chunks = tuple(ScheduledChunk(sequence.req_idx, start, end - start) for sequence in self._sequences)
        self._session.begin(StepPlan(start, Phase.DEVICE, prefill=False, chunks=chunks))
        out = self._session.attend(0, *(values[:, start:end].flatten(0, 1)[:, None] for values in (q, k, v, hidden)))
        self._session.end()
        return out[:, 0].unflatten(0, (len(chunks), end - start))
