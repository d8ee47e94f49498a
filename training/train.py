"""Train the model until a wall-clock deadline; safe to stop, pause and start again.

The learning rate follows the wall clock between the start and the deadline, so that the run ends
at its floor however fast the machine is and however often the process was paused. Writing another
unix time into work/deadline moves the end; a file work/finish ends the run after the step.

    python train.py --data DIR --minutes 90
"""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import HERE, WORK, load_config, parser
from model import Llama, ModelConfig, initialise
from optimiser import build_optimisers
from recall import ANSWER, COPY, KINDS, STATEMENT, Prose, Sample, Vocabulary, make_batch, make_vocabulary
from tokenizers import Tokenizer
from torch import Tensor, nn

EVAL_LENGTH = 1024


@dataclass
class Progress:
    """What a checkpoint must remember beside weights and optimiser."""

    step: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.time)
    busy_s: float = 0.0


def build_model(config: dict) -> Llama:
    """The model of config.toml, with its structured start."""
    shape = ModelConfig(vocab_size=config["tokenizer"]["vocab_size"], **config["model"])
    model = Llama(shape)
    initialise(model, config["init"], config["train"]["seed"])
    return model


def rate_factor(config: dict, progress: Progress, deadline: float) -> float:
    """Warm-up by steps, then flat, then linear in wall-clock time down to the floor."""
    done = (time.time() - progress.started) / max(1.0, deadline - progress.started)
    fall = (1.0 - min(1.0, done)) / (1.0 - config["decay_from"])
    factor = max(config["final_lr_fraction"], min(1.0, fall))
    return factor * min(1.0, (progress.step + 1) / config["warmup_steps"])


def loss_of(model: nn.Module, sample: Sample, config: dict) -> tuple[Tensor, dict[str, float]]:
    """Weighted mean cross-entropy; and the plain mean per kind of target."""
    ids = torch.from_numpy(sample.ids.astype(np.int64))
    kind = torch.from_numpy(sample.kind[:, 1:].astype(np.int64)).flatten()
    logits = model(ids[:, :-1])
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    table = torch.ones(len(KINDS))
    table[STATEMENT] = config["statement_weight"]
    table[ANSWER] = config["answer_weight"]
    table[COPY] = config["copy_weight"]
    weights = table[kind]
    per_kind = {
        name: round(losses.detach()[kind == index].mean().item(), 4)
        for index, name in enumerate(KINDS)
        if (kind == index).any()
    }
    return (losses * weights).sum() / weights.sum(), per_kind


def choose_rows(config: dict, rng: np.random.Generator) -> tuple[int, list[str]]:
    """A length and, for each row of that length, a task."""
    lengths = [int(n) for n in config["lengths"]]
    chances = np.array(list(config["lengths"].values()))
    length = int(rng.choice(lengths, p=chances / chances.sum()))
    rows = config["tokens_per_step"] // length
    # A shuffled systematic sample: every step has nearly the configured mix.
    edges = np.cumsum(list(config["mix"].values()))
    places = (np.arange(rows) + rng.random()) / rows * edges[-1]
    tasks = [list(config["mix"])[min(int(i), len(edges) - 1)] for i in np.searchsorted(edges, places)]
    return length, tasks


@torch.no_grad()
def quick_eval(model: nn.Module, prose: Prose, vocabulary: Vocabulary, config: dict) -> dict[str, float]:
    """Held-out prose loss, and loss and accuracy of recall around held-out prose; 16 sequences."""
    result: dict[str, float] = {}
    for tasks in (
        ["prose"] * 8,
        ["facts", "needle", "needle", "needle", "needle", "list", "quote", "facts"],
    ):
        rng = np.random.default_rng(99)
        sample = make_batch(vocabulary, prose, rng, tasks, EVAL_LENGTH + 1)
        ids = torch.from_numpy(sample.ids.astype(np.int64))
        logits = model(ids[:, :-1])
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").numpy()
        right = (logits.argmax(-1) == ids[:, 1:]).numpy()
        kind, distance = sample.kind[:, 1:], sample.distance[:, 1:]
        if tasks[0] == "prose":
            result["heldout_prose"] = float(losses[kind == 0].mean())
            continue
        near = distance < EVAL_LENGTH // 4
        for name, index in (("answer", ANSWER), ("copy", COPY)):
            result[f"{name}_near"] = float(right[(kind == index) & near].mean())
            result[f"{name}_far"] = float(right[(kind == index) & ~near].mean())
        result["answer_loss"] = float(losses[kind == ANSWER].mean())
    return {name: round(value, 4) for name, value in result.items()}


