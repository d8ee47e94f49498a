"""The adapter for lm-evaluation-harness; skipped where that is not installed (extra `lm_eval`)."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from alisa import LLM, SamplingParams

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness and what it imports
lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra: pip install 'alisa[lm_eval]'")


@pytest.fixture(scope="module")
def harness(tiny_model_dir):
    from alisa.lab.eval.harness import HarnessModel

    llm = LLM(tiny_model_dir, policy="dense", dtype="float32")
    return llm, HarnessModel(llm, prefill=3), AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)


@pytest.fixture(scope="module")
def tiny_model_dir(tiny_model):
    directory = tiny_model("llama")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    return directory


def text(ids):
    return " ".join(f"w{i}" for i in ids)


def expected_likelihood(model, ids, count):
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    picked = logits[-count - 1 : -1].gather(1, torch.tensor(ids[-count:])[:, None])
    return float(picked.sum()), logits[-count - 1 : -1].argmax(-1).tolist() == ids[-count:]


def request(*args):
    return SimpleNamespace(args=args)


def test_loglikelihood_is_that_of_transformers(harness):
    _, adapter, model = harness
    ids = torch.randint(3, 120, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    with torch.no_grad():
        best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    asked = [
        request(text(ids[:30]), " " + text(ids[30:])),
        request(text(ids), " " + text([best])),
        request("", text(ids[:5])),
    ]
    expected = [
        expected_likelihood(model, ids, 10),
        expected_likelihood(model, [*ids, best], 1),
        expected_likelihood(model, [1, *ids[:5]], 5),
    ]
    for (likelihood, greedy), (wanted, wanted_greedy) in zip(adapter.loglikelihood(asked), expected, strict=True):
        assert likelihood == pytest.approx(wanted, abs=1e-3)
        assert greedy == wanted_greedy


def test_rolling_likelihood_adds_up_windows(harness):
    _, adapter, model = harness
    ids = torch.randint(3, 120, (200,), generator=torch.Generator().manual_seed(2)).tolist()  # of 128 positions
    first, _ = expected_likelihood(model, [1, *ids[:128]], 128)
    second, _ = expected_likelihood(model, ids[71:200], 72)
    [found] = adapter.loglikelihood_rolling([request(text(ids))])
    assert found == pytest.approx(first + second, rel=1e-4)


def test_generation_ends_at_the_stop_string(harness):
    llm, adapter, _ = harness
    prompt = text(range(10, 20))
    [whole] = llm.generate([prompt], SamplingParams(max_tokens=12, stop_ids=()))
    words = whole.text.split()
    stop = words[5]
    [found] = adapter.generate_until([request(prompt, {"until": [stop], "max_gen_toks": 12})])
    assert found.split() == words[: words.index(stop)]


@pytest.mark.slow  # 20 s, most of them what the harness imports and looks for
def test_a_task_runs_from_end_to_end(harness, tmp_path):
    _, adapter, _ = harness
    path = tmp_path / "questions.jsonl"
    rows = [{"question": text([5, 6, 7 + i]), "choices": [text([8]), text([9, 10])], "answer": i % 2} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    results = lm_eval.simple_evaluate(model=adapter, tasks=[task], bootstrap_iters=0, log_samples=False)
    assert 0 <= results["results"]["tiny"]["acc,none"] <= 1
