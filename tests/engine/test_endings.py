"""How requests end: by a stop string, by an error of their own, and each with random numbers of its own."""

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from alisa import LLM, SamplingParams
from alisa.cli.files import to_json
from tests.tiny_models import SPECIAL as STOP
from tests.tiny_models import checkpoint

PROMPT = [5, 9, 2, 7]


def test_a_special_token_stops_though_it_is_no_text(tmp_path):
    params = SamplingParams(max_tokens=12, ignore_eos=True, seed=1, temperature=1)
    with LLM(checkpoint(tmp_path / "plain"), policy="dense") as llm:
        [free] = llm.generate([PROMPT], params)
    at = next(i for i, token in enumerate(free.token_ids) if i > 2 and token not in free.token_ids[:i])
    special = checkpoint(tmp_path / "special", free.token_ids[at])
    with LLM(special, policy="dense") as llm:
        [stopped] = llm.generate(
            [PROMPT], SamplingParams(max_tokens=12, ignore_eos=True, seed=1, temperature=1, stop=(STOP,))
        )
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: at + 1]
    assert STOP not in stopped.text
    assert len(stopped.text.split()) == at


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_damaged_weight_is_an_error_and_no_text(bad, temperature, tmp_path):
    directory = checkpoint(tmp_path)
    file = directory / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("down_proj.weight"))
    weights[name].view(-1)[0] = bad
    save_file(weights, file, {"format": "pt"})
    with LLM(directory) as llm:
        outputs = llm.generate([PROMPT, PROMPT], SamplingParams(max_tokens=8, temperature=temperature, ignore_eos=True))
    for output in outputs:
        assert output.finish_reason == "error"
        assert "no finite number" in output.error
        json.loads(to_json(asdict(output)), parse_constant=pytest.fail)
    json.loads(to_json(asdict(outputs.report.summary)), parse_constant=pytest.fail)


def test_equal_prompts_get_different_texts_and_the_same_ones_again(tmp_path):
    with LLM(checkpoint(tmp_path)) as llm:
        params = SamplingParams(max_tokens=12, temperature=1, seed=7, ignore_eos=True)
        first, again = ([output.token_ids for output in llm.generate([PROMPT] * 8, params)] for _ in range(2))
        [third] = llm.generate([PROMPT], SamplingParams(max_tokens=12, temperature=1, seed=9, ignore_eos=True))
    assert first == again
    assert len(set(first)) == 8
    assert third.token_ids == first[2]


def test_a_penalty_keeps_tokens_from_coming_again(tmp_path):
    with LLM(checkpoint(tmp_path)) as llm:
        params = (SamplingParams(max_tokens=24, ignore_eos=True, repetition_penalty=penalty) for penalty in (1, 100))
        plain, penalised = (llm.generate([PROMPT], each)[0].token_ids for each in params)
    assert len(set(plain)) < 24
    assert len(set(penalised)) == 24