def save(path: Path, model: nn.Module, optimisers: list, progress: Progress, rng: np.random.Generator) -> None:
    """Write a checkpoint in one move, so that a reader never sees half of one."""
    state = {
        "model": model.state_dict(),
        "optimisers": [optimiser.state_dict() for optimiser in optimisers],
        "progress": vars(progress),
        "rng": rng.bit_generator.state,
    }
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


class ThreadChooser:
    """Two threads on an idle machine, fewer while other processes are busy.

    A parallel region waits for its slowest thread, so a thread that shares its core with another
    process halves the speed of both; one thread on the free core is then faster.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.before = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Wall clock, CPU time of the whole machine, CPU time of this process; seconds."""
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        busy = sum(int(fields[i]) for i in (0, 1, 2, 5, 6)) / os.sysconf("SC_CLK_TCK")
        return time.time(), busy, time.process_time()

    def choose(self) -> int:
        """Set and return the number of threads, from what happened since the last call."""
        now = self._read()
        wall, busy, own = (a - b for a, b in zip(now, self.before, strict=True))
        self.before = now
        others = max(0.0, busy - own) / max(wall, 1e-3)
        threads = max(1, min(self.most, round(self.most - others)))
        torch.set_num_threads(threads)
        return threads


def read_deadline(default: float) -> float:
    """The unix time in work/deadline."""
    try:
        return float((WORK / "deadline").read_text())
    except (OSError, ValueError):
        return default


def main() -> None:
    """Run until the deadline."""
    arguments = parser(__doc__)
    arguments.add_argument("--minutes", type=float, default=90.0)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--no-compile", action="store_true")
    arguments.add_argument("--fresh", action="store_true", help="ignore an earlier checkpoint")
    args = arguments.parse_args()
    torch.set_flush_denormal(True)  # sharp attention weights underflow, which is slow
    torch.set_num_threads(args.threads)
    config = load_config()
    settings = config["train"]
    (WORK / "train.pid").write_text(str(os.getpid()))
    deadline_file, finish_file = WORK / "deadline", WORK / "finish"
    finish_file.unlink(missing_ok=True)

    tokenizer = Tokenizer.from_file(str(WORK / "tokenizer.json"))
    vocabulary = make_vocabulary(tokenizer)
    prose = Prose(np.load(WORK / "prose.npy"), vocabulary)
    with np.load(WORK / "heldout.npz") as books:
        heldout = Prose(np.concatenate([books[name] for name in sorted(books)]), vocabulary)

    model = build_model(config)
    optimisers = build_optimisers(model, settings)
    progress, rng = Progress(), np.random.default_rng(settings["seed"])
    checkpoint, log = WORK / "checkpoint.pt", HERE / "log.jsonl"
    if checkpoint.exists() and not args.fresh:
        state = torch.load(checkpoint, weights_only=False)
        model.load_state_dict(state["model"])
        for optimiser, saved_state in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved_state)
        progress = Progress(**state["progress"])
        rng.bit_generator.state = state["rng"]
    else:
        log.unlink(missing_ok=True)
        deadline_file.write_text(str(time.time() + 60 * args.minutes))
    forward = model if args.no_compile else torch.compile(model, dynamic=False)
    print(sum(p.numel() for p in model.parameters()), "parameters; step", progress.step)

    chooser = ThreadChooser(args.threads)
    saved = time.time()
    ended = False
    while not ended:
        begun = time.time()
        threads = chooser.choose()
        deadline = read_deadline(progress.started + 60 * args.minutes)
        length, tasks = choose_rows(settings, rng)
        sample = make_batch(vocabulary, prose, rng, tasks, length + 1)
        factor = rate_factor(settings, progress, deadline)
        loss, per_kind = loss_of(forward, sample, settings)
        model.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), settings["clip"])
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimiser.step()
        progress.step += 1
        progress.tokens += sample.ids.size
        progress.busy_s += time.time() - begun
        ended = finish_file.exists() or time.time() >= deadline
        record = {
            "step": progress.step,
            "tokens": progress.tokens,
            "elapsed_s": round(time.time() - progress.started, 1),
            "lr": round(settings["peak_lr"] * factor, 6),
            "length": length,
            "threads": threads,
            "step_s": round(time.time() - begun, 2),
            "grad_norm": round(norm.item(), 3),
            "loss": round(loss.item(), 4),
            **{f"train_{name}": value for name, value in per_kind.items()},
        }
        if progress.step % settings["eval_every"] == 0 or ended or progress.step == 1:
            record |= quick_eval(model, heldout, vocabulary, settings)
        if progress.step % settings["log_every"] == 0 or "heldout_prose" in record or ended:
            with log.open("a") as stream:
                stream.write(json.dumps(record) + "\n")
            print(json.dumps(record), flush=True)
        if ended or time.time() - saved > settings["checkpoint_every_s"]:
            save(checkpoint, model, optimisers, progress, rng)
            saved = time.time()


if __name__ == "__main__":
    main()
