"""The vocabulary in the metadata of a GGUF file: tokens, what each of them is, and the roles some of them play."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alisa.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Types of tokens; 5 is unused and 6 a byte."""

_ROLES = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
    "sep_token": "seperator",  # as the format spells it
    "cls_token": "cls",
    "mask_token": "mask",
}
# Most files name one end token, that of a text or that of a turn; llama.cpp finds the other by its text, and so do we.
_END_TEXTS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>")
_END_TEXTS += ("<EOT>", "<\N{FULLWIDTH VERTICAL LINE}end▁of▁sentence\N{FULLWIDTH VERTICAL LINE}>")


class Vocabulary:
    """The values under `tokenizer.`.

    Args:
        metadata: all named values of the file.
        file_name: for messages.

    Raises:
        ModelError: there are no tokens, or the lists differ in length.
    """

    def __init__(self, metadata: Mapping[str, Any], file_name: str) -> None:
        self._metadata = metadata
        self.file_name = file_name
        tokens = self.value("tokens")
        if not isinstance(tokens, list) or not tokens:
            raise ModelError(f"{file_name} holds no tokenizer (tokenizer.ggml.tokens); convert the model anew.")
        self.tokens: list[str] = tokens
        """Text of each token, by id."""
        self.types: list[int] = self._numbers("token_type", NORMAL)
        """Type of each token."""
        self.ids = {token: token_id for token_id, token in enumerate(tokens)}
        """Id of each text."""

    def value(self, name: str, default: Any = None) -> Any:  # noqa: ANN401 - a number, a text or a list
        """The value of `tokenizer.ggml.{name}`."""
        return self._metadata.get(f"tokenizer.ggml.{name}", default)

    @property
    def scores(self) -> list[float]:
        """Score of each token; the best are merged first."""
        return self._numbers("scores", 0.0)

    @property
    def chat_template(self) -> str | None:
        """Jinja text, or None."""
        template = self._metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) and template else None

    def role_id(self, role: str) -> int | None:
        """Id of the token of a role (`bos`, `eos`, `eot`, `eom`, `unknown`, ...); None: there is none."""
        token_id = self.value(f"{role}_token_id")
        return token_id if isinstance(token_id, int) and 0 <= token_id < len(self.tokens) else None

    def special_tokens(self) -> dict[str, str]:
        """Texts by the names that chat templates use: `bos_token`, `eos_token` and so on."""
        ids = {name: self.role_id(role) for name, role in _ROLES.items()}
        return {name: self.tokens[token_id] for name, token_id in ids.items() if token_id is not None}

    def end_ids(self) -> frozenset[int]:
        """Every token that ends a text or a turn."""
        named = {self.role_id(role) for role in ("eos", "eot", "eom")}
        texts = [text for text in _END_TEXTS if self._is_control(text)]
        # In the format of gpt-oss, `<|end|>` ends one of the messages of an answer, `<|return|>` the answer.
        if "<|return|>" in self.ids and "<|end|>" in texts:
            texts.remove("<|end|>")
        return frozenset({token_id for token_id in named if token_id is not None} | {self.ids[text] for text in texts})

    def _is_control(self, text: str) -> bool:
        return text in self.ids and self.types[self.ids[text]] == CONTROL

    def _numbers(self, name: str, default: float) -> list[Any]:
        values = self.value(name)
        if values is None:
            return [default] * len(self.tokens)
        if len(values) != len(self.tokens):
            raise ModelError(
                f"{self.file_name} is damaged: {len(self.tokens)} tokens have {len(values)} values of "
                f"tokenizer.ggml.{name}; download it again."
            )
        return values.tolist()
