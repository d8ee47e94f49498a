from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from alisa.cli.main import main
from alisa.errors import InputError
from alisa.planner.fleet import SHARD_SIZE, DriverCosts, FleetRequest, plan_fleet, replicas_for

REQUEST = FleetRequest(
    num_prompts=10**6,
    prompt_len=100,
    output_len=100,
    prompts_per_s=10.0,
    weight_bytes=10**10,
    storage_bandwidth=10**9,
    costs=DriverCosts(read_prompt_s=1e-5, dispatch_s=1e-3, merge_result_s=1e-5),
)


def plan(capsys, *options):
    words = ("plan", "--shape", "opt-125m", "--hardware", "h200", "--batch", "8", "--output-len", "20")
    status = main([*words, "--json", *options])
    out, err = capsys.readouterr()
    return status, json.loads(out.splitlines()[-1]) if status == 0 else {}, err


def test_the_parts_of_a_job_by_hand():
    found = plan_fleet(REQUEST, 100)
    assert found.read_s == pytest.approx(10)
    assert found.load_s == pytest.approx(100 * 10)
    assert found.work_s == pytest.approx(10**6 / (10 * 100))
    assert found.tail_s == pytest.approx(SHARD_SIZE / 10)
    assert found.driver_share == pytest.approx(10**6 / SHARD_SIZE * 1e-3 / found.work_s, rel=1e-3)
    assert found.store_bytes == pytest.approx(100 * 2 * SHARD_SIZE * 100 * 4.5, rel=1e-3)
    assert found.bottleneck == "loading weights"
    assert found.seconds == pytest.approx(found.read_s + found.load_s + found.work_s + found.tail_s + found.merge_s)


def test_a_driver_that_cannot_hand_shards_out_fast_enough_is_waited_for():
    slow = replace(REQUEST, weight_bytes=0, costs=replace(REQUEST.costs, dispatch_s=1.0))
    found = plan_fleet(slow, 1000)
    assert found.driver_share > 1
    assert found.work_s == pytest.approx(10**6 / SHARD_SIZE, rel=1e-3)
    assert found.bottleneck == "handing shards out"


def test_the_fewest_replicas_that_are_done_in_time():
    replicas = replicas_for(REQUEST, 2.0)
    assert plan_fleet(REQUEST, replicas).seconds <= 2 * 3600
    assert plan_fleet(REQUEST, replicas - max(1, replicas // 10)).seconds > 2 * 3600
    fastest = min(plan_fleet(REQUEST, replicas).seconds for replicas in range(1, 3000)) / 3600
    with pytest.raises(InputError, match="too few with any number of replicas") as told:
        replicas_for(REQUEST, 0.01)
    # Numbers a twentieth apart are tried, and hours are told with one decimal.
    assert float(re.search(r"take (\S+) hours", str(told.value))[1]) == pytest.approx(fastest, abs=0.06)


def test_the_command_compares_numbers_of_replicas(capsys):
    status, record, err = plan(capsys, "--prompts", "1e6")
    assert status == 0
    assert [answer["replicas"] for answer in record["fleet"]] == [1, 10, 100, 1000]
    hours = [answer["work_s"] for answer in record["fleet"]]
    assert hours == sorted(hours, reverse=True)
    assert "1,000,000 prompts" in err
    assert "…" not in err.partition("1,000,000 prompts")[2]  # every figure is whole, on 80 columns too
    _, record, _ = plan(capsys, "--prompts", "1e6", "--replicas", "3")
    assert [answer["replicas"] for answer in record["fleet"]] == [3]
    _, record, _ = plan(capsys, "--prompts", "1e6", "--replicas", "?", "--hours", "5")
    assert record["fleet"][0]["seconds"] <= 5 * 3600


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--replicas", "3"), "say with --prompts"),
        (("--prompts", "0"), "--prompts is 0"),
        (("--prompts", "10", "--replicas", "0"), "--replicas is 0"),
        (("--prompts", "10", "--replicas", "1", "--hours", "2"), "leave one of the two out"),
        (("--prompts", "10", "--hours", "0"), "--hours is 0"),
        (("--prompts", "10", "--storage-bandwidth", "fast"), "'fast' is not a memory size"),
        (("--prompts", "1e12", "--hours", "1"), "too few with any number"),
    ],
)
def test_questions_without_an_answer_say_why(capsys, options, message):
    status, _, err = plan(capsys, *options)
    assert status == 2
    assert message in err
