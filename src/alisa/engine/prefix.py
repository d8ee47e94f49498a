"""The prefix cache of an engine: its share of the caps, and what the names of its blocks stand for."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from alisa import __version__
from alisa.attention.prefill import SECTION_TOKENS, is_exact
from alisa.attention.sparse_prompts import QUERY_BLOCK_TOKENS
from alisa.cache.prefix.blocks import BlockLayout
from alisa.cache.prefix.cache import PrefixCache
from alisa.cache.prefix.files import BlockFiles, check_size
from alisa.config import EngineConfig, format_bytes, parse_bytes
from alisa.engine.loaded import LoadedModel
from alisa.errors import CapacityError
from alisa.kernels.base import KeyBlock
from alisa.policy.registry import POLICIES
from alisa.scheduler.prefix import BLOCK_TOKENS, BlockName, block_names
from alisa.spec import RowFormat

_LOG = logging.getLogger("alisa")

DEFAULT_SHARE = 4
"""One part in this many of the cap is the prefix cache's when nothing else is said."""

DEFAULT_DISK = "8GiB"

_NAME_BYTES = 300
"""What a block takes beside its K and V: its name and its place in the list of blocks."""

_PROBE_TOKENS = 32


@dataclass(frozen=True, slots=True)
class PrefixRules:
    """Which beginnings of two prompts are equal to the last bit, and how much of a prompt may be taken from them."""

    policy: str
    sparsity: float
    hit_tokens: int
    """Where rows are rounded, what a section's tokens see of each other is not in the rows: whole sections, then."""
    rotates_by_length: bool
    """K depends on how long a sequence may become."""
    salt: bytes
    kept_tokens: int = BLOCK_TOKENS
    """What is kept of a prompt ends at a multiple of this."""

    def num_kept(self, prompt_len: int) -> int:
        """Blocks of a prompt that are kept."""
        return prompt_len // self.kept_tokens * self.kept_tokens // BLOCK_TOKENS

    def names(self, prompt_ids: Sequence[int], num_rows: int, cache_salt: str) -> tuple[BlockName, ...]:
        """Names of the blocks of a prompt that are kept, of a request that may come to need so many rows."""
        asked = [cache_salt, num_rows if self.rotates_by_length else 0]
        return block_names(
            prompt_ids[: self.num_kept(len(prompt_ids)) * BLOCK_TOKENS], self.salt + json.dumps(asked).encode()
        )

    def most(self, prompt_len: int) -> int:
        """Tokens of a prompt that may come from the cache; its last one chooses a token, and is computed."""
        usable = min(POLICIES[self.policy].usable_prefix(self.sparsity, prompt_len), prompt_len - 1)
        return usable // self.hit_tokens * self.hit_tokens


def prefix_share(config: EngineConfig, cap_bytes: int) -> int:
    """Bytes of this cap that are the prefix cache's; 0 where there is none.

    Raises:
        CapacityError: it asks for all of the cap.
    """
    if not keeps_prefixes(config):
        return 0
    asked = config.prefix_cache_memory
    share = cap_bytes // DEFAULT_SHARE if asked is None else parse_bytes(asked)
    if share >= cap_bytes:
        raise CapacityError(
            f"A prefix cache of {format_bytes(share)} leaves nothing of a cap of {format_bytes(cap_bytes)}; lower "
            "--prefix-cache-memory, or raise the cap."
        )
    return share


def keeps_prefixes(config: EngineConfig) -> bool:
    """Whether there is a prefix cache; a policy that has to see every row of a prompt computed cannot use one."""
    if not config.prefix_cache:
        return False
    if POLICIES[config.policy].usable_prefix(config.sparsity, 1 << 20) > 0:
        return True
    _LOG.warning("--policy %s looks at every row of a prompt: --prefix-cache does nothing.", config.policy)
    return False


def build_prefix(
    model: LoadedModel, config: EngineConfig, kv_dtype: str, num_bytes: int, *, keeps_hidden: bool
) -> tuple[PrefixCache, PrefixRules]:
    """A prefix cache of so many bytes, and the rules for it.

    Args:
        model: whose prompts are kept.
        config: its options.
        kv_dtype: of the rows.
        num_bytes: all that it takes.
        keeps_hidden: whether rows may be deleted, so that what they are rebuilt from is kept as well.

    Raises:
        CapacityError: not even a block has room.
        InputError: the directory cannot be used.
    """
    spec = model.spec
    layout = BlockLayout(
        spec.num_layers,
        spec.num_kv_heads,
        spec.head_dim,
        model.decoder.dtype,
        hidden_size=spec.hidden_size if keeps_hidden else 0,
    )
    num_blocks = num_bytes // (layout.nbytes + _NAME_BYTES)
    if num_blocks < 1:
        raise CapacityError(
            f"A prefix cache of {format_bytes(num_bytes)} has no room for a block of {BLOCK_TOKENS} tokens, which is "
            f"{format_bytes(layout.nbytes)}; raise --prefix-cache-memory or the cap."
        )
    exact = is_exact(kv_dtype, model.decoder.dtype)
    # Where prompts are read sparsely, a last block of queries that is not whole reads other keys than a whole one.
    kept_tokens = BLOCK_TOKENS if config.sparse_prompts is None else QUERY_BLOCK_TOKENS
    rules = PrefixRules(
        policy=config.policy,
        sparsity=config.sparsity,
        hit_tokens=kept_tokens if exact else SECTION_TOKENS,
        rotates_by_length=spec.rotates_by_length,
        salt=b"" if config.prefix_cache_disk is None else _fingerprint(model, config, kv_dtype, layout),
        kept_tokens=kept_tokens,
    )
    files = None
    if config.prefix_cache_disk is not None:
        most = parse_bytes(config.prefix_cache_disk_memory or DEFAULT_DISK)
        check_size(most, layout.nbytes)
        files = BlockFiles(config.prefix_cache_disk, most)
    return PrefixCache(num_blocks, layout, files, rules.hit_tokens), rules


def _fingerprint(model: LoadedModel, config: EngineConfig, kv_dtype: str, layout: BlockLayout) -> bytes:
    """What blocks in files depend on besides tokens.

    The model is known by the bits of K and V that it gives for a few tokens: they say at once which weights it has, in
    what precision, and how this machine adds up.
    """
    versions: list[object] = [
        __version__,
        torch.__version__,
        model.backend.name,
        kv_dtype,
        RowFormat(kv_dtype, model.spec.num_kv_heads, model.spec.head_dim).num_parts,
        str(model.dtype),
        layout.hidden_size,
    ]
    if config.sparse_prompts is not None:
        versions.append(config.sparse_prompts)
    found = blake2b(json.dumps(versions).encode(), digest_size=32)
    vocab, device = model.spec.vocab_size, model.decoder.device

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        for values in (k, v):
            found.update(values.contiguous().cpu().view(torch.uint8).numpy().tobytes())
        own = KeyBlock(0, k[0], v[0])
        return model.backend.prefill(q[0], own, len(q[0]), lambda: (), 0, 1)[0][None]

    count = min(_PROBE_TOKENS, model.spec.max_positions)
    ids = torch.arange(count, device=device)[None] * (vocab // count) % vocab
    positions = torch.arange(count, device=device)[None]
    with torch.inference_mode():
        model.decoder.forward(ids, positions, attend, torch.full_like(ids, count))
    return found.digest()
