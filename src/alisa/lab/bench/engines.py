"""The engines that an experiment may name, what can be asked of them, and what a step of each must read. No torch.

To add one: a driver in benchmarks/peers that reads an `EngineJob` and ends with `finish` (`bench/remote/measured.py`),
a file of its requirements in benchmarks/peers/requirements, a line in `PEERS`, and its name in the Makefile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from alisa.config import EngineConfig, KvDtypeName, PolicyName, WeightFormat
from alisa.errors import InputError
from alisa.policy.registry import reads_of
from alisa.records.structure import structure

OWN = "alisa"
"""This package's own engine."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Another engine.

    Args:
        environment: name under `.peers`, and of the make target.
        driver: script that runs it.
        options: what can be asked of it, and the answers there are; None: any.
        needs_gpu: why `alisa bench run`, which has no GPU, cannot run it; None: it can.
        reads_gguf: whether its driver takes a GGUF file for a model.
        converses: whether its driver holds a conversation, in which each prompt begins with what was said before.
    """

    environment: str
    driver: str
    options: Mapping[str, tuple[str, ...] | None]
    needs_gpu: str | None = None
    reads_gguf: bool = False
    converses: bool = False


PEERS: dict[str, Peer] = {
    "transformers": Peer(
        "transformers",
        "transformers_engine.py",
        {"cache": ("dynamic", "static", "offloaded", "quanto-int4", "hqq-int4")},
        reads_gguf=True,
        converses=True,
    ),
    "kvpress": Peer("kvpress", "kvpress_engine.py", {"keep": None}),
    "vllm": Peer("vllm", "vllm_engine.py", {}),
    "openvino": Peer(
        "openvino",
        "openvino_engine.py",
        {"variant": ("fp16", "evict", "int8", "int4"), "kv_precision": ("u8", "bf16", "f16"), "batched_tokens": None},
        reads_gguf=True,
        converses=True,
    ),
    "llamacpp": Peer("llamacpp", "llamacpp_engine.py", {"weights": ("file", "q8_0")}, reads_gguf=True, converses=True),
    "flexgen": Peer(
        "flexgen",
        "flexgen_engine.py",
        {},
        needs_gpu="FlexGen 0.1.8 computes on CUDA devices only; the CPU is a place to keep weights and rows for it",
    ),
}
"""By name."""

EVICTED_TO = 160
"""Tokens that OpenVINO's eviction leaves, as its driver sets it."""
_OPENVINO_WEIGHTS: Mapping[str, WeightFormat] = {"int8": "int8", "int4": "int4"}
"""By variant, where they are not those of the checkpoint."""
KEPT = 0.2
"""Share of the final length that kvpress keeps when nothing else is asked."""


@dataclass(frozen=True, kw_only=True)
class OwnOptions:
    """What can be asked of this package's engine."""

    policy: PolicyName = "swa"
    sparsity: float = 0.8
    kv_dtype: KvDtypeName = "auto"
    weight_dtype: WeightFormat = "float"
    schedule: dict[str, int | float | str] | None = None
    """As in a schedule file (docs/scheduling.md); None: what the cap demands."""
    prefetch: bool = True
    """Whether the next step's tokens are chosen, and fetched, a step ahead where the policy allows it."""
    overlap: bool = True
    """Whether rows move while the arithmetic runs; False: every move is waited for at once."""
    disk_path: str | None = None
    """Directory of the disk tier; None: that for temporary files."""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> OwnOptions:
        """These options, checked.

        Raises:
            InputError: one is unknown or out of range.
        """
        try:
            values = structure(cls, options)
        except InputError as error:
            raise InputError(f"{error} (an option of the engine alisa)") from error
        EngineConfig(sparsity=values.sparsity)  # checks its range
        return values


def check_options(engine: str, options: Mapping[str, Any]) -> None:
    """Raise InputError for an engine, an option or an answer that does not exist."""
    if engine == OWN:
        OwnOptions.of(options)
        return
    if engine not in PEERS:
        raise InputError(f"there is no engine {engine!r}, there is {', '.join((OWN, *PEERS))}")
    known = PEERS[engine].options
    for name, value in options.items():
        if name not in known:
            raise InputError(f"the engine {engine} has no option {name!r}, it has {', '.join(known) or 'none'}")
        answers = known[name]
        if answers is not None and value not in answers:
            raise InputError(f"{name} of the engine {engine} is {value!r}, there is {', '.join(answers)}")


@dataclass(frozen=True, slots=True)
class Reading:
    """What a decode step cannot avoid to read.

    Args:
        weights: what they are held in.
        rows: format of K and V, as `RowFormat` names it.
        tokens: earlier tokens of a sequence -> tokens that are read, the new one included.
    """

    weights: WeightFormat
    rows: str
    tokens: Callable[[int], int]


def reading_of(
    engine: str, options: Mapping[str, Any], dtype: str, final_len: int, stored: WeightFormat = "float"
) -> Reading:
    """What this engine reads when it does what it is asked.

    Args:
        engine: its name.
        options: what it is asked.
        dtype: of the arithmetic.
        final_len: tokens of its longest sequence.
        stored: what the model's file has its layers in.
    """
    if engine == OWN:
        own = OwnOptions.of(options)
        reads = reads_of(own.policy, own.sparsity)
        return Reading(own.weight_dtype, dtype if own.kv_dtype == "auto" else own.kv_dtype, lambda n: sum(reads(n)) + 1)
    if engine == "kvpress":
        kept = round(options.get("keep", KEPT) * final_len)
        return Reading("float", dtype, lambda n: min(n, kept) + 1)
    if engine == "openvino":
        rows = {"u8": "int8", "bf16": "bfloat16", "f16": "float16"}[options.get("kv_precision", "u8")]
        weights = _OPENVINO_WEIGHTS.get(str(options.get("variant")), "float")
        most = EVICTED_TO if options.get("variant") == "evict" else final_len
        return Reading(weights, rows, lambda n: min(n, most) + 1)
    if engine == "llamacpp":
        return Reading("int8" if options.get("weights") == "q8_0" else stored, "float16", lambda n: n + 1)
    quantised = engine == "transformers" and str(options.get("cache")).endswith("int4")
    return Reading("float", "int4" if quantised else dtype, lambda n: n + 1)
