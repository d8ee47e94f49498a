"""Fleets on a real Ray. What they give is compared with one engine in this process."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from tests.dist.jobs import check, end, one_process, start, write_prompts

pytestmark = pytest.mark.skipif(not find_spec("ray"), reason="Ray is not installed; `make ray-test` installs it")


def test_a_fleet_on_this_machine_gives_the_tokens_of_one_process(tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out"
    texts = write_prompts(source, 12)
    out, err = end(start(source, output, "local", "--replicas", "1", "--shard-size", "5"))
    record = json.loads(out)
    assert (record["num_results"], record["num_errors"], record["num_doubles"]) == (12, 0, 0)
    assert sum(report["num_texts"] for report in record["replicas"]) == 12
    assert "replica 0" in err
    check(output, one_process(texts))
    _, err = end(start(source, output, "local", "--replicas", "1", "--shard-size", "5"))
    assert "nothing was left to do" in err
