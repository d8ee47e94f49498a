"""What a prefetch hint would save `sketch` under a cap: rows of the next layer, asked for while this layer's MLP runs.

InfiniGen (2406.19707) chooses a layer ahead. With rotary positions and shared KV heads the best source is the hidden
state after attention: it goes through the next layer's norm, W_Q and rotation, its query is ranked by the next layer's
sketch, and what is not in the hot cache is brought by the transfer threads. The layer still chooses by its own query,
so that the tokens read are the same. For each cap, on a real model and text:

    engine     where the time of a decode step goes, and how much of it is waiting for rows: the most to be won
    foreseen   of the rows that a layer misses, the share that a guess holds, and rows it would fetch for nothing for
               each missed one, of three guesses: the hint, what the layer read in the step before, and what came next
               in that step's ranking (as many again as were read)
    tried      the hint, carried out in layers of plain torch, against the same layers without: what it does to a step

Rows come from the system's page cache, or from the disk (the cache is emptied before each step). Ways alternate every
few steps of one batch.

    python benchmarks/prefetch_hint.py --model SMOLLM2 --text DATA/wikitext2 \
        --record benchmarks/results/prefetch_hint.jsonl
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from time import thread_time

import numpy as np
from numpy.typing import NDArray
from recording import tell
from torch import Tensor

from alisa.attention.session import KVSession
from alisa.cache.offload.store import TieredStore
from alisa.cache.row_ids import NOWHERE
from alisa.config import EngineConfig, SamplingParams
from alisa.engine.builder import build_engine
from alisa.engine.loaded import LoadedModel, load_model
from alisa.kernels.base import Attend, AttendAll, Ranking, Selection
from alisa.lab.bench.others import OthersMeter
from alisa.lab.bench.session import RunSpec, batch_config, device_cap_within
from alisa.lab.bench.stamp import current_stamp
from alisa.lab.eval.documents import read_documents
from alisa.lab.eval.windows import cut_windows
from alisa.model.decoder import Decoder
from alisa.model.layer import Layer
from alisa.outputs import StepRecord
from alisa.planner.footprint import kv_token_bytes
from alisa.policy.sketch import SketchedRows

BLOCK = 4
"""Steps of one way before the next one's turn; the first of them is not counted."""
GUESSES = ("hint", "last read", "runners-up")
Positions = NDArray[np.bool_]
"""Bool[B, T]"""


class TappedDecoder(Decoder):
    """A decoder in plain torch that shows the hidden state after attention, and guesses the next query from it."""

    foresight: Foresight | None = None

    @classmethod
    def of(cls, decoder: Decoder) -> TappedDecoder:
        """The same weights."""
        tapped = cls.__new__(cls)
        tapped.__dict__.update(decoder.__dict__)
        tapped._stack = None
        return tapped

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        attend: Attend,
        lengths: Tensor | None = None,
        attend_all: AttendAll | None = None,
    ) -> Tensor:
        """See `Decoder.forward`; layer by layer."""
        self._turns = [self._rotation(rope, positions, lengths) for rope in range(len(self._ropes))]
        return super().forward(tokens, positions, attend, lengths)

    def _residual(self, layer: Layer, x: Tensor, attended: Tensor) -> Tensor:
        following = next(number for number, own in enumerate(self._layers) if own is layer) + 1
        if self.foresight is not None and following < len(self._layers):
            self.foresight.tap(self, following, x + attended)
        return super()._residual(layer, x, attended)

    def guessed_query(self, number: int, x: Tensor) -> Tensor:
        """`[B, H, D]`: what the query of a layer would be, were `x [B, 1, C]` what it gets."""
        layer, rope = self._layers[number], self._rope_of_layer[number]
        assert layer.attn_norm is not None, "the norm is in front of the layer"
        assert self.spec.norm_place == "before", "the norm is in front of the layer"
        q = layer.q(layer.attn_norm(x)).view(*x.shape[:2], self.spec.num_heads, self.spec.head_dim)
        q = self._head_normed(layer.q_norm, q)
        q = q if rope is None else self._turns[rope](q)
        return q[:, 0] * self.spec.query_factor


