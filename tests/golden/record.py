"""Records golden tokens: what every policy says under every placement.

    python -m tests.golden.record --runs out/golden

The tokens in `tokens.json` were recorded with version 0.1, those of `sketch` and `sketch-head` when these began to keep
values: what they were in 0.1 is `sketch-mean` and `sketch-mean-head` here. Changes that are not meant to change tokens
are checked against them; record again only with a change that is meant to, and say so in its commit.
(One was: where a prompt is cut into chunks no longer changes what its tokens see in rounded rows. The int8 cases with
small chunks have the tokens that came with the largest. Two int8 cases keep less since a Xeon with AVX512-FP16, and
prompts that are one tile of 128 tokens, gave other tokens after the 13th and the 19th of one output. One case of
`sketch-mean` keeps less since the weights of a sketch have other last bits: another token came after the 16th of one
output.)

Tokens must not depend on the processor, but the last bits of a float do: another vector width, thread count or library
sums in another order. So each case is run under several VARIANTS, and with weights that are changed in their last
bits, which stands for all processors that are not at hand. Of each output the file keeps the first tokens, as many as
all settings agree on. A case that keeps less than half of its tokens is an error: choose another seed or prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from safetensors.torch import load_file, save_file

from alisa.config import PolicyName
from alisa.engine.loaded import embedded_model
from alisa.kernels.native import library
from tests.golden.cases import Case, Golden, run, save

PROMPTS = [
    "The old schoolmaster closed his book and looked out of the window at the rain.",
    "When the ship came into the harbour the whole village had gathered on the quay, and the women held up their "
    "children that they might see the flags. The captain stood upon the deck with his hat in his hand, but he did not "
    "smile, and those who stood nearest to the water saw that one of the boats was missing.",
    "My dear sister, you ask me how we live here, and whether the winter has been hard.",
    "There was no sound in the house but the ticking of the great clock upon the stairs. He had been told to wait, and "
    "so he waited, turning over in his mind what he should say to a man whom he had never seen and to whom he owed "
    "everything that he possessed in the world.",
    "It is often said that a man may be known by his books; I should rather say that he is known by those which he "
    "lends, and best of all by those which he forgets to return. My uncle had a library of some four hundred volumes.",
]

THREE_PHASES = {
    "schedule": "three-phase",
    "offload_from": 3,
    "recompute_from": 8,
    "offload_ratio": 0.7,
    "recompute_ratio": 0.6,
}


class Placement(NamedTuple):
    """Caps and schedule, and what they must bring about."""

    name: str
    device_share: float | None = None
    disk_share: float | None = None
    schedule: dict[str, Any] | None = None
    seen: tuple[str, ...] = ()
    tiers: bool = True
    """Whether rows move; a policy with an index set for each head does not allow it."""
    batches: bool = False
    """Whether it says nothing about one sequence."""


PLACEMENTS = [
    Placement("free", tiers=False),
    Placement("capped", 0.3, seen=("disk",)),
    Placement("static", schedule={"schedule": "static", "offload_ratio": 0.75}, seen=("disk",)),
    Placement("phases", schedule=THREE_PHASES, seen=("disk", "deleted")),
    Placement("capped-phases", 0.4, schedule=THREE_PHASES, seen=("disk", "deleted")),
    Placement("short", 0.45, 0.1, seen=("disk", "preempted"), batches=True),
    Placement("waiting", 0.5, 0.0, {"schedule": "all-device"}, ("preempted",), tiers=False, batches=True),
]

SAMPLING = [
    {},
    {"temperature": 0.7, "top_p": 0.9},
    {"repetition_penalty": 1.2},
    {"temperature": 1.0, "top_k": 40},
    {"temperature": 1.3, "min_p": 0.05},
]
OTHER_PROMPT = {
    "h2o-0.8-int8-capped-phases": 2,
    "sketch-2bit-0.5-int8-static": 2,
    "dense-0.5-int8-capped-phases": 0,
    "streaming-0.5-int8-static": 0,
}
"""Prompts of cases with one prompt whose output splits early: two all but equal tokens come soon."""

CHUNKS = (1024, 48, 16)
PER_HEAD = ("swa-head", "sketch-head", "sketch-mean-head")
FIRST = (
    "dense",
    "local",
    "strided",
    "streaming",
    "h2o",
    "swa",
    "swa-head",
    "sketch-mean",
    "sketch-2bit",
    "sketch-8bit",
    "sketch-mean-head",
    "sketch-plain",
    "oracle",
)
"""The policies of version 0.1, in the order in which their cases took turns: a new policy changes none of these."""
FAST = (5,)
"""Cases whose number has one of these remainders by 11 are not slow. No turn that is taken below has that length."""


class Variant(NamedTuple):
    """How a process is started so that it rounds in its own way."""

    name: str
    environment: dict[str, str]
    isa: str = ""
    """Of the native kernels; empty: the fastest, `torch`: plain torch instead."""
    noise: int = 0
    """Seed of the change of the weights; 0: none."""


VARIANTS = [
    Variant("as it is", {"OMP_NUM_THREADS": "2"}),
    Variant("one thread", {"OMP_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "Haswell"}),
    Variant("portable", {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}, "portable"),
    Variant("avx2", {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}, "avx2"),
    Variant("avx512", {"ATEN_CPU_CAPABILITY": "avx512", "OMP_NUM_THREADS": "2"}, "avx512"),
    Variant("plain torch", {"OMP_NUM_THREADS": "1"}, "torch"),
    *(Variant(f"other last bits {seed}", {"OMP_NUM_THREADS": "1"}, noise=seed) for seed in (1, 2, 3)),
]

RELATIVE_NOISE = 2.0**-21
"""Of each weight: four times the distance of float32 values, what a sum of a few hundred products is off by."""


def main() -> None:
    """Write the file, or, as a child of this program, the tokens of one variant."""
    parser = argparse.ArgumentParser(description="Record golden tokens.")
    parser.add_argument("--runs", type=Path, help="folder that keeps what has been run; what is in it is not run again")
    parser.add_argument("--variant", choices=[variant.name for variant in VARIANTS])
    args = parser.parse_args()
    if args.variant is not None:
        variant = next(variant for variant in VARIANTS if variant.name == args.variant)
        run_all(variant, runs_of(variant, args.runs))
        return
    with tempfile.TemporaryDirectory() as directory:
        record(args.runs or Path(directory))


def runs_of(variant: Variant, directory: Path) -> Path:
    """File of what was run under a variant."""
    return directory / f"{variant.name.replace(' ', '-')}.json"


def record(directory: Path) -> None:
    """Run every case under every variant and keep what all agree on."""

    def run_child(variant: Variant) -> dict[str, list[list[int]]]:
        command = [sys.executable, "-m", __spec__.name, "--runs", str(directory), "--variant", variant.name]
        # A thread that spins while another program has its core makes a busy machine many times slower.
        environment = os.environ | {"OMP_WAIT_POLICY": "passive"} | variant.environment
        subprocess.run(command, env=environment, check=True)
        sys.stderr.write(f"{variant.name}: done\n")
        return json.loads(runs_of(variant, directory).read_text())

    directory.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = list(pool.map(run_child, VARIANTS))
    kept, given, poor = [], 0, []
    for case in cases():
        agreed = [common_prefix(outputs) for outputs in zip(*(tokens[key_of(case)] for tokens in runs), strict=True)]
        num_kept, num_given = sum(map(len, agreed)), len(agreed) * case.sampling["max_tokens"]
        if 2 * num_kept < num_given:
            poor.append(f"{case.name} keeps {num_kept} of {num_given} tokens")
        given += num_given
        kept.append(replace(case, tokens=agreed))
    if poor:
        sys.exit("\n".join([*poor, "Choose other prompts (OTHER_PROMPT)."]))
    save(Golden(PROMPTS, kept))
    num_kept = sum(len(tokens) for case in kept for tokens in case.tokens)
    sys.stderr.write(f"{len(kept)} cases, {num_kept} of {given} tokens kept\n")


def cases() -> Iterator[Case]:
    """All policies, sparsities, row types and placements; the rest takes turns."""
    policies = sorted(get_args(PolicyName), key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    plan = (
        combination
        for combination in product(policies, (0.5, 0.8), ("float32", "int8"), PLACEMENTS)
        if is_possible(*combination)
    )
    for i, (policy, sparsity, kv_dtype, placement) in enumerate(plan):
        name = f"{policy}-{sparsity}-{kv_dtype}-{placement.name}"
        alone = i % 4 == 3 and not placement.batches
        yield Case(
            name=name,
            slow=i % 11 not in FAST,
            options={
                "policy": policy,
                "sparsity": sparsity,
                "kv_dtype": kv_dtype,
                "prefill_chunk": CHUNKS[i % len(CHUNKS)],
            },
            device_share=placement.device_share,
            disk_share=placement.disk_share,
            schedule=placement.schedule,
            prompts=[OTHER_PROMPT.get(name, i // 4 % len(PROMPTS))] if alone else list(range(len(PROMPTS))),
            sampling={"max_tokens": 40 if alone else 24, **SAMPLING[i % len(SAMPLING)]},
            seed=i,
            seen=list(placement.seen),
            tokens=[],
        )


def is_possible(policy: str, sparsity: float, kv_dtype: str, placement: Placement) -> bool:
    """Whether there is such a run, and it is not another one again."""
    if policy == "dense" and sparsity != 0.5:
        return False  # it reads everything
    return not (policy in PER_HEAD and placement.tiers)


def key_of(case: Case) -> str:
    """All that decides its tokens."""
    return json.dumps(asdict(replace(case, name="", slow=False, tokens=[])))


def run_all(variant: Variant, path: Path) -> None:
    """The file has the tokens of every case, run in this process, which was started for the variant."""
    if variant.isa == "torch":
        library.available = lambda: False
    elif variant.isa:
        if variant.isa not in library.isa_names():
            sys.exit(f"this processor has no {variant.isa}: record on one that has.")
        library.isa_names = lambda: (variant.isa,)
    known = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model = noisy_model(directory / "model", variant.noise) if variant.noise else None
        for case in cases():
            if key_of(case) in known:
                continue
            known[key_of(case)], seen = run(case, PROMPTS, directory, model)
            if missing := set(case.seen) - seen:
                sys.exit(f"{case.name} was to show {', '.join(sorted(missing))} and did not.")
            path.write_text(json.dumps(known))


def noisy_model(directory: Path, seed: int) -> Path:
    """A copy of the model inside the package whose weights differ in their last bits."""
    shutil.copytree(embedded_model(), directory)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, weight in load_file(directory / "model.safetensors").items():
        noise = torch.empty(weight.shape).uniform_(-RELATIVE_NOISE, RELATIVE_NOISE, generator=generator)
        weights[name] = weight.float() * (1 + noise)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


def common_prefix(outputs: tuple[list[int], ...]) -> list[int]:
    """The first tokens, as many as all outputs share."""
    shared = []
    for tokens in zip(*outputs, strict=True):
        if len(set(tokens)) > 1:
            break
        shared.append(tokens[0])
    return shared


if __name__ == "__main__":
    main()
