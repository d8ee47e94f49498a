"""Tokens that a tokenizer's own vocabulary does not have, or not as one piece: the files beside it name them.

Three places do: `added_tokens.json` (text -> id), `added_tokens_decoder` of tokenizer_config.json (id -> text and how
it is matched), and the tokens with a role (`eos_token` and the like). Each becomes one token, with the id it was given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alisa.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


@dataclass(frozen=True, slots=True)
class NamedToken:
    """A token as a file names it."""

    content: str
    special: bool
    flags: tuple[tuple[str, bool], ...] = ()
    """How it is matched, as in `tokenizers.AddedToken`; the defaults where nothing is said."""


def declared_tokens(
    added: Mapping[str, Any], settings: Mapping[str, Any], special: Iterable[str]
) -> dict[int, NamedToken]:
    """Tokens with an id, by it.

    Args:
        added: of added_tokens.json.
        settings: of tokenizer_config.json.
        special: texts of the tokens with a role.
    """
    roles = frozenset(special)
    found = {token_id: NamedToken(text, text in roles) for text, token_id in added.items() if isinstance(token_id, int)}
    decoder = settings.get("added_tokens_decoder")
    for token_id, fields in (decoder if isinstance(decoder, Mapping) else {}).items():
        if isinstance(fields, Mapping) and isinstance(fields.get("content"), str) and str(token_id).isdecimal():
            flags = tuple((name, fields[name]) for name in _FLAGS if isinstance(fields.get(name), bool))
            found[int(token_id)] = NamedToken(fields["content"], fields.get("special") is True, flags)
    return found


def role_tokens(settings: Mapping[str, Any], special_tokens: Mapping[str, str]) -> list[str]:
    """Texts of the tokens with a role, the nameless ones of `additional_special_tokens` among them."""
    texts = list(special_tokens.values())
    for name in ("additional_special_tokens", "extra_special_tokens"):
        value = settings.get(name)
        for token in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
            text = token.get("content") if isinstance(token, Mapping) else token
            if isinstance(text, str):
                texts.append(text)
    return list(dict.fromkeys(texts))


def add_tokens(backend: Backend, declared: Mapping[int, NamedToken], roles: Iterable[str]) -> None:
    """The backend knows all of these as single tokens.

    Raises:
        ModelError: one cannot have the id that its file gives it.
    """
    from tokenizers import AddedToken

    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token_id, token in sorted(declared.items()):
        if token.content not in known:
            flags = {"normalized": not token.special} | dict(token.flags)
            backend.add_tokens([AddedToken(token.content, special=token.special, **flags)])
            known.add(token.content)
        found = backend.token_to_id(token.content)
        if found != token_id:
            raise ModelError(
                f"The tokenizer gives {token.content!r} the id {found}, and the files beside it say {token_id}; they "
                "are of different models, download the repository again."
            )
    for text in roles:
        if text not in known:
            backend.add_special_tokens([AddedToken(text, normalized=False)])
            known.add(text)
