"""Attention while a prompt is read, native, of bfloat16 queries, keys and values: functions of tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from alisa.kernels.base import KeyBlock
from alisa.kernels.checks import check_prefill
from alisa.kernels.native import library
from alisa.kernels.reference.sparse_prefill import BLOCK


def prefill_isa_names() -> tuple[str, ...]:
    """Instruction sets whose kernels this build and this CPU have, fastest first."""
    return tuple(library.native().prefill_isa_names()) if library.available() else ()


def available() -> bool:
    """Whether this build and this CPU have the kernels, and torch has nothing faster (its AMX tiles)."""
    # Private to torch; the public query of capabilities came after the oldest version that we run with.
    return bool(prefill_isa_names()) and not torch.cpu._is_amx_tile_supported()


class CpuPrefill:
    """The prefill kernels with their working memory: as much as keys and values of one KV head, packed.

    What a token gets does not depend on the other tokens, nor on the number of threads.

    Args:
        isa: one of `prefill_isa_names()`; by default the fastest. AVX2 multiplies in float32; AVX512-BF16 rounds
            weights to bfloat16 before they meet the values.
        num_threads: threads to use; by default as many as torch uses at the time of the call.
        share_threads: run on torch's OpenMP threads where they can be found.
    """

    def __init__(self, isa: str | None = None, *, num_threads: int | None = None, share_threads: bool = True) -> None:
        names = prefill_isa_names()
        if not names or (isa is not None and isa not in names):
            raise RuntimeError(
                f"this CPU or build has no {isa or ''} prefill kernels; there are {', '.join(names) or 'none'}"
            )
        self.isa = isa or names[0]
        self._team = library.Team(num_threads, share=share_threads)
        self._workspace = library.native().Workspace()

    def attend(
        self,
        q: Tensor,
        own: KeyBlock,
        past: Iterable[KeyBlock],
        window: int | None = None,
        softcap: float | None = None,
        chosen: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of T tokens to all of `past`, block by block, and to the tokens up to their own in `own`.

        They are the last T of its N tokens.

        Args:
            q: BFloat16[T, H, D].
            own: k and v BFloat16[N, G, D], from the begin of a section to the last of these tokens.
            past: k and v BFloat16[S, G, D] of earlier tokens, S at least 1.
            window: tokens that each query sees, itself included; None: all.
            softcap: scores s become softcap * tanh(s / softcap); None: they stay as they are.
            chosen: UInt8[ceil(T / 64), G, B], contiguous: which blocks of 64 keys, from the first of the sequence on,
                each 64 queries read; None: all. Sections and the queries begin where a block does.

        Returns:
            BFloat16[T, H, D] and the log-sum-exp Float32[T, H] of the scaled scores.
        """
        q, out = _runs(q), torch.empty(q.shape, dtype=q.dtype)
        log_sum_exp = torch.empty(q.shape[:2])
        first = own.start + len(own.k) - len(q)
        before: Tensor | None = None
        for block in past:
            # Query t sees the keys of a block from t + hidden on.
            hidden = None if window is None else first - block.start + 1 - window
            if hidden is not None and hidden >= len(block.k):
                continue
            merged = torch.empty(q.shape) if before is None else before
            self._attend(q, block, len(block.k), hidden, softcap, before, merged, out, log_sum_exp, chosen)
            before = merged
        ahead = len(own.k) - len(q)
        hidden = None if window is None else ahead + 1 - window
        self._attend(q, own, ahead, hidden, softcap, before, None, out, log_sum_exp, chosen)
        return out, log_sum_exp

    def means(self, k: Tensor) -> Tensor:
        """Means BFloat16[N // 64, G, D] of the whole blocks of keys BFloat16[N, G, D]."""
        k = _runs(k)
        num_blocks, num_kv_heads, head_dim = len(k) // BLOCK, *k.shape[1:]
        means = torch.empty(num_blocks, num_kv_heads, head_dim, dtype=k.dtype)
        self._workspace.prefill_means(
            isa=self.isa,
            threads=self._team.threads(),
            k=_place(k),
            num_blocks=num_blocks,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            means=means.data_ptr(),
        )
        return means

    def choose(
        self, q: Tensor, means: Tensor, first_block: int, alpha: float, chosen: Tensor, softcap: float | None = None
    ) -> None:
        """Which blocks of keys the queries of each block read, as `reference.sparse_prefill.choose_blocks` says.

        Args:
            q: BFloat16[B * 64, H, D].
            means: BFloat16[M, G, D] of the blocks from the first of the sequence on.
            first_block: number of the first block of queries.
            alpha: see `choose_blocks`.
            chosen: UInt8[B, G, first_block + B or more], contiguous; what comes after a block's own is left as it is.
            softcap: as in `attend`.
        """
        check_prefill(q, means, means)
        q = _runs(q)
        assert len(q) % BLOCK == 0, "blocks of queries are whole"
        assert len(means) >= first_block + len(q) // BLOCK - 1, "all blocks before have means"
        assert len(q) // BLOCK == len(chosen), "each block has a choice"
        assert chosen.shape[2] >= first_block + len(chosen), "of all blocks up to its own"
        self._workspace.prefill_choose(
            isa=self.isa,
            threads=self._team.threads(),
            q=_place(q),
            means=_place(means),
            num_queries=len(q),
            first_block=first_block,
            num_heads=q.shape[1],
            num_kv_heads=means.shape[1],
            head_dim=q.shape[2],
            softcap=softcap or 0.0,
            alpha=alpha,
            chosen=chosen.data_ptr(),
            chosen_stride=chosen.shape[2],
        )

    def mass(
        self, q: Tensor, k: Tensor, log_sum_exp: Tensor, ahead: int, num_sets: int, softcap: float | None = None
    ) -> Tensor:
        """Attention weights Float32[W, J, S] of W tokens on S, summed over the heads of each index set.

        Args:
            q: BFloat16[W, H, D].
            k: BFloat16[S, G, D].
            log_sum_exp: Float32[W, H], over everything that the tokens attend to.
            ahead: token w sees keys 0 to `ahead + w`; from S on it sees all of them, below 0 none.
            num_sets: J, 1 for all heads together or G for those of a KV head each.
            softcap: as in `attend`.
        """
        check_prefill(q, k, k)
        q, k, log_sum_exp = _runs(q), _runs(k), log_sum_exp.contiguous()
        if log_sum_exp.shape != q.shape[:2] or log_sum_exp.dtype != torch.float32:
            raise ValueError(f"log-sum-exp is Float32{list(q.shape[:2])}, not {log_sum_exp.dtype} {log_sum_exp.shape}")
        mass = torch.empty(len(q), num_sets, len(k))
        self._workspace.prefill_mass(
            isa=self.isa,
            threads=self._team.threads(),
            q=_place(q),
            k=_place(k),
            num_queries=len(q),
            num_keys=len(k),
            num_heads=q.shape[1],
            num_kv_heads=k.shape[1],
            head_dim=q.shape[2],
            num_sets=num_sets,
            ahead=ahead,
            softcap=softcap or 0.0,
            log_sum_exp=log_sum_exp.data_ptr(),
            mass=mass.data_ptr(),
        )
        return mass

    def _attend(
        self,
        q: Tensor,
        block: KeyBlock,
        ahead: int,
        hidden: int | None,
        softcap: float | None,
        before: Tensor | None,
        after: Tensor | None,
        out: Tensor,
        log_sum_exp: Tensor,
        chosen: Tensor | None,
    ) -> None:
        """One block: merged with `before` into `after`, or into `out` at the end.

        Token t sees keys 0 to ahead + t, without those before t + hidden.
        """
        k, v = block.k, block.v
        check_prefill(q, k, v)
        k, v = _runs(k), _runs(v)
        self._workspace.prefill(
            isa=self.isa,
            threads=self._team.threads(),
            q=_place(q),
            k=_place(k),
            v=_place(v),
            num_queries=len(q),
            num_keys=len(k),
            num_heads=q.shape[1],
            num_kv_heads=k.shape[1],
            head_dim=q.shape[2],
            ahead=ahead,
            hidden=hidden,
            softcap=softcap or 0.0,
            before=0 if before is None else before.data_ptr(),
            after=0 if after is None else after.data_ptr(),
            out=out.data_ptr(),
            log_sum_exp=log_sum_exp.data_ptr(),
            chosen=0 if chosen is None else chosen.data_ptr() + block.start // BLOCK,
            chosen_stride=0 if chosen is None else chosen.shape[2],
        )


def _runs(values: Tensor) -> Tensor:
    """`[N, heads, D]` with each head's values in one run; a copy only where they are not."""
    return values if values.stride(2) == 1 else values.contiguous()


def _place(values: Tensor) -> tuple[int, int, int]:
    """Address, and the strides from one token and from one head to the next."""
    return values.data_ptr(), values.stride(0), values.stride(1)
