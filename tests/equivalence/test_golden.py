"""Tokens recorded with version 0.1 are still what comes out; tests/golden/record.py says what was kept and why."""

import pytest

from tests.golden.cases import load, run

GOLDEN = load()


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=[pytest.mark.slow] if c.slow else []) for c in GOLDEN.cases],
)
def test_recorded_tokens_come_out_again(case, tmp_path):
    tokens, seen = run(case, GOLDEN.prompts, tmp_path)
    assert [output[: len(golden)] for output, golden in zip(tokens, case.tokens, strict=True)] == case.tokens
    assert set(case.seen) <= seen, "the case no longer does what it was made for"
