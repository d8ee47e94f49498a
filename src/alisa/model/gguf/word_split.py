"""How text is cut into words before its bytes are merged: the patterns behind the names in `tokenizer.ggml.pre`.

The format holds a name only, which llama.cpp (https://github.com/ggml-org/llama.cpp, `src/llama-vocab.cpp`) gave to
the pre-tokenizer of each model; what the name stands for is in the model's own tokenizer.json. Patterns are applied one
after the other, each to the pieces that the one before left; what a pattern does not match is a piece too.
"""

from __future__ import annotations

from dataclasses import dataclass

from alisa.errors import ModelError

_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"


def _with_line_ends(digits: str, letters: str = r"\p{L}") -> str:
    """The pattern of GPT-4's first tokenizer with its own runs of digits, and what counts as a letter."""
    words = rf"[^\r\n\p{{L}}\p{{N}}]?[{letters}]+"
    return rf"{_ENDINGS}|{words}|{digits}| ?[^\s{letters}\p{{N}}]+[\r\n]*|{_SPACES}"


def _by_case(digits: str, endings: str) -> str:
    """The pattern of GPT-4o, which ends a word where small letters are followed by a capital."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    start = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{start}{upper}*{lower}+{endings}|{start}{upper}+{lower}*{endings}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


# Letters that have a case, as the tokenizer of DeepSeek LLM lists them; escaped, because some are equal when composed.
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481"
    "\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b"
    "\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b"
    "\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_CHINESE_KOREAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_ASCII_MARKS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""


@dataclass(frozen=True, slots=True)
class WordSplit:
    """What one name stands for."""

    patterns: tuple[str, ...]
    """In the syntax of Oniguruma."""
    ignore_merges: bool = False
    """A word that is a token as a whole is taken whole, whatever the merges would make of it."""
    add_bos: bool = False
    """Whether a text begins with the model's first token when the file does not say so."""
    nfc: bool = False
    """The text is brought into Unicode's composed form first."""


_WORD_SPLITS: dict[tuple[str, ...], WordSplit] = {
    ("default",): WordSplit((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    ("gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "mellum", "exaone4", "granite-docling"): WordSplit((_GPT2,)),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"): WordSplit((_DIGIT, _GPT2)),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"): WordSplit(
        (_with_line_ends(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True
    ),
    ("glm4",): WordSplit((_with_line_ends(r"\p{N}{1,3}"),), ignore_merges=True),
    ("dbrx", "smaug-bpe"): WordSplit((_with_line_ends(r"\p{N}{1,3}"),)),
    ("qwen2", "deepseek-r1-qwen", "megrez", "kormo"): WordSplit((_with_line_ends(_DIGIT),), nfc=True),
    ("qwen35",): WordSplit((_with_line_ends(_DIGIT, r"\p{L}\p{M}"),), nfc=True),
    ("stablelm2", "hunyuan"): WordSplit((_with_line_ends(_DIGIT),)),
    ("tekken",): WordSplit((_by_case(_DIGIT, ""),), ignore_merges=True, add_bos=True),
    ("gpt-4o", "llama4", "kanana2"): WordSplit((_by_case(r"\p{N}{1,3}", f"{_ENDINGS}?"),)),
    ("falcon",): WordSplit((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    ("deepseek-llm",): WordSplit(
        (
            r"[\r\n]",
            rf"\s?[{_CASED_LETTERS}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _CHINESE_KOREAN,
            r"\p{N}+",
        )
    ),
    ("deepseek-coder",): WordSplit((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE_KOREAN, _DIGIT)),
    ("deepseek-v3",): WordSplit(
        (
            r"\p{N}{1,3}",
            "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
            rf"{_ASCII_MARKS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
            rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
        )
    ),
}


def find_word_split(name: str, file_name: str) -> WordSplit:
    """The word split of a name.

    Raises:
        ModelError: it is not known.
    """
    for names, split in _WORD_SPLITS.items():
        if name in names:
            return split
    known = ", ".join(name for names in _WORD_SPLITS for name in names)
    raise ModelError(
        f"{file_name} asks for the pre-tokenizer {name!r} (tokenizer.ggml.pre), which is not known here, and with "
        f"another its tokens would be wrong; known are {known}."
    )
