"""A real model says the same with and without what it knows of a prompt."""

from __future__ import annotations

from pathlib import Path

import pytest

from alisa import LLM, SamplingParams
from tests.real.texts import PROMPTS, varied_lines

pytestmark = pytest.mark.real


@pytest.mark.parametrize("policy", ["sketch", "swa"])
def test_a_shared_beginning_and_a_conversation_change_no_token(model_path: Path, policy: str, tmp_path: Path) -> None:
    rules = SamplingParams(max_tokens=16, ignore_eos=True)
    found = []
    for options in ({}, {"prefix_cache": True, "prefix_cache_disk": tmp_path}):
        with LLM(str(model_path), policy=policy, max_model_len=1600, **options) as llm:
            shared = llm.tokenizer.encode("\n".join(varied_lines(400)))[:1100]
            prompts = [shared + llm.tokenizer.encode(prompt) for prompt in PROMPTS[:2]]
            outputs = list(llm.generate(prompts, rules))
            said = [*prompts[0], *outputs[0].token_ids, *llm.tokenizer.encode(PROMPTS[1])]
            outputs += llm.generate([said], rules)
            found.append([output.token_ids for output in outputs])
            if options:
                assert all(output.report.cached_tokens > 900 for output in outputs[1:])
    assert found[1] == found[0]
