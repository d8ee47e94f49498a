"""Texts that follow a grammar, on the model inside the package."""

import json
import re
import sys

import pytest

from alisa import LLM, SamplingParams
from alisa.errors import InputError

pytest.importorskip("llguidance", reason="llguidance is not installed; pip install 'alisa[grammar]'")

PROMPT = "The ship had been at sea for"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm():
    with LLM(dtype="float32", max_num_seqs=4, max_model_len=256) as llm:
        yield llm


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_text_matches_its_regular_expression(llm, temperature):
    pattern = r"[0-9]{2}-(one|two) [a-e]+\."
    outputs = llm.generate([PROMPT] * 4, SamplingParams(max_tokens=80, temperature=temperature, regex=pattern, seed=3))
    for output in outputs:
        if output.finish_reason == "length":  # it may choose to go on with letters
            assert re.fullmatch(r"[0-9]{2}-(one|two) [a-e]*", output.text)
        else:
            assert output.finish_reason in ("stop", "eos")
            assert re.fullmatch(pattern, output.text)


@pytest.mark.parametrize("seed", range(3))
def test_a_text_is_json_of_its_schema(llm, seed):
    params = SamplingParams(max_tokens=120, temperature=1, json_schema=PERSON, seed=seed)
    [output] = llm.generate(PROMPT, params)
    assert output.finish_reason in ("stop", "eos")
    found = json.loads(output.text)
    assert set(found) == {"name", "age"}
    assert len(found["name"]) <= 8
    assert 0 <= found["age"] <= 99


def test_a_grammar_changes_nobody_else_and_company_changes_no_guided_text(llm):
    plain = SamplingParams(max_tokens=20, temperature=1, seed=1)
    guided = SamplingParams(max_tokens=60, temperature=1, seed=2, json_schema=PERSON)
    alone = [llm.generate(PROMPT, params)[0].token_ids for params in (plain, guided)]
    together = [output.token_ids for output in llm.generate([PROMPT] * 2, [plain, guided])]
    assert together == alone


@pytest.mark.parametrize(
    ("rules", "problem"),
    [
        ({"regex": "("}, "regex cannot be used"),
        ({"json_schema": {"type": "foo"}}, "json_schema cannot be used: Invalid type: foo"),
        ({"json_schema": "{"}, "json_schema cannot be used"),
    ],
)
def test_a_grammar_that_cannot_be_used_is_refused_and_holds_nothing(llm, rules, problem):
    with pytest.raises(InputError, match=problem):
        llm.generate(PROMPT, SamplingParams(**rules))
    assert llm._engine.is_idle


def test_a_bias_for_an_unknown_token_is_refused(llm):
    with pytest.raises(InputError, match="logit_bias has token id 99999; the model knows 0 to 2047"):
        llm.generate(PROMPT, SamplingParams(logit_bias={99999: 1}))


def test_a_stop_says_why(llm):
    [free] = llm.generate(PROMPT, SamplingParams(max_tokens=12))
    [by_id] = llm.generate(PROMPT, SamplingParams(max_tokens=12, stop_ids=(free.token_ids[4],)))
    assert by_id.stop_reason == free.token_ids[4]
    word = free.text.split()[2]
    [by_text] = llm.generate(PROMPT, SamplingParams(max_tokens=12, stop=("no such", word)))
    assert (by_text.finish_reason, by_text.stop_reason) == ("stop", word)
    assert free.stop_reason is None


def test_stop_strings_wait_for_the_least_number_of_tokens(llm):
    [free] = llm.generate(PROMPT, SamplingParams(max_tokens=24))
    space = SamplingParams(max_tokens=24, stop=(" ",), min_tokens=5)
    [output] = llm.generate(PROMPT, space)
    assert output.finish_reason == "stop"
    assert len(output.token_ids) >= 5
    assert free.text.startswith(output.text)


def test_without_the_library_a_grammar_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with LLM(max_num_seqs=1, max_model_len=64) as fresh:
        with pytest.raises(InputError, match=r"pip install 'alisa\[grammar\]'"):
            fresh.generate(PROMPT, SamplingParams(regex="a"))
        assert fresh.generate(PROMPT, SamplingParams(max_tokens=2))[0].text
