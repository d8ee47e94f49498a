"""Models of Hugging Face transformers with alisa's KV cache, or with its engine (docs/huggingface.md)."""

from importlib.metadata import PackageNotFoundError, version

OLDEST = (5, 23)
"""The first transformers whose caches and attention functions are those that this package stands on."""


def missing_transformers(found: str | None) -> str | None:
    """What to install where this version of transformers, or none, is there; None: nothing."""
    has = None if found is None else tuple(int(part) for part in found.split(".")[:2])
    if has is not None and OLDEST <= has < (6,):
        return None
    is_there = "it is not installed" if found is None else f"{found} is installed"
    return (
        f"alisa.hf needs transformers from {OLDEST[0]}.{OLDEST[1]} to below 6, and {is_there}: pip install 'alisa[hf]'."
    )


def _installed() -> str | None:
    try:
        return version("transformers")
    except PackageNotFoundError:
        return None


if (_missing := missing_transformers(_installed())) is not None:
    raise ImportError(_missing)

from alisa.hf.attach import CacheFactory, attach  # noqa: E402 - transformers has to be there
from alisa.hf.cache import AlisaCache  # noqa: E402
from alisa.hf.generation import EngineGenerate, generate  # noqa: E402

__all__ = ["AlisaCache", "CacheFactory", "EngineGenerate", "attach", "generate"]
