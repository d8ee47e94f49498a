"""How a planned run reads and guesses ahead: the engine's options of the same names, and what a plan must assume."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from alisa.errors import InputError

if TYPE_CHECKING:
    from alisa.planner.hardware import Hardware
    from alisa.planner.sparse_reading import SparseReading
    from alisa.planner.speculation import DraftConfig


@dataclass(frozen=True, kw_only=True)
class ModeQuestion:
    """Drafts and sparse prompts, as for `alisa generate`, and what is assumed of texts that nobody has seen."""

    exact: bool = False
    """The tokens of dense attention: --policy makes up drafts, and a step that reads everything says which are right.
    The plan says where that cannot pay."""
    speculative: Literal["off", "lookup"] = "off"
    """lookup: drafts are what followed the last time that the text read so."""
    num_speculative_tokens: Annotated[int, arg(metavar="N")] = 8
    """Most drafts of one sequence in a step."""
    draft_acceptance: Annotated[
        float | None, arg(metavar="SHARE", help_behavior_hint="(default: 0.87, with lookup 0.08)")
    ] = None
    """The chance that a draft is right, where those before it were; with lookup, a place where the text has no draft
    counts as wrong. The defaults are what SmolLM2 showed (docs/speculation.md): 0.87 with sketch at sparsity 0.9, 0.08
    with lookup in prose; texts that are copied had 0.62 and more."""
    coverage: Annotated[float | None, arg(metavar="SHARE", help_behavior_hint="")] = None
    """As few tokens as have this part of the attention weight; every step is counted as if it read all that the
    sparsity allows."""
    sparse_prompts: Annotated[float | None, arg(metavar="ALPHA", help_behavior_hint="")] = None
    """Prompts are read sparsely from their 2049th token on; on a CPU. That saves time where there are native kernels:
    bfloat16, AVX2 and no AMX."""
    sparse_share: Annotated[float | None, arg(metavar="SHARE", help_behavior_hint="(default: as measured)")] = None
    """With --sparse-prompts: the part of the attention after the 2048th token that is left. By default what SmolLM2
    showed at 0.03 (docs/accuracy.md): two thirds with each doubling of the prompt. Gemma 3 270M had 0.99."""

    def engine_options(self) -> dict[str, Any]:
        """Those that are the engine's, by its names."""
        return {
            "exact": self.exact,
            "speculative": self.speculative,
            "num_speculative_tokens": self.num_speculative_tokens,
            "coverage": self.coverage,
            "sparse_prompts": self.sparse_prompts,
        }

    def drafts(self) -> DraftConfig | None:
        """How the run guesses ahead.

        Raises:
            InputError: the acceptance is no share, or of nothing.
        """
        from alisa.planner.speculation import MEASURED_ACCEPTANCE, DraftConfig, DraftSource

        if not self.exact and self.speculative == "off":
            if self.draft_acceptance is not None:
                raise InputError("--draft-acceptance is of drafts; give --exact or --speculative lookup, too.")
            return None
        if self.draft_acceptance is not None and not 0 <= self.draft_acceptance <= 1:
            raise InputError(f"--draft-acceptance is {self.draft_acceptance:g}, allowed is 0 to 1.")
        source: DraftSource = "policy" if self.exact else "text"
        acceptance = MEASURED_ACCEPTANCE[source] if self.draft_acceptance is None else self.draft_acceptance
        return DraftConfig(source, acceptance, self.num_speculative_tokens)

    def sparse(self, hardware: Hardware) -> SparseReading | None:
        """How sparsely prompts are read.

        Raises:
            InputError: this machine reads prompts densely, or the share is none, of nothing or unknown.
        """
        from alisa.planner.sparse_reading import SparseReading

        if self.sparse_prompts is None:
            if self.sparse_share is not None:
                raise InputError("--sparse-share is of prompts that are read sparsely; give --sparse-prompts, too.")
            return None
        if hardware.below == "host":
            raise InputError("--sparse-prompts runs on a CPU only: a GPU reads prompts densely; leave it out.")
        return SparseReading(self.sparse_prompts, self.sparse_share)

    def flags(self) -> str:
        """What `alisa generate` is told of them, each with a blank before it."""
        words = ["--exact"] if self.exact else []
        words += ["--speculative lookup"] if self.speculative == "lookup" else []
        drafts = self.exact or self.speculative == "lookup"
        words += [f"--num-speculative-tokens {self.num_speculative_tokens}"] if drafts else []
        words += [] if self.coverage is None else [f"--coverage {self.coverage:g}"]
        words += [] if self.sparse_prompts is None else [f"--sparse-prompts {self.sparse_prompts:g}"]
        return "".join(f" {word}" for word in words)
