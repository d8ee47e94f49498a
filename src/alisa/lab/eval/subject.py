"""The model under evaluation, and the combinations of policy, sparsity and row format that it is run with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from alisa.cache.codec import make_codec
from alisa.config import EngineConfig, KvDtypeName, PolicyName, SamplingParams
from alisa.errors import InputError
from alisa.kernels.base import Codec
from alisa.lab.scoring import Scorer
from alisa.llm import LLM
from alisa.model.tokenizer import Tokenizer
from alisa.planner.footprint import policy_bytes
from alisa.policy.base import SelectionPolicy
from alisa.policy.layer_budgets import layer_sparsities, load_layer_budgets
from alisa.policy.registry import POLICIES, make_policy
from alisa.spec import ModelSpec, RowFormat


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run the model: a column, row or cell of a table."""

    policy: PolicyName
    sparsity: float
    kv_dtype: KvDtypeName
    """`auto`: what the model computes in."""
    coverage: float | None = None
    layers: tuple[float, ...] = ()
    """As in `Budget.layers`."""
    budgets: Path | None = None
    """The file that they are from."""

    def selection_policy(self) -> SelectionPolicy:
        """The policy object."""
        return make_policy(self.policy, self.sparsity, self.coverage, self.layers)


BASELINE = Variant("dense", 0.0, "auto")
"""What every other variant is compared with: everything read, rows as precise as the arithmetic."""


def variants(
    policies: Sequence[PolicyName],
    sparsities: Sequence[float],
    kv_dtypes: Sequence[KvDtypeName],
    coverages: Sequence[float | None] = (None,),
) -> tuple[Variant, ...]:
    """Every combination once, the baseline first; dense has one sparsity, 0, and a policy may know no coverage."""
    found = [BASELINE]
    for kv_dtype in kv_dtypes:
        for policy in policies:
            known = coverages if POLICIES[policy].covers else (None,)
            for sparsity in (0.0,) if policy == "dense" else sparsities:
                found += [Variant(policy, sparsity, kv_dtype, coverage) for coverage in known]
    return tuple(dict.fromkeys(found))


def with_budgets(found: Sequence[Variant], path: Path, spec: ModelSpec) -> tuple[Variant, ...]:
    """The same variants, and those of the policy and the sparsities of a file of budgets with these, too.

    Raises:
        InputError: it cannot be read, or is of another model.
    """
    budgets = load_layer_budgets(path)
    known = {budget.sparsity for budget in budgets.budgets}
    more = [
        replace(variant, layers=layer_sparsities(path, spec, variant.policy, variant.sparsity), budgets=path)
        for variant in found
        if variant.policy == budgets.policy and variant.sparsity in known
    ]
    return (*found, *more)


@dataclass(frozen=True, slots=True)
class Subject:
    """A loaded model with all that scoring needs."""

    llm: LLM
    """Its own policy, sparsity and row format play no part."""
    scorer: Scorer

    @classmethod
    def of(cls, llm: LLM) -> Subject:
        """The model of an `LLM`, under its memory cap."""
        return cls(llm, Scorer.of(llm))

    @property
    def name(self) -> str:
        """The model as it was asked for."""
        return self.llm.name

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to token ids and back."""
        return self.llm.tokenizer

    @property
    def weight_dtype(self) -> str:
        """What the linear layers are held in."""
        return self.llm.weight_dtype

    @property
    def spec(self) -> ModelSpec:
        """Shape of the model."""
        return self.scorer.decoder.spec

    def kv_dtype(self, variant: Variant) -> str:
        """The row format of a variant, `auto` resolved."""
        dtype = str(self.scorer.decoder.dtype).removeprefix("torch.")
        return dtype if variant.kv_dtype == "auto" else variant.kv_dtype

    def codec(self, variant: Variant) -> Codec:
        """Writes and reads the rows of a variant."""
        return make_codec(RowFormat(self.kv_dtype(variant), self.spec.num_kv_heads, self.spec.head_dim))

    def row_bytes(self, variant: Variant) -> int:
        """KV bytes of one token over all layers."""
        return self.spec.num_layers * self.codec(variant).format.row_bytes

    def state_bytes(self, variant: Variant, length: int) -> float:
        """Bytes of policy state for each token of a sequence of `length` tokens: the memory a policy costs on top."""
        return policy_bytes(self.spec, variant.policy, variant.sparsity, 1, length) / length

    def check_length(self, length: int, what: str) -> None:
        """Refuse sequences that the model has no positions for.

        Raises:
            InputError: `length` is too long.
        """
        if length > self.spec.max_positions:
            raise InputError(
                f"{what} has {length} tokens and {self.name} has {self.spec.max_positions} positions; choose at most "
                f"that many."
            )

    def generate(
        self, variant: Variant, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[tuple[int, ...]]:
        """Tokens that the engine writes under a variant, in the order of the prompts.

        Raises:
            CapacityError: a text can never fit under the cap.
        """
        config = self.llm.config
        config = EngineConfig(
            policy=variant.policy,
            sparsity=variant.sparsity,
            coverage=variant.coverage,
            budgets=variant.budgets,
            kv_dtype=variant.kv_dtype,
            dtype=config.dtype,
            weight_dtype=config.weight_dtype,
            kv_device_memory=config.kv_device_memory,
            max_num_seqs=config.max_num_seqs,
            max_model_len=max(len(prompt) + each.max_tokens for prompt, each in zip(prompts, params, strict=True)),
            prefill_chunk=config.prefill_chunk,
        )
        with LLM(config=config, loaded=self.llm.model) as llm:
            return [output.token_ids for output in llm.generate(prompts, params)]
