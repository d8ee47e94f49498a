"""What a repository is when its weights are not those of a plain model: quantised, an adapter, wrapped.

So that the error says what lies there, and what to do, instead of sending the user to download the same files again.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence

_LOG = logging.getLogger("alisa")

_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.", "language_model.")
"""What training frameworks and multimodal models put before the names of the model inside."""
# A head of a reward model beside the output projection, and scales of an 8-bit cache; transformers leaves them, too.
_UNUSED = re.compile(r"(^|\.)v_head\.|\.(k|v)_(scale|zero_point)$")
_PACKED = re.compile(r"\.(qweight|qzeros|g_idx|scales|SCB|absmax|quant_map|weight_scale(_inv)?|weight_packed|biases)$")


def unwrapped(name: str) -> str:
    """The name of a tensor without what wraps the model."""
    for wrapper in _WRAPPERS:
        if name.startswith(wrapper):
            return unwrapped(name[len(wrapper) :])
    return name


def without_unused(names: Iterable[str]) -> list[str]:
    """The names without tensors that a plain model has no use for; one warning names them."""
    kept: list[str] = []
    unused: list[str] = []
    for name in names:
        (unused if _UNUSED.search(name) else kept).append(name)
    if unused:
        _LOG.warning("%d tensors are no part of the model and are left out, %s for example.", len(unused), unused[0])
    return kept


def what_it_is(missing: Sequence[str], extra: Sequence[str]) -> str:
    """What weights of these missing and unknown names probably are, and what to do, as the end of a sentence."""
    if any("lora_" in name for name in extra):
        return "they hold an adapter (LoRA): merge it into its base model once with peft (merge_and_unload)"
    if any(_PACKED.search(name) for name in extra):
        return "they are quantised, and only float weights can be read: give the repository that they were made from"
    if any(name.startswith(("score.", "classifier.", "qa_outputs.")) for name in extra):
        return "they are of a classifier, which has no output projection to generate text with"
    if list(missing) == ["lm_head.weight"]:
        return (
            "the output projection is not there: if it is the embedding table, set tie_word_embeddings to true in "
            "config.json"
        )
    return "download the repository again"
