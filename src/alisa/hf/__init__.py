"""Models of Hugging Face transformers with alisa's KV cache, or with its engine (docs/huggingface.md)."""

from alisa.hf.attach import CacheFactory, attach
from alisa.hf.cache import AlisaCache
from alisa.hf.generation import EngineGenerate, generate

__all__ = ["AlisaCache", "CacheFactory", "EngineGenerate", "attach", "generate"]
