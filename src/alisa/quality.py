"""Names for how much may be lost: `--quality NAME` stands for a policy, a sparsity and a row format.

The rungs of a ladder: each keeps and reads fewer bytes than the one before it, at a loss that was measured on two real
models (docs/accuracy.md has the table, and benchmarks/real_tables.py makes it from the records).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

QualityName = Literal["exact", "high", "balanced", "small"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What a name stands for: fields of `EngineConfig`."""

    policy: str
    sparsity: float
    kv_dtype: str
    help: str
    """What it costs, for `--help`."""

    @property
    def options(self) -> dict[str, str | float]:
        """The options of the engine that it sets, by their names."""
        return {"policy": self.policy, "sparsity": self.sparsity, "kv_dtype": self.kv_dtype}


QUALITIES: Mapping[QualityName, Quality] = MappingProxyType(
    {
        "exact": Quality(policy="dense", sparsity=0.0, kv_dtype="auto", help="nothing is lost"),
        "high": Quality(policy="sketch", sparsity=0.9, kv_dtype="int8", help="no loss that shows"),
        "balanced": Quality(policy="sketch", sparsity=0.9, kv_dtype="k8v4", help="0.6 and 0.6 %"),
        "small": Quality(policy="sketch", sparsity=0.95, kv_dtype="int4", help="2.2 and 3.3 %"),
    }
)


def qualities_help() -> str:
    """One sentence for each name."""
    return " ".join(
        f"{name}: {rung.policy}"
        + ("" if rung.policy == "dense" else f" at sparsity {rung.sparsity:g}")
        + f", {rung.kv_dtype} rows: {rung.help}."
        for name, rung in QUALITIES.items()
    )
