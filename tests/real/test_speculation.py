"""A real model says the same with drafts and without: from the text, by the policy, and with rows on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from alisa.config import EngineConfig, SamplingParams
from alisa.engine.loaded import load_model
from alisa.lab.bench.session import RunSpec, device_cap_for
from tests.real.texts import PROMPTS, varied_lines
from tests.speculation import Run, ScriptedDrafts

pytestmark = pytest.mark.real


def test_drafts_change_no_token_of_a_real_model(model_path: Path) -> None:
    dense = EngineConfig(model=str(model_path), policy="dense", max_num_seqs=4, max_model_len=700)
    model = load_model(dense)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    text = tokenizer.encode("\n".join(varied_lines(400)))
    prompts = [[*text[first * 50 : first * 50 + 300], *text[:100]] for first in range(2)]
    for prompt in PROMPTS[:2]:
        chat = [{"role": "user", "content": prompt}]
        prompts.append(tokenizer.encode_chat(chat) if tokenizer.has_chat_template else tokenizer.encode(prompt))
    params = [SamplingParams(max_tokens=48, temperature=0.7 * (n % 2), seed=n, logprobs=1) for n in range(len(prompts))]
    plain = Run(model, dense, prompts, params)

    looked_up = Run(model, replace(dense, speculative="lookup"), prompts, params)
    assert looked_up.results == plain.results
    for policy in ("sketch", "streaming"):
        exact = replace(dense, policy=policy, exact=True)
        drafts = ScriptedDrafts(6)
        assert Run(model, exact, prompts, params, drafts).results == plain.results
        assert 0 < drafts.came < drafts.tried
        capped = replace(exact, kv_device_memory=device_cap_for(model.decoder, RunSpec(exact), 500))
        drafted = Run(model, capped, prompts, params, ScriptedDrafts(6))
        assert drafted.results == plain.results
        assert max(record.disk_bytes for record in drafted.records) > 0
