"""Log probabilities of prompts and outputs: those of the model run plainly, whatever the company and the memory."""

import pytest
import torch

from alisa import LLM, SamplingParams
from tests import tiny_models

PROMPTS = [[5, 9, 2, 7, 11, 30, 8] * 6, [12, 13], [20, 21, 22, 23, 24, 25, 26, 1, 2] * 5]
PARAMS = SamplingParams(max_tokens=45, ignore_eos=True, logprobs=3, prompt_logprobs=2)
OPTIONS = {"dtype": "float32", "max_model_len": 128, "prefill_chunk": 16}
NAME = "llama-gqa-tied"


@pytest.fixture(scope="module")
def model():
    return tiny_models.build(NAME)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_models.checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def outputs(directory):
    with LLM(directory, policy="dense", max_num_seqs=3, **OPTIONS) as llm:
        return llm.generate(PROMPTS, PARAMS).outputs


def test_they_are_those_of_transformers(model, outputs):
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = [*prompt, *output.token_ids]
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert len(output.prompt_logprobs) == len(prompt) - 1
        assert len(output.logprobs) == len(output.token_ids)
        for place, found in enumerate((*output.prompt_logprobs, *output.logprobs)):
            row = expected[place]
            assert found.token_id == ids[place + 1]
            # the same arithmetic in another order: the logits agree to about 1e-5 in float32
            assert found.logprob == pytest.approx(float(row[found.token_id]), abs=1e-4)
            assert len(found.top) == (2 if place < len(prompt) - 1 else 3)
            assert [value for _, value in found.top] == pytest.approx(row.topk(len(found.top))[0].tolist(), abs=1e-4)
            assert all(value == pytest.approx(float(row[token]), abs=1e-4) for token, value in found.top)


def test_a_greedy_token_has_exactly_the_largest(outputs):
    for output in outputs:
        for found in output.logprobs:
            assert found.logprob == max(value for _, value in found.top)


def test_company_preemption_and_chunks_change_nothing(directory, outputs):
    with LLM(directory, policy="dense", max_num_seqs=1, **OPTIONS) as llm:
        alone = [llm.generate([prompt], PARAMS)[0] for prompt in PROMPTS]
    # Room for half of them: some lose their rows and read their prompts again.
    with LLM(directory, policy="dense", max_num_seqs=3, kv_device_memory="110KiB", kv_disk_memory=0, **OPTIONS) as llm:
        crowded = llm.generate(PROMPTS, PARAMS)
    assert crowded.report.summary.num_preempted > 0
    for whole, *others in zip(outputs, alone, crowded, strict=True):
        for other in others:
            assert other.token_ids == whole.token_ids
            assert [t.token_id for t in other.prompt_logprobs] == [t.token_id for t in whole.prompt_logprobs]
            assert [t.logprob for t in other.prompt_logprobs] == pytest.approx(
                [t.logprob for t in whole.prompt_logprobs], abs=1e-4
            )
            assert [t.logprob for t in other.logprobs] == pytest.approx([t.logprob for t in whole.logprobs], abs=1e-4)


def test_who_does_not_ask_gets_none(directory):
    with LLM(directory, policy="dense", **OPTIONS) as llm:
        [output] = llm.generate([PROMPTS[1]], SamplingParams(max_tokens=2))
        with llm.stream([PROMPTS[1]], PARAMS) as stream:
            deltas = [event for event in stream if getattr(event, "token_ids", ()) and not hasattr(event, "report")]
    assert output.logprobs is None
    assert output.prompt_logprobs is None
    assert all(len(delta.logprobs) == len(delta.token_ids) for delta in deltas)
