"""What single tokens stand for: together they are the text."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from alisa.engine.loaded import embedded_model
from alisa.model.token_bytes import TokenBytes
from alisa.model.tokenizer import Tokenizer as AlisaTokenizer

TEXTS = ["The ship had been", "né — 海🙂", "\n\t \0\x1b", "  two  spaces "]


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_tokens(text):
    tokenizer = AlisaTokenizer.load(embedded_model())
    ids = tokenizer.encode(text, special_tokens=False)
    assert b"".join(tokenizer.token_bytes[token_id] for token_id in ids) == text.encode()


def sentencepiece():
    words = {f"<0x{value:02X}>": value for value in range(256)} | {"▁ab": 256, "a": 257, "b": 258, "▁": 259, "é": 260}
    backend = Tokenizer(models.BPE(words, [("▁", "a")] if "▁a" in words else [], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    backend.add_special_tokens(["<|end|>"])
    return backend


@pytest.mark.parametrize("text", ["a b", "é海a", "b\n a"])
def test_sentencepiece_tokens(text):
    backend = sentencepiece()
    found = TokenBytes(backend, backend.get_added_tokens_decoder())
    assert b"".join(found[token_id] for token_id in backend.encode(text).ids) == text.encode()


def test_special_tokens_are_as_they_are_written_and_unknown_ids_are_nothing():
    backend = sentencepiece()
    found = TokenBytes(backend, backend.get_added_tokens_decoder())
    assert found[backend.token_to_id("<|end|>")] == b"<|end|>"
    assert found[99999] == b""
    assert found[0xE6] == b"\xe6"
