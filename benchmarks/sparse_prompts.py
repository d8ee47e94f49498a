"""What the option `sparse_prompts` saves and loses in the engine.

    python benchmarks/sparse_prompts.py time --model MODEL.gguf --text TEXT --record FILE
    python benchmarks/sparse_prompts.py loss --model MODEL.gguf --text TEXT --record FILE
    python benchmarks/sparse_prompts.py recall --model MODEL.gguf --text DIRECTORY --record FILE

`time`: processor seconds of reading a prompt, with and without, in turns; medians. `loss`: perplexity of all tokens of
whole windows that are read as prompts. `recall`: `alisa eval recall` with a question at the end of a prompt that is
read sparsely. Products left are those of the layers that read the whole prompt, the first tokens included.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from math import exp
from pathlib import Path
from statistics import median
from time import process_time

import torch
from recording import tell
from torch import Tensor

from alisa import LLM, SamplingParams
from alisa.budget import DENSE_TOKENS
from alisa.config import EngineConfig
from alisa.engine.loaded import LoadedModel, load_model
from alisa.kernels.base import KeyBlock, SparsePrefillKernel
from alisa.kernels.reference.sparse_prefill import BLOCK, block_means, choose_blocks
from alisa.lab.bench.stamp import current_stamp
from alisa.lab.eval.documents import read_documents
from alisa.lab.eval.recall import recalls_of
from alisa.lab.eval.statistics import difference, exponential, mean
from alisa.lab.eval.subject import BASELINE, Subject
from alisa.lab.eval.windows import cut_windows
from alisa.lab.eval.wording import choose_wording


class Counted:
    """A `SparsePrefillKernel` that counts which part of the earlier blocks is read."""

    def __init__(self, kernel: SparsePrefillKernel) -> None:
        self._kernel = kernel
        self._read = self._seen = 0

    @property
    def read(self) -> float:
        """Of all products with earlier keys and values; 1 where no prompt is long enough."""
        return self._read / self._seen if self._seen else 1.0

    def __call__(
        self,
        q: Tensor,
        own: KeyBlock,
        past: Callable[[], Iterable[KeyBlock]],
        alpha: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See `SparsePrefillKernel`; what is chosen is chosen once more, as the reference does."""
        first, whole = (own.start + len(own.k) - len(q)) // BLOCK, len(q) // BLOCK
        means = torch.cat([block_means(block.k, q.dtype) for block in (*past(), own)])
        chosen = choose_blocks(q[: whole * BLOCK], means, first, alpha, softcap)
        if first * BLOCK == DENSE_TOKENS:  # those before it, too
            self._add(sum(range(first)) * own.k.shape[1])
        for block in range(whole):
            self._add((first + block) * own.k.shape[1], int(chosen[block, :, : first + block].sum()))
        return self._kernel(q, own, past, alpha, softcap, sinks)

    def _add(self, seen: int, read: int | None = None) -> None:
        self._seen += seen
        self._read += seen if read is None else read


def measure_time(model: LoadedModel, config: EngineConfig, args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Seconds of prompts of each length."""
    assert model.tokenizer is not None, "texts need one"
    for context in args.contexts:
        [window] = cut_windows(
            model.tokenizer, read_documents(args.text), context=context, prefill=context - 1, count=1
        )
        times: dict[float | None, list[float]] = {None: [], args.alpha: []}
        config = replace(config, max_model_len=context)
        llms = {alpha: LLM(config=replace(config, sparse_prompts=alpha), loaded=model) for alpha in times}
        for _ in range(args.rounds):
            for alpha, llm in llms.items():
                before = process_time()
                llm.generate([window.item.prompt_ids], SamplingParams(max_tokens=1))
                times[alpha].append(process_time() - before)
        yield {
            "kind": "sparse-prompts-time",
            "context": context,
            "rounds": args.rounds,
            "dense_cpu_s": round(median(times[None]), 3),
            "sparse_cpu_s": round(median(times[args.alpha]), 3),
        }


def measure_loss(model: LoadedModel, config: EngineConfig, args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Perplexity of windows of each length."""
    assert model.tokenizer is not None, "texts need one"
    for context in args.contexts:
        documents = read_documents(args.text)
        windows = cut_windows(model.tokenizer, documents, context=context, prefill=context - 1, count=args.windows)
        counted = Counted(model.backend.sparse_prefill)
        backend = model.backend._replace(sparse_prefill=counted)
        nll: dict[float | None, list[float]] = {}
        for alpha in (None, args.alpha):
            wanted = replace(config, max_model_len=context, sparse_prompts=alpha)
            with LLM(config=wanted, loaded=replace(model, backend=backend)) as llm:
                params = SamplingParams(max_tokens=1, prompt_logprobs=0)
                outputs = [llm.generate([window.item.prompt_ids], params)[0] for window in windows]
            nll[alpha] = [-mean([one.logprob for one in output.prompt_logprobs or ()]).value for output in outputs]
        lost = exponential(difference(nll[args.alpha], nll[None]))
        yield {
            "kind": "sparse-prompts-loss",
            "text": args.text.name,
            "context": context,
            "windows": len(windows),
            "read": round(counted.read, 4),
            "perplexity": exp(mean(nll[None]).value),
            "lost": lost.value - 1,
            "lost_error": None if len(windows) == 1 else lost.standard_error,
        }


def measure_recall(model: LoadedModel, config: EngineConfig, args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """A needle in prompts of each length."""
    subject = Subject.of(LLM(config=config, loaded=model))
    counted = Counted(model.backend.sparse_prefill)
    scorer = replace(subject.scorer, kernels=subject.scorer.kernels._replace(sparse_prefill=counted))
    sparse = replace(subject, scorer=scorer.with_sparse_prompts(args.alpha))
    for evaluation in recalls_of(
        subject,
        args.tasks,
        lengths=args.contexts,
        depths=[0, 0.25, 0.5, 0.75, 1],
        repeats=args.repeats,
        prefill=None,
        question="prompt",
        text=args.text,
        wording=choose_wording("auto", subject.name),
        seed=0,
    ):
        dense, found = (evaluation.measure(of, BASELINE) for of in (subject, sparse))
        yield {
            "kind": "sparse-prompts-recall",
            "task": evaluation.task,
            "context": evaluation.length,
            "texts": len(evaluation.items),
            "read": round(counted.read, 4),
            "dense": evaluation.value(dense.units).value,
            "sparse": evaluation.value(found.units).value,
        }


MEASURES = {"time": measure_time, "loss": measure_loss, "recall": measure_recall}


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("measure", choices=MEASURES)
    parser.add_argument("--model", help="as for alisa generate; the model inside the package has too few positions")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--contexts", nargs="+", type=int, default=[4096])
    parser.add_argument("--alpha", type=float, default=0.03)
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", default=["needle"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--record", type=Path, help="append the records to this file")
    args = parser.parse_args()
    config = EngineConfig(model=args.model, max_num_seqs=1)
    model = load_model(config)
    for figures in MEASURES[args.measure](model, config, args):
        common = {"model": Path(model.name).name, "alpha": args.alpha}
        tell({**common, **figures, "stamp": asdict(current_stamp())}, args.record)


if __name__ == "__main__":
    main()
