"""What the user asked for: frozen, complete at construction, and checked there.

`EngineConfig` says how to run, `SamplingParams` how to pick tokens for one request. Neither is ever filled in later;
what the machine or the model adds (free memory, number of rows) is derived into other objects.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from alisa.errors import InputError
from alisa.policy.registry import POLICIES

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
WeightDtypeName = Literal["auto", "int8"]
KvDtypeName = Literal["auto", "float32", "bfloat16", "float16", "int8", "int4"]
DeviceName = Literal["auto", "cpu", "cuda"]
if TYPE_CHECKING:
    PolicyName = str
else:
    PolicyName = Literal[tuple(POLICIES)]  # the command line offers them

_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{unit}b": factor for unit, factor in _UNITS.items() if len(unit) == 1 and unit != "b"}
_UNITS |= {f"{unit}ib": 1024 ** (i + 1) for i, unit in enumerate("kmgt")}


def parse_bytes(text: str | int, *, least: int = 1) -> int:
    """Bytes meant by `2GiB`, `512MB`, `1.5g` or a plain number.

    Args:
        text: the size.
        least: smallest size that makes sense, 0 where nothing at all is an answer.

    Raises:
        InputError: the text is not a size, or a smaller one.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    unit = match.group(2).lower() if match else None
    if match is None or unit not in _UNITS:
        raise InputError(f"{text!r} is not a memory size; write for example 2GiB, 512MiB or 800MB.")
    num_bytes = int(float(match.group(1)) * _UNITS[unit])
    if num_bytes < least:
        raise InputError(f"A memory size of {text!r} leaves no room at all; write for example 2GiB or 512MiB.")
    return num_bytes


def format_bytes(num_bytes: float) -> str:
    """Short binary form for messages: 1536 -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024 or unit == "GiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    Raises:
        InputError: at construction, naming every field that is out of range.
    """

    max_tokens: int = 128
    """Upper bound of generated tokens."""
    temperature: float = 0.0
    """0 picks the most likely token (greedy)."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches top_p."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the likeliest."""
    repetition_penalty: float = 1.0
    """Divide (positive) or multiply (negative) the logits of tokens seen in the prompt or the output (CTRL,
    1909.05858)."""
    stop: tuple[str, ...] = ()
    """End before the first of these strings; it is not part of the text."""
    stop_ids: tuple[int, ...] = ()
    """End at the first of these token ids, besides the model's own end tokens."""
    ignore_eos: bool = False
    """Go on after the model's end token; benchmarks want a fixed length."""
    seed: int = 0
    """The request draws the same random numbers for the same seed, whatever else is in the batch."""

    def __post_init__(self) -> None:
        wrong = [
            text
            for bad, text in (
                (self.max_tokens < 1, f"max_tokens is {self.max_tokens}, at least 1 is needed"),
                (not 0 <= self.temperature < 100, f"temperature is {self.temperature}, allowed is 0 to 100"),
                (self.top_k < 0, f"top_k is {self.top_k}, allowed is 0 (off) or more"),
                (not 0 < self.top_p <= 1, f"top_p is {self.top_p}, allowed is above 0 up to 1"),
                (not 0 <= self.min_p <= 1, f"min_p is {self.min_p}, allowed is 0 to 1"),
                (
                    not 0 < self.repetition_penalty < 100,
                    f"repetition_penalty is {self.repetition_penalty}, allowed is above 0 (1 is off)",
                ),
                (any(not text for text in self.stop), "an empty stop string would end every text at once"),
                (self.seed < 0, f"seed is {self.seed}, allowed is 0 or more"),
            )
            if bad
        ]
        if wrong:
            raise InputError("; ".join(wrong) + ".")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How the engine runs, as asked; `auto` and None are resolved where the answer is known, into other objects.

    Raises:
        InputError: at construction, naming every field that is out of range.
    """

    policy: PolicyName = "sketch"
    """Which earlier tokens a step reads. `sketch`: at sparsity 0.8 it loses 0.1 % of perplexity where `swa` loses 8 %,
    and it finds again what `swa` forgets (docs/accuracy.md)."""
    sparsity: float = 0.8
    """Share of the earlier tokens that a decode step does not read; 1 - r in the paper (r: caching ratio)."""
    dtype: DtypeName = "auto"
    weight_dtype: WeightDtypeName = "auto"
    """`auto`: the dtype the model computes in. `int8`: linear layers in 8 bits, on a CPU."""
    kv_dtype: KvDtypeName = "auto"
    """`auto`: the dtype the model computes in."""
    device: DeviceName = "auto"
    kv_device_memory: int | None = None
    """Hard cap in bytes of the KV rows on the device; None: half of the free memory."""
    kv_host_memory: int | None = None
    """Hard cap in bytes of the rows in main memory below a GPU; 0: none; None: half of the free memory. On a CPU main
    memory is the device, and this means nothing."""
    kv_disk_memory: int | None = None
    """Hard cap in bytes of the rows on disk; 0: no disk; None: what the work needs, within the free room."""
    kv_disk_path: Path | None = None
    """Directory whose disk takes the rows that do not fit; None: the system's directory for temporary files."""
    schedule: Path | None = None
    """File that says when rows move (docs/scheduling.md); None: when the memory caps demand it."""
    max_batch: int = 32
    """Sequences decoded together at the most."""
    prefill_chunk: int = 1024
    """Prompt tokens that go through the model in one pass; bounds the activations of long prompts."""

    def __post_init__(self) -> None:
        wrong = [
            text
            for bad, text in (
                (
                    self.policy not in get_args(PolicyName),
                    f"policy {self.policy!r} is unknown, there is {', '.join(get_args(PolicyName))}",
                ),
                (
                    self.weight_dtype not in get_args(WeightDtypeName),
                    f"weight_dtype {self.weight_dtype!r} is unknown, there is {', '.join(get_args(WeightDtypeName))}",
                ),
                (not 0 <= self.sparsity < 1, f"sparsity is {self.sparsity}, allowed is 0 (dense) up to but not 1"),
                (self.max_batch < 1, f"max_batch is {self.max_batch}, at least 1 is needed"),
                (self.prefill_chunk < 1, f"prefill_chunk is {self.prefill_chunk}, at least 1 is needed"),
                (self.kv_device_memory is not None and self.kv_device_memory < 1, "kv_device_memory must be above 0"),
                (self.kv_disk_memory is not None and self.kv_disk_memory < 0, "kv_disk_memory must not be below 0"),
            )
            if bad
        ]
        if wrong:
            raise InputError("; ".join(wrong) + ".")
