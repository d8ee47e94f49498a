"""The tokenizer of a GGUF file, built anew from the vocabulary in its metadata.

Two kinds exist. `gpt2` is byte-level BPE: merges in order, and a name for how words are cut. `llama` is the BPE of
SentencePiece: merges are not stored, they follow from the vocabulary (any two tokens whose texts make up a third), and
the score of the third is their rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from alisa.errors import ModelError
from alisa.model.gguf.vocabulary import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Vocabulary
from alisa.model.gguf.word_split import find_word_split
from alisa.model.tokenizer import Tokenizer

# As in alisa.model.tokenizer: imported where it is used.
if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend
    from tokenizers.decoders import Decoder

_SPACE = "▁"
"""Stands for a space in the tokens of SentencePiece."""


def build_tokenizer(metadata: Mapping[str, Any], file_name: str) -> Tokenizer:
    """The tokenizer and chat template of a file.

    Args:
        metadata: all named values of the file.
        file_name: for messages.

    Raises:
        ModelError: there is no vocabulary, or one of a kind that is not read here.
    """
    vocabulary = Vocabulary(metadata, file_name)
    kind = vocabulary.value("model")
    if kind == "gpt2":
        backend, adds_bos = _byte_level(vocabulary)
    elif kind == "llama":
        backend, adds_bos = _sentencepiece(vocabulary), True
    else:
        raise ModelError(
            f"{file_name} has a tokenizer of kind {kind!r} (tokenizer.ggml.model); gpt2 (byte-level BPE) and llama "
            "(SentencePiece) are read."
        )
    # add_eos_token is for models that read whole texts: a prompt that is to be continued has no end.
    return Tokenizer(
        backend,
        leading_id=vocabulary.role_id("bos") if vocabulary.value("add_bos_token", adds_bos) else None,
        special_tokens=vocabulary.special_tokens(),
        eos_ids=vocabulary.end_ids(),
        chat_template=vocabulary.chat_template,
    )


def _byte_level(vocabulary: Vocabulary) -> tuple[Backend, bool]:
    """Byte-level BPE, and whether its texts begin with the first token unless the file says otherwise."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE

    split = find_word_split(vocabulary.value("pre", "default"), vocabulary.file_name)
    merges = vocabulary.value("merges")
    if merges is None:
        raise ModelError(f"{vocabulary.file_name} holds no merges (tokenizer.ggml.merges); convert the model anew.")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    backend = Backend(BPE(vocabulary.ids, pairs, ignore_merges=split.ignore_merges))
    if split.nfc:
        backend.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in split.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(_added(vocabulary, vocabulary.tokens))
    return backend, split.add_bos


def _sentencepiece(vocabulary: Vocabulary) -> Backend:
    """BPE over characters with `▁` for a space; a character that no token has becomes the tokens of its bytes."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, normalizers
    from tokenizers.models import BPE

    # Tokens of several spaces are stored with spaces, all other tokens with `▁`.
    runs = {token_id for token_id, token in enumerate(vocabulary.tokens) if len(token) > 1 and not token.strip(" ")}
    tokens = [_SPACE * len(token) if token_id in runs else token for token_id, token in enumerate(vocabulary.tokens)]
    unknown = vocabulary.role_id("unknown")
    model = BPE(
        {token: token_id for token_id, token in enumerate(tokens)},
        _merges(tokens, vocabulary),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Backend(model)
    steps: list[Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    replace = normalizers.Replace(" ", _SPACE)
    if vocabulary.value("add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = replace
    backend.decoder = decoders.Sequence(steps)
    # Runs of spaces are tokens of the merges: as added tokens they would be looked for before spaces become `▁`.
    backend.add_tokens([token for token in _added(vocabulary, tokens) if token.content.strip(_SPACE)])
    return backend


def _merges(tokens: list[str], vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every pair of tokens that makes up a third, the best third first: those that a user defined, then by score."""
    wanted = (NORMAL, USER_DEFINED)
    parts = {token for token, kind in zip(tokens, vocabulary.types, strict=True) if kind in wanted}
    ranked = sorted(
        (kind != USER_DEFINED, -score, token_id)
        for token_id, (kind, score) in enumerate(zip(vocabulary.types, vocabulary.scores, strict=True))
        if kind in wanted and len(tokens[token_id]) > 1
    )
    merges: list[tuple[str, str]] = []
    for _, _, token_id in ranked:
        token = tokens[token_id]
        merges += [
            (token[:cut], token[cut:]) for cut in range(1, len(token)) if token[:cut] in parts and token[cut:] in parts
        ]
    return merges


def _added(vocabulary: Vocabulary, tokens: list[str]) -> list[AddedToken]:
    """The tokens that are found in a text before anything else, in the order of their ids; control tokens are special.

    End tokens are special whatever their type: files of 2023 call every token normal.
    """
    from tokenizers import AddedToken

    special = vocabulary.end_ids() | {vocabulary.role_id("bos")}
    added = []
    for token_id, (token, kind) in enumerate(zip(tokens, vocabulary.types, strict=True)):
        is_special = kind in (UNKNOWN, CONTROL) or token_id in special
        if is_special or kind == USER_DEFINED:
            added.append(AddedToken(token, normalized=False, special=is_special))
    return added
