"""Models of Hugging Face transformers with alisa's KV cache (docs/huggingface.md)."""

from alisa.hf.attach import CacheFactory, attach
from alisa.hf.cache import AlisaCache

__all__ = ["AlisaCache", "CacheFactory", "attach"]
