"""The rules of benchmarks/sparse_prefill.py against a plain loop over queries, and its records."""

from __future__ import annotations

import json
from functools import cache
from math import exp, inf
from pathlib import Path

import pytest
import sparse_prefill
import torch
from sparse_prefill import BLOCK, LOCAL, MEANS, QUERIES, Rule, Survey, WholePrompt
from torch import Tensor

from alisa.errors import InputError
from alisa.kernels.base import KeyBlock
from alisa.kernels.reference.prefill import prefill_attention
from alisa.spec import AttentionShape

HEADS, GROUP, DIM = 2, 2, 16
SHAPE = AttentionShape(1, HEADS * GROUP, HEADS, DIM, DIM**-0.5)
RULES = ("flash=0.3", "means16=0.6", "means64=0.6", "exact=0.6", "keys=0.1")


@cache
def qkv(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Peaked enough that every rule leaves something out."""
    torch.manual_seed(0)
    q = 2 * torch.randn(2 * QUERIES, HEADS * GROUP, DIM)
    k, v = torch.randn(2, 2 * QUERIES, HEADS, DIM)
    return q[:num_tokens], k[:num_tokens], v[:num_tokens]


def attend(rule: Rule | None, num_tokens: int) -> tuple[Tensor, WholePrompt]:
    prompt = WholePrompt(SHAPE, prefill_attention, rule)
    q, k, v = (values[None] for values in qkv(num_tokens))
    return prompt(0, q, k, v, torch.empty(0))[0], prompt


def block_weights(rule: Rule, q: Tensor, k: Tensor) -> Tensor:
    """Of the whole blocks `[N, D]` that one query `[D]` sees before its own."""
    blocks = k.view(-1, BLOCK, DIM)
    if rule.kind == "exact":
        return (blocks @ q).exp().sum(1)
    part = MEANS[rule.kind]
    return (blocks.view(len(blocks), -1, part, DIM).mean(2) @ q).exp().sum(1)


def blocks_of(rule: Rule, q: Tensor, k: Tensor, token: int) -> set[int]:
    """What a token reads with queries `[T, H/G, D]` of a KV head whose keys are `[T, D]`."""
    own = token // BLOCK
    found = {0, *range(max(own - LOCAL, 0), own + 1)}
    for head in range(GROUP) if own else ():
        earlier = k[: own * BLOCK]
        if rule.kind == "flash":
            weights = [block_weights(rule, row, earlier) for row in q[own * BLOCK : (own + 1) * BLOCK, head]]
            total = torch.stack([row / row.max() for row in weights]).sum(0)
            found |= {block for block in range(own) if total[block] >= rule.parameter * total.max()}
            continue
        weight = block_weights(rule, q[token, head], earlier)
        had = 0.0
        for block in weight.argsort(descending=True).tolist():
            if had >= rule.parameter:
                break
            found.add(block)
            had += float(weight[block] / weight.sum())
    return found


def left_out(rule: Rule, token: int, kv_head: int) -> float:
    """The weight of what a token does not read, mean over the query heads of a KV head."""
    q, k, _ = (values.double() for values in qkv(2 * QUERIES))
    q, k = q[:, kv_head * GROUP : (kv_head + 1) * GROUP] * SHAPE.scale, k[:, kv_head]
    blocks = blocks_of(rule, q, k, token)
    weights = (k[: token + 1] @ q[token].T).softmax(0)
    return float(weights[[key for key in range(token + 1) if key // BLOCK not in blocks]].sum() / GROUP)


def plain(rule: Rule, token: int, kv_head: int) -> tuple[Tensor, int]:
    """The output `[H/G, D]` of one token, and how many earlier blocks (of `keys`: keys, of all heads) are chosen."""
    q, k, v = (values.double() for values in qkv(2 * QUERIES))
    q, k, v = q[:, kv_head * GROUP : (kv_head + 1) * GROUP] * SHAPE.scale, k[:, kv_head], v[:, kv_head]
    own, out, chosen = token // BLOCK, torch.empty(GROUP, DIM, dtype=q.dtype), 0
    if rule.kind != "keys":
        blocks = blocks_of(rule, q, k, token)
        read = [key for key in range(token + 1) if key // BLOCK in blocks]
        for head in range(GROUP):
            out[head] = (k[read] @ q[token, head]).softmax(0) @ v[read]
        return out, sum(block < own for block in blocks)
    for head in range(GROUP):
        scores, values, largest = k[: token + 1] @ q[token, head], v[: token + 1].clone(), -inf
        for block in range(own):
            first, end = block * BLOCK, (block + 1) * BLOCK
            largest = max(largest, float(scores[first:end].max()))
            for key in range(first, end):
                if exp(float(scores[key]) - largest) < rule.parameter:
                    group = key // MEANS["keys"] * MEANS["keys"]
                    values[key] = v[group : group + MEANS["keys"]].mean(0)
                else:
                    chosen += 1
        out[head] = scores.softmax(0) @ values
    return out, chosen


@pytest.mark.parametrize("text", RULES)
def test_a_rule_reads_what_a_plain_loop_reads(text: str) -> None:
    rule = Rule.parse(text)
    found, _ = attend(rule, 2 * QUERIES)
    for token in (0, BLOCK - 1, BLOCK, 200, 300, 2 * QUERIES - 1):
        for kv_head in range(HEADS):
            expected, _ = plain(rule, token, kv_head)
            # float32 sums of at most 512 terms of size 1 to 4.
            difference = found[token, kv_head * GROUP : (kv_head + 1) * GROUP] - expected
            assert difference.abs().max() < 1e-4


@pytest.mark.parametrize(("text", "num_tokens"), [("means16=0.6", 2 * QUERIES), ("keys=0.1", QUERIES)])
def test_what_is_chosen_is_counted(text: str, num_tokens: int) -> None:
    rule = Rule.parse(text)
    _, prompt = attend(rule, num_tokens)
    chosen = sum(plain(rule, token, kv_head)[1] for token in range(num_tokens) for kv_head in range(HEADS))
    seen = HEADS * sum(token // BLOCK for token in range(num_tokens))
    part = chosen / (seen * GROUP * BLOCK if rule.kind == "keys" else seen)
    assert prompt.chosen == pytest.approx(part, rel=1e-3)
    assert 0.05 < part < 0.98
    # Of a strip of several rows somebody wants more, and keys are read in any case.
    assert prompt.products > (0.5 + part / 2 if rule.kind == "keys" else part)


def test_a_survey_is_dense_and_knows_what_would_be_left_out() -> None:
    rules = [Rule.parse("means16=0.6"), Rule.parse("exact=0.6")]
    survey = Survey(SHAPE, prefill_attention, rules)
    q, k, v = (values[None] for values in qkv(2 * QUERIES))
    out = survey(0, q, k, v, torch.empty(0))[0]
    assert (out - attend(None, 2 * QUERIES)[0]).abs().max() < 1e-4
    for rule, prompt in zip(rules, survey.prompts, strict=True):
        found = [left_out(rule, token, kv_head) for token in range(2 * QUERIES) for kv_head in range(HEADS)]
        assert prompt.left_out == pytest.approx(sum(found) / len(found), rel=1e-3)
        assert prompt.left_out > 0.01


@pytest.mark.parametrize("text", RULES)
def test_later_tokens_change_nothing(text: str) -> None:
    rule = Rule.parse(text)
    assert (attend(rule, QUERIES)[0] - attend(rule, 2 * QUERIES)[0][:QUERIES]).abs().max() < 1e-5


def test_without_a_rule_it_is_dense_attention() -> None:
    q, k, v = qkv(QUERIES)
    own = KeyBlock(0, k, v)
    dense, _ = prefill_attention(q, own, QUERIES, lambda: (), 0, 1)
    assert (attend(None, QUERIES)[0] - dense).abs().max() < 1e-4


@pytest.mark.parametrize("text", ["means16", "means16=x", "means16=1", "mean=0.5", "keys=0"])
def test_what_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not a rule; write for example"):
        Rule.parse(text)


def test_a_rule_that_leaves_nothing_out_loses_nothing_and_a_survey_has_no_divergence(tmp_path, monkeypatch):
    text, records = tmp_path / "text.txt", tmp_path / "records.jsonl"
    text.write_text((Path(__file__).parents[2] / "README.md").read_text())
    common = ["sparse_prefill", "--text", str(text), "--context", "512", "--record", str(records), "--dtype", "float32"]
    monkeypatch.setattr("sys.argv", [*common, "--windows", "2", "--rules", "exact=0.9999999", "means64=0.1"])
    sparse_prefill.main()
    monkeypatch.setattr("sys.argv", [*common, "--rules", "means64=0.1", "--survey"])
    sparse_prefill.main()
    all_read, little, surveyed = (json.loads(line) for line in records.read_text().splitlines())
    assert abs(all_read["kl"]) < 1e-5
    assert abs(all_read["lost"]) < 1e-4
    assert little["kl"] > 1e-4
    assert little["kl_most"] > little["kl"] > little["kl_error"] > 0
    assert little["left_out"] > all_read["left_out"]
    assert "kl" not in surveyed
    assert surveyed["chosen"] == pytest.approx(little["chosen"], abs=0.1)


def test_a_context_that_is_no_multiple_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["sparse_prefill", "--text", str(tmp_path), "--context", "500"])
    with pytest.raises(InputError, match="--context is 500; give a multiple of 256"):
        sparse_prefill.main()
