"""Teacher-forced scoring layer by layer: all tokens of a window pass the decoder at once.

Decoding feeds one token through all layers and then the next. When the tokens are given, the order may be turned: all
tokens pass layer 0, then layer 1, and so on. Every linear layer is then one large product that reads the weights once,
instead of once per token, which is what makes scoring with a large model slow. What is read by attention stays as it
is: in each layer the policy is asked row by row, sees the keys, queries and attention weights of the rows before, and
the row attends through the same kernel to the same encoded bytes. The prompt part is dense, as prefill is.

It holds for policies whose layers do not look at each other, which is true of all in `alisa.policy`; a policy that
chooses from another layer's attention would have to be decoded. Rounding differs from that of decoding, because the
products have other shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alisa.kernels.base import Codec, StepBatch
from alisa.kernels.reference.prefill import causal_attention, causal_mass
from alisa.lab.scoring import ScoredItem, ScoredOutput, Scorer, groups
from alisa.policy.base import SelectionPolicy
from alisa.policy.dense import Dense

LOGITS_BYTES = 1 << 28
"""Most memory for logits that are held at once."""


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
    decoder = scorer.decoder
    ids = torch.tensor([[*item.prompt_ids, *item.output_ids] for item in items], device=decoder.device)
    positions = torch.arange(ids.shape[1], device=decoder.device).expand_as(ids)
    attend = LayerwiseAttend(scorer, policy, codec, len(items), len(items[0].prompt_ids), ids.shape[1])
    hidden = decoder.forward(ids, positions, attend)
    rows_at_once = max(1, LOGITS_BYTES // (4 * decoder.spec.vocab_size))
    first = len(items[0].prompt_ids) - 1
    outputs = []
    for row, tokens in zip(hidden[:, first:-1], ids[:, first + 1 :], strict=True):
        likelihoods: list[Tensor] = []
        greedy: list[Tensor] = []
        for states, wanted in zip(row.split(rows_at_once), tokens.split(rows_at_once), strict=True):
            logits = decoder.logits(states)
            likelihoods.append(logits.log_softmax(dim=-1).gather(1, wanted[:, None])[:, 0].cpu())
            greedy.append((logits.argmax(dim=-1) == wanted).cpu())
        outputs.append(ScoredOutput(torch.cat(likelihoods), torch.cat(greedy)))
    return outputs


class LayerwiseAttend:
    """Attention of whole sequences of equal length: a dense prompt, then row by row what the policy selects.

    Args:
        scorer: gives the decoder's spec and the kernels.
        policy: asked anew in every layer; one state serves them all, cleared in between.
        codec: what the rows go through.
        num_seqs: B.
        prompt_len: tokens of the dense part.
        length: T, tokens of each sequence.
    """

    def __init__(
        self, scorer: Scorer, policy: SelectionPolicy, codec: Codec, num_seqs: int, prompt_len: int, length: int
    ) -> None:
        spec, device = scorer.decoder.spec, scorer.decoder.device
        self._policy = policy
        self._codec = codec
        self._kernel = scorer.kernels.attend
        self._prompt_len, self._length = prompt_len, length
        self._num_sets = policy.num_sets(spec)
        self._state = policy.start(spec, num_seqs, length, device, scorer.kernels.selection)
        self._req_indices = tuple(range(num_seqs))
        self._req_index = torch.arange(num_seqs, device=device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        """One layer: q `[B, T, H, D]`, k and v `[B, T, G, D]`, returns `[B, T, H, D]`."""
        rows = self._codec.encode(k.flatten(0, 1), v.flatten(0, 1))
        out = torch.empty_like(q)
        for req_idx in self._req_indices:
            self._state.open(req_idx, self._length)
            self._read_prompt(layer, req_idx, q[req_idx], k[req_idx], v[req_idx], out[req_idx])
        if isinstance(self._policy, Dense):
            self._read_all(q, rows, out)
        else:
            self._decode(layer, q, k, v, rows, out)
        return out

    def _read_prompt(self, layer: int, req_idx: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """Dense causal attention of one sequence's prompt, and the rows that seed the policy."""
        span = slice(self._prompt_len)
        positions = torch.arange(self._prompt_len, device=q.device)
        self._state.remember(layer, torch.full_like(positions, req_idx), positions, k[span], v[span])
        out[span] = causal_attention(q[span], k[span], v[span])
        seed_rows = self._policy.seed_rows(self._prompt_len)
        if seed_rows:
            for first, mass in causal_mass(q[span][-seed_rows:], k[span], self._num_sets):
                self._state.seed(layer, req_idx, first, 0, mass)

    def _read_all(self, q: Tensor, rows: Tensor, out: Tensor) -> None:
        """Everything after the prompt attends to everything before it: no need to go row by row."""
        for req_idx in self._req_indices:
            start = req_idx * self._length
            keys, values = self._codec.decode(rows[start : start + self._length])
            attended = causal_attention(q[req_idx], keys.to(q.dtype), values.to(q.dtype))
            out[req_idx, self._prompt_len :] = attended[self._prompt_len :]

    def _decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, out: Tensor) -> None:
        """The rows after the prompt, each as a decode step makes it."""
        first_slots = (self._req_index * self._length)[:, None, None]
        for position in range(self._prompt_len, self._length):
            lengths = torch.full_like(self._req_index, position + 1, dtype=torch.int32)
            self._state.begin(
                StepBatch(self._req_indices, (position + 1,) * len(self._req_indices), self._req_index, lengths)
            )
            self._state.remember(layer, self._req_index, lengths.to(torch.int64) - 1, k[:, position], v[:, position])
            query = q[:, position].contiguous()
            selection = self._state.select(layer, query)
            slots = (selection.positions + first_slots).to(torch.int32)
            attended = self._kernel(query, rows, self._codec, slots, selection.counts)
            self._state.observe(layer, selection, attended.mass)
            out[:, position] = self._state.complete(layer, attended)
