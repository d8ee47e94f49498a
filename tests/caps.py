"""Caps for tests: how many bytes leave room for a number of tokens, whatever else a cap has to cover."""

from alisa import LLM
from alisa.engine.builder import disk_cap
from alisa.engine.kv_cache import plan_kv_cache
from alisa.errors import CapacityError


def device_cap(llm: LLM, num_tokens: int) -> int:
    """The smallest device cap under which an engine like that of `llm` has room for the rows of so many tokens.

    What else is under the cap (policy state, staging, rows on their way) depends on `max_num_seqs` and `max_model_len`:
    give both to the model.
    """
    low, high = 0, 1 << 40
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _device_tokens(llm, middle) >= num_tokens else (middle, high)
    return high


def _device_tokens(llm: LLM, num_bytes: int) -> int:
    try:
        config = plan_kv_cache(llm._model, llm.policy, llm.codec, llm.config, None, num_bytes, 0, disk_cap(llm.config))
    except CapacityError:
        return 0
    return config.limits.device_tokens
