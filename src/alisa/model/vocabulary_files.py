"""Tokenizers from vocab.json and merges.txt: byte-level BPE, cut into words the way the repository's class does it.

The two files do not say how text is cut before the merges; the class named in tokenizer_config.json does, and what it
does is written down here. A class that is not known is refused: another way of cutting gives other ids for most texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alisa.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_KNOWN = ("GPT2Tokenizer", "Qwen2Tokenizer")
_CLASS_OF_MODEL = {
    "gpt2": "GPT2Tokenizer",
    "opt": "GPT2Tokenizer",
    "starcoder2": "GPT2Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
}
"""The class of a repository that names none."""

# Qwen 2 to 3: contractions whatever their case, words with one leading mark, digits one by one, marks, line ends.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level_bpe(directory: Path, settings: Mapping[str, Any], model_type: object) -> Backend:
    """The tokenizer of a directory with vocab.json and merges.txt, without its added tokens.

    Args:
        directory: holds the two files.
        settings: of tokenizer_config.json.
        model_type: of config.json; decides where the settings name no class.

    Raises:
        ModelError: the class is not known; the message has the recipe.
    """
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE

    named = settings.get("tokenizer_class")
    kind = (named if isinstance(named, str) else _CLASS_OF_MODEL.get(str(model_type), "unnamed")).removesuffix("Fast")
    if kind not in _KNOWN:
        raise ModelError(
            f"{directory} has its tokenizer as vocab.json and merges.txt, and its class {kind} is not known here; "
            "convert it once with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes "
            "tokenizer.json."
        )
    backend = Backend(BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt")))
    add_prefix_space = bool(settings.get("add_prefix_space", False))
    backend.decoder = decoders.ByteLevel()
    if kind == "Qwen2Tokenizer":
        backend.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated", invert=False)
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    return backend
