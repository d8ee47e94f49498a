"""Perplexity against transformers, and the two ways to score against each other."""

from dataclasses import replace
from math import exp
from typing import get_args

import pytest
import torch
from transformers import AutoModelForCausalLM

from alisa import LLM
from alisa.config import PolicyName
from alisa.lab.eval import layerwise
from alisa.lab.eval.layerwise import score_layerwise
from alisa.lab.eval.perplexity import perplexity_of
from alisa.lab.eval.subject import BASELINE, Subject, Variant
from alisa.lab.scoring import ScoredItem
from tests.combinations import each
from tests.shared import shared_path, stories260k


def write_text(directory, vocab_size, num_tokens=700):
    path = directory / "text.txt"
    ids = torch.randint(3, vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(5)).tolist()
    path.write_text(" ".join(f"w{i}" for i in ids))
    return path


def transformers_perplexity(directory, windows):
    """Over the scored tokens of the windows, one forward pass each."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    total, count = 0.0, 0
    for item in windows:
        ids = torch.tensor([[*item.prompt_ids, *item.output_ids]])
        labels = ids.clone()
        labels[:, : len(item.prompt_ids)] = -100
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * len(item.output_ids)
        count += len(item.output_ids)
    return exp(total / count)


@pytest.mark.parametrize("mode", ["decode", "layerwise"])
@pytest.mark.parametrize("family", ["opt", "llama-gqa-tied", "gpt2"])
def test_dense_perplexity_equals_transformers(family, mode, tiny_model, tmp_path):
    directory = tiny_model(family)
    subject = Subject.of(LLM(directory, dtype="float32", prefill_chunk=16))
    text = write_text(tmp_path, subject.spec.vocab_size)
    found = perplexity_of(subject, text, context=100, prefill=20, num_windows=None, mode=mode)
    assert [window.item.num_tokens for window in found.windows] == [100] * 7
    expected = transformers_perplexity(directory, [window.item for window in found.windows])
    value = found.value(found.measure(subject, BASELINE).units).value
    assert value == pytest.approx(expected, rel=1e-4)  # random models: a perplexity in the thousands
    exact = exp(-1e-3) < value / expected < exp(1e-3)
    assert exact


def test_dense_perplexity_of_a_trained_model_equals_transformers():
    subject = Subject.of(LLM(stories260k(), dtype="float32"))
    path = shared_path("data/tinystories/stories_split.jsonl")
    found = perplexity_of(subject, path, context=512, prefill=8, num_windows=2, mode="layerwise")
    value = found.value(found.measure(subject, BASELINE).units).value
    assert abs(value - transformers_perplexity(stories260k(), [window.item for window in found.windows])) < 1e-3


def random_items(vocab_size, count, prompt_len, output_len):
    ids = torch.randint(3, vocab_size, (count, prompt_len + output_len), generator=torch.Generator().manual_seed(1))
    return [ScoredItem(row[:prompt_len], row[prompt_len:]) for row in ids.tolist()]


@each(kind=[("llama-gqa-tied", "float32"), ("opt", "int8")], policy=get_args(PolicyName))
def test_layer_by_layer_gives_what_decoding_gives(kind, policy, tiny_model):
    family, kv_dtype = kind
    subject = Subject.of(LLM(tiny_model(family), dtype="float32", max_num_seqs=2))
    items = random_items(subject.spec.vocab_size, 3, 24, 60)
    variant = Variant(policy, 0.6, kv_dtype)
    chosen, codec = variant.selection_policy(), subject.codec(variant)
    decoded = subject.scorer.score(chosen, codec, items)
    by_layer = score_layerwise(subject.scorer, chosen, codec, items)
    for one, other in zip(decoded, by_layer, strict=True):
        # Rounding may turn the choice between two tokens that are all but equal, and one such turn moves all that
        # follows a little: most tokens agree to float accuracy, the mean closely.
        gap = (one.log_likelihoods - other.log_likelihoods).abs()
        assert float(gap.median()) < 1e-4
        assert float((one.log_likelihoods.mean() - other.log_likelihoods.mean()).abs()) < 1e-3
    # and it is no accident: another sparsity gives something else
    denser = score_layerwise(subject.scorer, Variant(policy, 0.1, kv_dtype).selection_policy(), codec, items)
    far = float((denser[0].log_likelihoods - decoded[0].log_likelihoods).abs().median())
    assert far < 1e-4 if policy == "dense" else far > 1e-3


@pytest.mark.parametrize("policy", ["sketch", "sketch-head", "streaming"])
def test_several_tokens_in_a_step_give_the_bits_of_one_after_the_other(policy, tiny_model, monkeypatch):
    subject = Subject.of(LLM(tiny_model("llama-gqa-tied"), dtype="float32"))
    items = random_items(subject.spec.vocab_size, 3, 24, 60)
    variant = Variant(policy, 0.6, "float32")
    found = []
    for at_once in (1, 21, 1000):
        monkeypatch.setattr(layerwise, "STEP_TOKENS", at_once)
        found.append(score_layerwise(subject.scorer, variant.selection_policy(), subject.codec(variant), items))
    for outputs in found[1:]:
        for one, other in zip(found[0], outputs, strict=True):
            assert torch.equal(one.log_likelihoods, other.log_likelihoods)
            assert one.tokens_read == other.tokens_read


@pytest.mark.parametrize(("family", "policy"), [("llama-gqa-tied", "sketch"), ("gemma3", "sketch-mean-head")])
def test_budgets_of_layers_give_the_same_layer_by_layer_as_decoded(family, policy, tiny_model):
    subject = Subject.of(LLM(tiny_model(family), dtype="float32", max_num_seqs=2))
    items = random_items(subject.spec.vocab_size, 2, 24, 60)
    count = subject.spec.attention.full_layers().num_layers
    uniform = Variant(policy, 0.6, "float32")
    layers = tuple(0.3 if layer % 2 else 0.9 for layer in range(count))
    found = {}
    for budgets in (layers, (0.6,) * count, ()):
        chosen, codec = replace(uniform, layers=budgets).selection_policy(), subject.codec(uniform)
        found[budgets] = decoded = subject.scorer.score(chosen, codec, items)
        for one, other in zip(decoded, score_layerwise(subject.scorer, chosen, codec, items), strict=True):
            gap = (one.log_likelihoods - other.log_likelihoods).abs()
            assert float(gap.median()) < 1e-4
            # Decoding only asks for the last token; layer by layer it is fed as well.
            assert one.tokens_read < other.tokens_read
    assert [output.tokens_read for output in found[(0.6,) * count]] == [output.tokens_read for output in found[()]]
    assert torch.equal(found[(0.6,) * count][0].log_likelihoods, found[()][0].log_likelihoods)
    assert not torch.equal(found[layers][0].log_likelihoods, found[()][0].log_likelihoods)
