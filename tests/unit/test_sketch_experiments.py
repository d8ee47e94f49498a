"""What was measured and left out of `sketch`: the experiments measure what they say, the tables say what they found."""

import json
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from hint_tables import expected, forms, hint, waiting
from prefetch_hint import TappedDecoder, run
from sketch_forms import Form, FormPolicy, Measure, kept_channels, rounded

from alisa import LLM
from alisa.config import EngineConfig
from alisa.engine.loaded import load_model
from alisa.kernels.reference.sketch import make_sketch, unsketch
from alisa.lab.eval.subject import Subject
from alisa.lab.eval.windows import cut_windows
from alisa.policy.registry import make_policy

PROMPTS = [[7 + 13 * (place + 5 * number) % 500 for place in range(60)] for number in range(2)]


@pytest.fixture(scope="module")
def model():
    return load_model(EngineConfig(dtype="float32", device="cpu"))


def batch(model, tmp_path, *, counting):
    args = Namespace(output_len=24, disk_path=tmp_path, counting=counting)
    return run(model, PROMPTS, 0.8, 0.5, args)


def test_the_hint_is_fetched_and_changes_no_token(model, tmp_path):
    tapped = replace(model, decoder=TappedDecoder.of(model.decoder))
    _, counted, foresight = batch(tapped, tmp_path, counting=True)
    steps, hinted, _ = batch(tapped, tmp_path, counting=False)
    assert hinted == counted
    assert {way for way, record in steps if record.traffic.fetched_rows} >= {"cached", "cached hint", "disk hint"}
    assert foresight.missed > 50
    assert foresight.right["hint"] > foresight.missed / 4
    assert foresight.right["last read"] == 0, "what was just read is in the hot cache"


def test_a_guess_from_the_state_that_comes_is_the_query(model):
    tapped, states, queries = TappedDecoder.of(model.decoder), [], []

    def attend(layer, q, k, v, hidden):
        queries.append(q[:, 0])
        return q

    residual = TappedDecoder._residual
    tapped._residual = lambda layer, x, attended: states.append(residual(tapped, layer, x, attended)) or states[-1]
    tapped.forward(torch.tensor([[5], [9]]), torch.tensor([[3], [8]]), attend)
    for layer in range(1, model.spec.num_layers):
        torch.testing.assert_close(tapped.guessed_query(layer, states[layer - 1]), queries[layer])


def test_codes_of_four_bits_stand_for_what_the_sketch_has():
    vectors = torch.randn(50, 2, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rounded(vectors, 4, 1), unsketch(make_sketch(vectors, 4), 64))
    planes = (vectors - rounded(vectors, 4, 1, planes=2)).abs().amax() / (vectors - rounded(vectors, 4, 1)).abs().amax()
    assert 3 < planes < 6, "a step four times as long"


def test_pairs_are_kept_whole():
    scores = [torch.rand(2, 64, generator=torch.Generator().manual_seed(1))]
    [kept] = kept_channels(scores, 0.6, 1, pairs=True)
    assert kept.shape == (2, 38)
    for head in kept.tolist():
        assert {(channel + 32) % 64 for channel in head} == set(head)
    [single] = kept_channels(scores, 0.6, 1, pairs=False)
    assert scores[0].gather(1, single).sum() > scores[0].gather(1, kept).sum()


def test_whole_keys_in_four_bits_are_the_policy_sketch():
    subject = Subject.of(LLM(dtype="float32"))
    windows = cut_windows(subject.tokenizer, ["It was a dark night. " * 60], context=96, prefill=64, count=2)
    measure = Measure(subject, windows)
    budget = make_policy("sketch", 0.8).budget
    _, exact = measure(make_policy("sketch", 0.8))
    _, same = measure(FormPolicy(budget, form=Form("4 bits", 4)))
    _, planes = measure(FormPolicy(budget, form=Form("2 + 2 planes", 4, planes=2)))
    assert same == pytest.approx(exact, rel=0.2, abs=1e-5)
    assert sum(planes) > 2 * sum(exact)


RECORD = {
    "model": "small",
    "dtype": "bfloat16",
    "batch": 4,
    "prompt_len": 384,
    "output_len": 112,
    "stamp": {"num_threads": 1, "cpu": "Some processor"},
    "row_bytes": 768,
    "text": "wikitext2",
    "others_share": 0.0,
    "mlp_share": 0.5,
    "query_share": 0.1,
    "results": [
        {
            "sparsity": 0.8,
            "cap": 0.25,
            "engine": {
                way: {"rows": 1800.0, "wall_ms": [90, 100, 120], "wait_ms": [wait] * 3, "linear_ms": [40] * 3}
                for way, wait in (("cached", 2), ("disk", 60))
            },
            "tried": {
                f"{medium}{way}": {"wall_ms": [1, wall, 1]}
                for medium in ("cached", "disk")
                for way, wall in (("", 9), (" hint", 10))
            },
            "extra_ms": {"query": 5, "rank": 4, "ask": 9},
            "foreseen": {"last read": 0.0, "runners-up": 0.4, "hint": 0.75},
            "wasted": {"last read": 0.0, "runners-up": 2.0, "hint": 0.3},
        }
    ],
}


def test_what_is_expected_is_what_the_mlp_hides_less_what_the_hint_takes(tmp_path):
    [case] = RECORD["results"]
    assert expected(RECORD, case, "disk") == pytest.approx(100 / (100 - 20 + 17) - 1), "not longer than the MLP takes"
    assert expected(RECORD, case, "cached") == pytest.approx(100 / (100 - 1.5 + 17) - 1)
    (tmp_path / "prefetch_hint.jsonl").write_text(json.dumps(RECORD) + "\n")
    assert "| 0.8, 25 % | 0 % (0.00) | 40 % (2.00) | 75 % (0.30) | -13 % | -10 % | +3 % | -10 % |" in hint(tmp_path)
    assert "4, 384 + 112 tokens, 1 thread of Some processor:" in waiting(tmp_path)
    assert "| 0.8, 25 % | disk | 1800 | 100 (90.0 to 120) | 60.0 (60.0 to 60.0) |" in waiting(tmp_path)


def test_forms_stand_with_their_loss(tmp_path):
    form = {"bytes": 36.0, "kernel": 1.0, "lost": 0.01, "lost_error": 0.002, "kl": 0.003, "kl_error": 0.001}
    record = {
        "model": "small",
        "text": "wikitext2",
        "windows": 4,
        "context": 640,
        "prefill": 512,
        "dense": 16.0,
        "sparsity": 0.9,
        "forms": {"4 bits": form | {"kl_more": 0.0, "kl_more_error": 0.0}},
    }
    (tmp_path / "sketch_forms.jsonl").write_text(json.dumps(record) + "\n")
    assert "| 0.9 | 4 bits | 36 | 1.00 | 1.00 ± 0.20 | 3.00 ± 1.00 |  |" in forms(tmp_path)
