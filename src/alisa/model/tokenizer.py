"""Text to token ids and back, as the model's own files say, without transformers.

`tokenizer.json` is read as it is. Older repositories (GPT-2, OPT, Qwen) have `vocab.json` and `merges.txt`, from which
the same byte-level BPE is built. What Hugging Face keeps next to them (added, leading and end tokens, chat template) is
read too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alisa.errors import InputError, ModelError
from alisa.model.added_tokens import add_tokens, declared_tokens, role_tokens
from alisa.model.detokenizer import Detokenizer
from alisa.model.other_formats import TOKENIZERS, found_format
from alisa.model.token_bytes import TokenBytes
from alisa.model.vocabulary_files import byte_level_bpe

# The tokenizer library and Jinja are imported where they are used: a machine on which models of random weights are
# measured need not have them.
if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

    from alisa.model.chat import ChatTemplate

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """Encodes prompts, decodes what was generated, renders chats.

    Args:
        backend: the `tokenizers` model.
        leading_id: the token a prompt begins with, when the backend does not add it by itself.
        special_tokens: `bos_token`, `eos_token` and so on as text.
        eos_ids: tokens that end a text.
        chat_template: Jinja text, a file of it that is read when a chat needs it, or None when the model has none.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        leading_id: int | None,
        special_tokens: Mapping[str, str],
        eos_ids: frozenset[int],
        chat_template: str | Path | None,
    ) -> None:
        self._backend = backend
        self._leading_id = leading_id
        self._chat_source = chat_template
        self._special_tokens = dict(special_tokens)
        bos_token = special_tokens.get("bos_token")
        self._bos_id = None if bos_token is None else backend.token_to_id(bos_token)
        self.eos_ids = eos_ids
        """Tokens that end a text; empty when the model's files name none."""
        byte_tokens = (backend.token_to_id(f"<0x{value:02X}>") for value in range(256))
        self._added = backend.get_added_tokens_decoder()
        special_ids = (token_id for token_id, token in self._added.items() if token.special)
        self._held_ids = frozenset(token_id for token_id in (*byte_tokens, *special_ids) if token_id is not None)

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """The tokenizer of a model directory.

        Raises:
            ModelError: there is none that can be read; the message says how to make one.
        """
        settings = _read_json(directory / "special_tokens_map.json") | _read_json(directory / "tokenizer_config.json")
        special_tokens = _special_tokens(settings)
        config = _read_json(directory / "config.json")
        backend = _load_backend(directory, settings, config.get("model_type"))
        roles = role_tokens(settings, special_tokens)
        add_tokens(backend, declared_tokens(_read_json(directory / "added_tokens.json"), settings, roles), roles)
        # tokenizer.json says itself what comes first, and transformers 5 ignores `add_bos_token` where there is one.
        # vocab.json and merges.txt do not say: OPT was trained with a leading token, GPT-2 without.
        is_json = (directory / "tokenizer.json").is_file()
        add_bos = not is_json and settings.get("add_bos_token", config.get("model_type") == "opt")
        bos_token = special_tokens.get("bos_token")
        return cls(
            backend,
            leading_id=backend.token_to_id(bos_token) if add_bos and bos_token else None,
            special_tokens=special_tokens,
            eos_ids=_eos_ids(directory, config, special_tokens, backend),
            chat_template=_chat_template(directory, settings),
        )

    @property
    def vocab_size(self) -> int:
        """Tokens with a text; models may have a few more rows than this."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` can work."""
        return self._chat_source is not None

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """`bos_token`, `eos_token` and so on as text."""
        return self._special_tokens

    @property
    def chat_template(self) -> str | None:
        """The Jinja text of the model's chat template.

        Raises:
            InputError: its file cannot be read.
        """
        return None if self._chat_source is None else _template_text(self._chat_source)

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """Bytes of single tokens, by id."""
        return TokenBytes(self._backend, self._added)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Ids of a prompt, led by the model's first token (LLaMA's `<s>`, OPT's `</s>`) if it has one.

        The leading token is there once, also when the text spells it out, as rendered chats do.

        Args:
            text: any text; special tokens that it spells out are taken as such.
            special_tokens: False: nothing is put before it or after it.
        """
        ids = self._backend.encode(text, add_special_tokens=special_tokens).ids
        if not special_tokens:
            return ids
        if self._leading_id is not None and ids[:1] != [self._leading_id]:
            ids = [self._leading_id, *ids]
        if self._bos_id is not None and ids[:2] == [self._bos_id, self._bos_id]:
            del ids[0]
        return ids

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Ids of a conversation; the template alone decides about special tokens, as in Hugging Face.

        The arguments are those of `render_chat`.

        Raises:
            InputError: the model has no chat template, or it refuses the messages.
        """
        text = self.render_chat(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, template_kwargs=template_kwargs
        )
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def special_ids(self, texts: Sequence[str]) -> dict[int, str]:
        """Those texts that are one special token each, such as `<|im_end|>`, by its id: they never come out as text."""
        special = {token.content: token_id for token_id, token in self._added.items() if token.special}
        return {special[text]: text for text in texts if text in special}

    def to_json(self) -> str:
        """The tokenizer as a tokenizer.json would have it, for libraries that read one."""
        return self._backend.to_str()

    def detokenizer(self) -> Detokenizer:
        """A new stream decoder for one sequence."""
        return Detokenizer(self.decode, self._held_ids, self.vocab_size)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation (mappings with `role` and `content`).

        Args:
            messages: oldest first.
            add_generation_prompt: end with the opening of the assistant's turn.
            tools: JSON schemas of functions that the model may call.
            template_kwargs: what else the template knows, such as `enable_thinking`.

        Raises:
            InputError: the model has no chat template, or it refuses the messages.
        """
        return self._compiled_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            template_kwargs=template_kwargs or {},
        )

    @cached_property
    def _compiled_template(self) -> ChatTemplate:
        from alisa.model.chat import ChatTemplate

        if self.chat_template is None:
            raise InputError(
                "This model has no chat template, so it was hardly trained on conversations; send a plain prompt, or "
                "put a chat_template.jinja beside its tokenizer."
            )
        return ChatTemplate(self.chat_template, self._special_tokens)


def _load_backend(directory: Path, settings: Mapping[str, Any], model_type: object) -> Backend:
    from tokenizers import Tokenizer as Backend

    path = directory / "tokenizer.json"
    try:
        if path.is_file():
            backend = Backend.from_file(str(path))
            # A file may carry the limits of someone's training run.
            backend.no_truncation()
            backend.no_padding()
            return backend
        if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
            return byte_level_bpe(directory, settings, model_type)
    except ModelError:
        raise
    # The Rust library raises bare Exception for every kind of damage.
    except Exception as error:
        raise ModelError(f"The tokenizer in {directory} is damaged ({error}); download it again.") from error
    other = found_format(directory, TOKENIZERS)
    if other is not None:
        raise ModelError(f"{directory} has its tokenizer only as {other}.")
    raise ModelError(
        f"{directory} has no tokenizer: neither tokenizer.json nor vocab.json with merges.txt; download it again."
    )


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by their role; a token is a string, or an object with its text under `content`."""
    found: dict[str, str] = {}
    for name in _SPECIAL_NAMES:
        value = settings.get(name)
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _eos_ids(
    directory: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str], backend: Backend
) -> frozenset[int]:
    """Every end token that any of the files names: fine-tuned models often change one place and forget the others."""
    ids: set[int] = set()
    for fields in (_read_json(directory / "generation_config.json"), config):
        value = fields.get("eos_token_id")
        values = value if isinstance(value, list) else [value]
        ids.update(token_id for token_id in values if isinstance(token_id, int))
    eos_token = special_tokens.get("eos_token")
    eos_id = None if eos_token is None else backend.token_to_id(eos_token)
    return frozenset(ids if eos_id is None else ids | {eos_id})


def _template_text(source: str | Path) -> str:
    """The Jinja text itself.

    Raises:
        InputError: its file cannot be read.
    """
    if isinstance(source, str):
        return source
    try:
        return source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"The chat template {source} is not readable ({error}); send a plain prompt instead."
        ) from error


def _chat_template(directory: Path, settings: Mapping[str, Any]) -> str | Path | None:
    """The template in its own file, or in the settings: one text, or a list of named ones of which `default` counts."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path
    value = settings.get("chat_template")
    if isinstance(value, list):
        named = {item["name"]: item["template"] for item in value if isinstance(item, Mapping)}
        return named.get("default") or next(iter(named.values()), None)
    return value if isinstance(value, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    """The fields of an optional JSON file; empty when it is absent.

    Raises:
        ModelError: it is there, but not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not readable JSON ({error}); download it again.") from error
    if not isinstance(fields, dict):
        raise ModelError(f"{path} holds a {type(fields).__name__} instead of a JSON object; download it again.")
    return fields
