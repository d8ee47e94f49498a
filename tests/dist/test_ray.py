"""Fleets on a real Ray. What they give is compared with one engine in this process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from importlib.util import find_spec

import pytest

from tests.dist.jobs import ENVIRONMENT, finished, one_process, replicas, results, start, wait_until, write_prompts

pytestmark = [
    pytest.mark.skipif(not find_spec("ray"), reason="Ray is not installed; `make ray-test` installs it"),
    # A driver that is killed leaves its pipes to the collector of garbage.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def check(output, texts, errors: tuple[int, ...] = ()) -> None:
    """Every prompt has one result, in order, and what is no error is what one process gives."""
    lines = results(output)
    assert [line["index"] for line in lines] == [*range(len(texts))]
    assert [line["id"] for line in lines] == [f"p{-index}" for index in range(len(texts))]
    assert tuple(line["index"] for line in lines if "error" in line) == errors
    expected = one_process([text.replace("poison ", "") for text in texts])
    for line in lines:
        if "error" not in line:
            assert tuple(line["token_ids"]) == expected[line["index"]], line["index"]


def end(driver: subprocess.Popen[str], status: int = 0) -> tuple[str, str]:
    out, err = driver.communicate(timeout=200)
    assert driver.returncode == status, err
    assert "Traceback" not in err
    return out, err


def test_a_fleet_on_this_machine_gives_the_tokens_of_one_process(tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out"
    texts = write_prompts(source, 12)
    out, err = end(start(source, output, "local", "--replicas", "1", "--shard-size", "5"))
    record = json.loads(out)
    assert (record["num_results"], record["num_errors"], record["num_doubles"]) == (12, 0, 0)
    assert sum(report["num_texts"] for report in record["replicas"]) == 12
    assert "replica 0" in err
    check(output, texts)
    _, err = end(start(source, output, "local", "--replicas", "1", "--shard-size", "5"))
    assert "nothing was left to do" in err


@pytest.fixture
def cluster(monkeypatch):
    """Two machines of two processors each, and a head without any."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    machine = {"object_store_memory": 100 * 2**20, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **machine})
    try:
        made.nodes = [made.add_node(num_cpus=2, **machine) for _ in range(2)]
        yield made
    finally:
        made.shutdown()


@pytest.mark.slow
def test_a_replica_that_is_killed_costs_nothing(tmp_path, cluster):
    source, output = tmp_path / "in.jsonl", tmp_path / "out"
    texts = write_prompts(source, 200)
    driver = start(source, output, cluster.address, "--shard-size", "25")
    wait_until(lambda: finished(output) > 10)
    next(replicas(os.getpid())).kill()
    out, err = end(driver)
    assert "has died" in err
    assert sum(report["num_deaths"] for report in json.loads(out)["replicas"]) == 1
    check(output, texts)
    # What it died of is on disk, and nothing was given up.
    assert len((output / "deaths.jsonl").read_text().splitlines()) >= 1


@pytest.mark.slow
def test_a_machine_that_goes_away_costs_nothing(tmp_path, cluster):
    source, output = tmp_path / "in.jsonl", tmp_path / "out"
    texts = write_prompts(source, 200)
    driver = start(source, output, cluster.address, "--shard-size", "25")
    wait_until(lambda: finished(output) > 10)
    cluster.remove_node(cluster.nodes[0], allow_graceful=False)
    _, err = end(driver)
    assert "has gone with its machine" in err
    check(output, texts)
    assert (output / "deaths.jsonl").read_text() == ""  # no prompt is to blame


@pytest.mark.slow
@pytest.mark.parametrize(("how", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_same_command_goes_on_after_the_driver_was_stopped(tmp_path, cluster, how, status):
    source, output = tmp_path / "in.jsonl", tmp_path / "out"
    texts = write_prompts(source, 200)
    driver = start(source, output, cluster.address, "--shard-size", "25")
    wait_until(lambda: finished(output) > 10)
    driver.send_signal(how)
    driver.wait(timeout=200)
    # A signal that comes while Ray waits in its own code arrives as a plain KeyboardInterrupt.
    _, err = end(driver, 130 if how == signal.SIGTERM and driver.returncode == 130 else status)
    assert how == signal.SIGKILL or "run the same command again" in err
    before = finished(output)
    out, _ = end(start(source, output, cluster.address, "--shard-size", "25"))
    assert sum(report["num_texts"] for report in json.loads(out)["replicas"]) <= len(texts) - before
    check(output, texts)


@pytest.mark.slow
def test_poison_prompts_end_as_errors_and_take_nobody_with_them(tmp_path, cluster):
    source, output = tmp_path / "in.jsonl", tmp_path / "out"
    texts = write_prompts(source, 100, poison=(17, 60))
    out, err = end(start(source, output, cluster.address, "--shard-size", "25", "--max-deaths", "1"))
    assert "1 processes died while they worked on this prompt" in err
    assert json.loads(out)["num_errors"] == 2
    check(output, texts, errors=(17, 60))


@pytest.mark.slow
def test_a_full_disk_ends_the_job_and_room_lets_it_go_on(tmp_path, cluster):
    source, output = tmp_path / "in.jsonl", tmp_path / "out"
    texts = write_prompts(source, 100)
    output.mkdir()
    (output / "full-disk").write_text("6000")
    _, err = end(start(source, output, cluster.address, "--shard-size", "25"), 2)
    assert "cannot be written" in err
    assert "Make room" in err
    assert 0 < finished(output) < 100
    (output / "full-disk").unlink()
    end(start(source, output, cluster.address, "--shard-size", "25"))
    check(output, texts)
