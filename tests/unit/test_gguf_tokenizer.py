"""Tokenizers rebuilt from GGUF metadata: against the ones they were made from, and against llama.cpp's own tests."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from real_models import cache_directory

from alisa.errors import InputError, ModelError
from alisa.model.gguf.file import GgufFile
from alisa.model.gguf.tokenizer import build_tokenizer
from tests.unit.test_tokenizer import TEXTS, byte_level, sentencepiece_like

VOCABULARIES = cache_directory() / "llama.cpp-vocabularies"
NO_VOCABULARIES = (
    f"the vocabularies of llama.cpp are not in {VOCABULARIES}; models/ggml-vocab-* of the source package of "
    "llama-cpp-python go there"
)


def byte_level_metadata() -> dict[str, Any]:
    """What a converter makes of the small byte-level tokenizer of the other tests."""
    fields = json.loads(byte_level().to_str())
    tokens = sorted(fields["model"]["vocab"], key=fields["model"]["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([3 if index < 4 else 1 for index in range(len(tokens))]),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in fields["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def sentencepiece_metadata() -> dict[str, Any]:
    """The same for the small tokenizer in the manner of LLaMA 2: merges become scores."""
    fields = json.loads(sentencepiece_like(metaspace=False).to_str())["model"]
    tokens = sorted(fields["vocab"], key=fields["vocab"].get)
    made = [left + right for left, right in fields["merges"]]
    scores = [-float(made.index(token)) if token in made else -1e4 for token in tokens]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types),
        "tokenizer.ggml.scores": np.array(scores),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def made(metadata: dict[str, Any], **changes: Any):
    changed = {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    return build_tokenizer({name: value for name, value in (metadata | changed).items() if value is not None}, "x.gguf")


ORIGINALS = {
    "byte-level": (byte_level, byte_level_metadata, False),
    "sentencepiece": (lambda: sentencepiece_like(metaspace=False), sentencepiece_metadata, True),
}


@pytest.fixture(scope="module", params=ORIGINALS)
def pair(request):
    original, metadata, adds_bos = ORIGINALS[request.param]
    return original(), made(metadata()), adds_bos


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_those_of_the_original(pair, text):
    original, tokenizer, adds_bos = pair
    ids = tokenizer.encode(text)
    expected = original.encode(text, add_special_tokens=False).ids
    assert len(set(expected)) > 5
    assert ids == ([1] if adds_bos else []) + expected
    assert tokenizer.decode(ids) == original.decode(ids) == text


@given(text=st.text(max_size=40))
def test_any_text_comes_back(pair, text):
    original, tokenizer, adds_bos = pair
    assert tokenizer.encode(text)[adds_bos:] == original.encode(text, add_special_tokens=False).ids
    # Marks look like those that the vocabulary is written with, or are control tokens, which are no text.
    if not any(mark in text for mark in ("▁", "<s>", "</s>", "<unk>", "<0x", "<|")):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_control_tokens_are_found_whole_and_do_not_come_out():
    tokenizer = made(byte_level_metadata())
    ids = tokenizer.encode("<|im_start|>the fox<|im_end|>")
    assert (ids[0], ids[-1]) == (3, 2)
    assert tokenizer.decode(ids) == "the fox"
    assert tokenizer.special_ids(["<|im_end|>", "fox"]) == {2: "<|im_end|>"}


def test_tokens_of_a_user_are_found_whole_and_come_out():
    metadata = byte_level_metadata()
    metadata["tokenizer.ggml.tokens"][2:4] = ["<tool>", "\n\n"]
    types = metadata["tokenizer.ggml.token_type"]
    types[2:4] = 4
    tokenizer = made(metadata)
    assert tokenizer.encode("<tool>\n\n") == [2, 3]
    assert tokenizer.decode([2, 3]) == "<tool>\n\n"
    assert not tokenizer.special_ids(["<tool>"])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {1, 2}),  # <|im_end|> by its text
        ({"eos_token_id": None}, {2}),
        ({"eot_token_id": 20, "eom_token_id": 21}, {1, 2, 20, 21}),
        ({"eos_token_id": 10**6}, {2}),
        ({"token_type": None}, {1}),
    ],
)
def test_every_end_token_ends(changes, expected):
    assert made(byte_level_metadata(), **changes).eos_ids == expected


def test_a_token_that_ends_is_special_in_files_without_types():
    tokenizer = made(byte_level_metadata(), token_type=None)
    assert tokenizer.encode("</s>") == [1]
    assert tokenizer.decode([1]) == ""


@pytest.mark.parametrize(
    ("metadata", "changes", "leads"),
    [
        (byte_level_metadata, {}, False),
        (byte_level_metadata, {"add_bos_token": True}, True),
        (byte_level_metadata, {"pre": "llama-bpe"}, True),
        (byte_level_metadata, {"pre": "llama-bpe", "add_bos_token": False}, False),
        (sentencepiece_metadata, {}, True),
        (sentencepiece_metadata, {"add_bos_token": False}, False),
        (sentencepiece_metadata, {"bos_token_id": None}, False),
    ],
)
def test_the_leading_token(metadata, changes, leads):
    ids = made(metadata(), **changes).encode("the fox")
    assert (ids[0] in (0, 1)) == leads


def test_the_space_in_front_can_be_left_out():
    tokenizer = made(sentencepiece_metadata(), add_space_prefix=False, add_bos_token=False)
    assert tokenizer.encode("the") != tokenizer.encode(" the")
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"
    assert tokenizer.decode(tokenizer.encode("the")) == "the"


def test_runs_of_spaces_are_merged_first():
    metadata = sentencepiece_metadata()
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    place = tokens.index("▁▁")
    tokens[place], types[place] = "  ", 4
    metadata["tokenizer.ggml.scores"][place] = -1e9
    tokenizer = made(metadata, add_space_prefix=False, add_bos_token=False)
    assert tokenizer.encode("  an")[0] == place
    assert tokenizer.decode(tokenizer.encode("a  an")) == "a  an"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["x", "123"]),
        ("smollm", ["x", "1", "2", "3"]),
        ("qwen2", ["x", "1", "2", "3"]),
        ("llama-bpe", ["x", "123"]),
        ("default", ["x", "123"]),
    ],
)
def test_the_name_of_the_pre_tokenizer_decides_where_words_end(pre, pieces):
    metadata = byte_level_metadata()
    metadata["tokenizer.ggml.tokens"] += ["12", "123"]
    metadata["tokenizer.ggml.token_type"] = None
    metadata["tokenizer.ggml.merges"] += ["1 2", "12 3"]
    tokenizer = made(metadata, pre=pre, add_bos_token=False)
    assert [tokenizer.decode([token_id]) for token_id in tokenizer.encode("x123")] == pieces


def test_the_chat_template_and_the_tokens_it_names():
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    tokenizer = build_tokenizer(byte_level_metadata() | {"tokenizer.chat_template": template}, "x.gguf")
    messages = [{"role": "user", "content": "the fox"}]
    assert tokenizer.render_chat(messages) == "<s>the fox<|im_end|>"
    assert tokenizer.encode_chat(messages)[0] == 0
    with pytest.raises(InputError, match="no chat template"):
        made(byte_level_metadata()).render_chat(messages)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pre": "made-up"}, r"pre-tokenizer 'made-up' \(tokenizer\.ggml\.pre\), .* known are default, gpt-2"),
        ({"model": "rwkv"}, r"kind 'rwkv' \(tokenizer\.ggml\.model\)"),
        ({"model": None}, "kind None"),
        ({"tokens": None}, "holds no tokenizer"),
        ({"merges": None}, "holds no merges"),
        ({"token_type": np.array([1, 2])}, r"400 tokens have 2 values of tokenizer\.ggml\.token_type"),
    ],
)
def test_what_is_not_known_is_refused(changes, words):
    with pytest.raises(ModelError, match=words):
        made(byte_level_metadata(), **changes)


def vocabulary_files() -> list[Path]:
    """The files of llama.cpp that have expected tokens, for the kinds that are read here."""
    unsupported = ("bert", "gemma-4")
    files = sorted(VOCABULARIES.glob("ggml-vocab-*.gguf"))
    return [
        file for file in files if Path(f"{file}.out").exists() and not any(name in file.name for name in unsupported)
    ]


@pytest.mark.real
@pytest.mark.parametrize("path", vocabulary_files() or [pytest.param(None, marks=pytest.mark.skip(NO_VOCABULARIES))])
def test_tokens_are_those_that_llama_cpp_expects(path: Path):
    tokenizer = build_tokenizer(GgufFile(path).metadata, path.name)
    *texts, end = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    assert not end
    expected = [list(map(int, line.split())) for line in Path(f"{path}.out").read_text().splitlines()]
    assert len(texts) == len(expected) > 40
    leading = tokenizer.encode("")
    for text, ids in zip(texts, expected, strict=True):
        # Qwen's tokenizers compose the text first, as ours do; llama.cpp does not. Other texts are composed already.
        if "qwen" in path.name and unicodedata.normalize("NFC", text) != text:
            continue
        assert tokenizer.encode(text)[len(leading) :] == ids, text