@dataclass
class Foresight:
    """Guesses what the next layer will read, and fetches it, or counts how right the guesses are."""

    session: KVSession
    fetches: bool = False
    counts: bool = False
    missed: int = 0
    right: dict[str, int] = field(default_factory=lambda: dict.fromkeys(GUESSES, 0))
    wasted: dict[str, int] = field(default_factory=lambda: dict.fromkeys(GUESSES, 0))
    query_s: float = 0.0
    """Time of this thread for the extra queries; then for ranking by them, and for asking for rows."""
    rank_s: float = 0.0
    ask_s: float = 0.0
    _guesses: dict[int, dict[str, Positions]] = field(default_factory=dict)
    _sequences: dict[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def is_on(self) -> bool:
        """There is something to foresee."""
        decodes = self.session._prefill is None and isinstance(self.session.cache.store, TieredStore)
        return decodes and (self.fetches or self.counts)

    def tap(self, decoder: TappedDecoder, layer: int, after: Tensor) -> None:
        """The state after the attention of the layer in front of this one."""
        if not self.is_on:
            return
        started = thread_time()
        query = decoder.guessed_query(layer, after)
        queried = thread_time()
        positions = self._ranked(layer, query, 1)
        ranked = thread_time()
        store = self.session.cache.store
        if self.fetches:
            counts = self._ranking(layer).counts
            num_tokens = tuple(counts.tolist())
            store.prefetch(layer, self.session._batch.req_indices, Selection(positions[:, None], counts, num_tokens))
        self.query_s += queried - started
        self.rank_s += ranked - queried
        self.ask_s += thread_time() - ranked
        if self.counts:
            self._guesses.setdefault(layer, {})["hint"] = self._mask(positions, self._ranking(layer).counts)

    def count(self, layer: int, selection: Selection, query: Tensor) -> None:
        """The layer is about to read this; how right were the guesses?"""
        store = self.session.cache.store
        request = store._reader._look_up(selection)
        absent = request.real & (store._residency.slots[layer].take(request.ids) == NOWHERE)
        positions = selection.positions[:, 0].numpy()
        missing, read = self._blank(), self._blank()
        rows = np.arange(len(positions))[:, None]
        missing[np.broadcast_to(rows, positions.shape)[absent], positions[absent]] = True
        read[np.broadcast_to(rows, positions.shape)[request.real], positions[request.real]] = True
        guesses = self._guesses.get(layer, {})
        if layer and len(guesses) == len(GUESSES) and self._sequences.get(layer) == self.session._batch.req_indices:
            self.missed += int(missing.sum())
            for name, guess in guesses.items():
                width = guess.shape[1]
                fetched = guess & self._absent(layer, width)
                self.right[name] += int((fetched & missing[:, :width]).sum())
                self.wasted[name] += int((fetched & ~missing[:, :width]).sum())
        twice = self._mask(self._ranked(layer, query, 2), self._ranking(layer, 2).counts)
        self._guesses[layer] = {"last read": read, "runners-up": twice & ~read}
        self._sequences[layer] = self.session._batch.req_indices

    def _absent(self, layer: int, width: int) -> Positions:
        """Which positions have no row on the device in this layer."""
        store, batch = self.session.cache.store, self.session._batch
        ids = store._row_ids.lookup(
            np.array(batch.req_indices)[:, None],
            np.minimum(np.arange(width)[None], np.array(batch.lengths)[:, None] - 1).astype(np.int32),
        )
        return store._residency.slots[layer].take(ids) == NOWHERE

    def _blank(self) -> Positions:
        lengths = self.session._batch.lengths
        return np.zeros((len(lengths), max(lengths)), bool)

    def _mask(self, positions: Tensor, counts: Tensor) -> Positions:
        mask, found = self._blank(), positions.numpy()
        real = np.arange(found.shape[1]) < counts.numpy()[:, None]
        mask[np.broadcast_to(np.arange(len(found))[:, None], found.shape)[real], found[real]] = True
        return mask

    def _ranked(self, layer: int, query: Tensor, times: int) -> Tensor:
        """Positions Int32[B, K] that the sketch of a layer finds best, `times` as many older ones as are read."""
        state = self.session.state
        assert isinstance(state, SketchedRows)
        return state._kernels.sketch_select(query, state._key_sketches[layer], self._ranking(layer, times)).positions

    def _ranking(self, layer: int, times: int = 1) -> Ranking:
        """Without the new token, which the layer does not know yet."""
        state = self.session.state
        ranking = state._rankings[state._budget_of_layer[layer]]
        older = (times * ranking.older_counts).minimum(ranking.older_ends)
        counts = ranking.counts - 1 - ranking.older_counts + older
        return ranking._replace(
            lengths=ranking.lengths - 1, older_counts=older, counts=counts, num_slots=int(counts.max())
        )


@contextmanager
def counted(foresight: Foresight) -> Iterator[None]:
    """Every selection of a session is counted before it is read."""
    session = foresight.session
    attend = session._attend

    def counting(layer: int, query: Tensor, selection: Selection) -> object:
        if foresight.counts and isinstance(session.cache.store, TieredStore):
            foresight.count(layer, selection, query)
        return attend(layer, query, selection)

    session._attend = counting
    yield
    session._attend = attend


def run(
    model: LoadedModel, prompts: Sequence[Sequence[int]], sparsity: float, cap: float, args: argparse.Namespace
) -> tuple[list[tuple[str, StepRecord]], list[tuple[int, ...]], Foresight]:
    """The decode steps of one batch, each with the way it was made, and the tokens."""
    total = len(prompts) * (len(prompts[0]) + args.output_len - 1) * kv_token_bytes(model.spec, model.dtype)
    config = EngineConfig(
        policy="sketch",
        sparsity=sparsity,
        kv_disk_memory=2 * total if cap < 1 else 0,
        kv_disk_path=args.disk_path,
        max_num_seqs=len(prompts),
    )
    config = batch_config(config, [len(prompts[0])] * len(prompts), args.output_len)
    budget = device_cap_within(model.decoder, RunSpec(config), int(cap * total))
    engine, _ = build_engine(model, replace(config, kv_device_memory=budget))
    session = engine._runner.session
    foresight = Foresight(session)
    ways = ["cached", "disk"] if cap < 1 else ["cached"]
    if isinstance(model.decoder, TappedDecoder):
        model.decoder.foresight = foresight
        ways = ["cached", "cached hint", "disk", "disk hint"]
    for index, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=args.output_len, temperature=0.8, seed=index, ignore_eos=True)
        engine.add_request(list(prompt), params)
    steps: list[tuple[str, StepRecord]] = []
    tokens: dict[str, list[int]] = {}
    with counted(foresight):
        while True:
            way = ways[len(steps) // BLOCK % len(ways)]
            foresight.fetches = way.endswith("hint") and not args.counting
            foresight.counts = args.counting and len(steps) >= 2
            if way.startswith("disk"):
                forget_pages(session)
            output = engine.step()
            if output.record is None:
                break
            for delta in output.deltas:
                tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            if not output.record.prefill:
                steps.append((way, output.record))
    engine.close()
    return steps, [tuple(tokens[name]) for name in sorted(tokens)], foresight


def forget_pages(session: KVSession) -> None:
    """The rows of the disk tier are read from the disk next time."""
    store = session.cache.store
    if isinstance(store, TieredStore):
        store._in_flight.drain()
        for tier, _ in store._levels:
            os.fdatasync(tier._file)
            os.posix_fadvise(tier._file, 0, 0, os.POSIX_FADV_DONTNEED)


def figures(steps: Sequence[tuple[str, StepRecord]]) -> dict[str, dict[str, object]]:
    """Of the decode steps of each way, in milliseconds: quartiles of all and of the waiting, means of rows."""
    found = {}
    for way in dict.fromkeys(way for way, _ in steps):
        own = [record for number, (name, record) in enumerate(steps) if name == way and number % BLOCK]
        own = own[2 * BLOCK :] or own  # until the tier is full
        found[way] = {
            "steps": len(own),
            "sequences": mean(record.num_sequences for record in own),
            "rows": mean(record.traffic.fetched_rows for record in own),
            "wall_ms": quartiles([record.wall_s for record in own]),
            "wait_ms": quartiles([record.traffic.wait_s for record in own]),
            "transfer_ms": quartiles([record.transfer_s for record in own]),
            "linear_ms": quartiles([record.linear_s for record in own]),
        }
    return found


def quartiles(seconds: Sequence[float]) -> list[float]:
    """In milliseconds."""
    return [round(1e3 * float(value), 4) for value in np.quantile(seconds, (0.25, 0.5, 0.75))]


def main() -> None:
    """Every cap."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--case", nargs="*", default=["0.8:0.5", "0.8:0.25", "0.95:0.1"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompt-len", type=int, default=384)
    parser.add_argument("--output-len", type=int, default=112)
    parser.add_argument("--disk-path", type=Path)
    parser.add_argument("--record", type=Path, help="append the record to this file")
    args = parser.parse_args()
    meter = OthersMeter()
    model = load_model(EngineConfig(model=args.model, dtype=args.dtype, device="cpu"))
    assert model.tokenizer is not None, "a model that was loaded from files has one"
    windows = cut_windows(
        model.tokenizer,
        read_documents(args.text),
        context=args.prompt_len + 1,
        prefill=args.prompt_len,
        count=args.batch,
    )
    prompts = [window.item.prompt_ids for window in windows]
    tapped = replace(model, decoder=TappedDecoder.of(model.decoder))
    results = []
    for case in args.case:
        sparsity, cap = map(float, case.split(":"))
        args.counting = False
        found: dict[str, object] = {"sparsity": sparsity, "cap": cap}
        steps, _, _ = run(model, prompts, sparsity, cap, args)
        found["engine"] = figures(steps)
        if cap < 1:
            steps, _, foresight = run(tapped, prompts, sparsity, cap, args)
            hinted = max(1, sum(way.endswith("hint") for way, _ in steps))
            found["tried"] = figures(steps)
            extra = {name: 1e3 * getattr(foresight, f"{name}_s") / hinted for name in ("query", "rank", "ask")}
            found["extra_ms"] = extra
            args.counting = True
            _, _, foresight = run(tapped, prompts, sparsity, cap, args)
            missed = max(1, foresight.missed)
            found["missed"] = foresight.missed
            found["foreseen"] = {name: count / missed for name, count in foresight.right.items()}
            found["wasted"] = {name: count / missed for name, count in foresight.wasted.items()}
        results.append(found)
        print(found, file=sys.stderr, flush=True)
    spec = model.spec
    mlp_weights = (2 + spec.gated_mlp) * spec.ffn_size * spec.hidden_size
    layer_weights = mlp_weights + 2 * (spec.q_size + spec.kv_size) * spec.hidden_size
    row_bytes = kv_token_bytes(model.spec, model.dtype) // model.spec.num_layers
    record = {
        "benchmark": "prefetch_hint",
        "model": Path(args.model).name,
        "text": args.text.name,
        **{name: getattr(args, name) for name in ("dtype", "batch", "prompt_len", "output_len")},
        "stamp": asdict(current_stamp()),
        "others_share": round(meter.share(), 4),
        "row_bytes": row_bytes,
        "mlp_share": round(mlp_weights / layer_weights, 4),
        "query_share": round(spec.q_size * spec.hidden_size / layer_weights, 4),
        "results": results,
    }
    tell(record, args.record)


if __name__ == "__main__":
    main()
