"""Caps for tests: how many bytes leave room for a number of tokens, whatever else a cap has to cover."""

from alisa import LLM
from alisa.lab.bench.session import RunSpec, device_cap_for


def device_cap(llm: LLM, num_tokens: int) -> int:
    """The smallest device cap under which an engine like that of `llm` has room for the rows of so many tokens.

    What else is under the cap (policy state, staging, rows on their way) depends on `max_num_seqs` and `max_model_len`:
    give both to the model.
    """
    return device_cap_for(llm.decoder, RunSpec(llm.config), num_tokens)
