"""2,000 prompts on two machines, and all that can go wrong meanwhile: every id once, tokens as in one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.dist.jobs import ENVIRONMENT, check, end, finished, one_process, replicas, start, wait_until, write_prompts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # beside busy programs two minutes become ten
    pytest.mark.skipif(not find_spec("ray"), reason="Ray is not installed; `make ray-test` installs it"),
    # A driver that is killed leaves its pipes to the collector of garbage.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
NUM_PROMPTS = 2000
SHARDS = ("--shard-size", "100")
POISON = {17: "poison", 60: "broken", 1999: "poison"}
MACHINE = {"object_store_memory": 100 * 2**20, "include_dashboard": False}


@pytest.fixture(scope="module")
def expected() -> list[tuple[int, ...]]:
    """The tokens of one process, for all tests here; a poison prompt has none that would be compared."""
    return one_process(write_prompts(Path(os.devnull), NUM_PROMPTS))


@pytest.fixture
def source(tmp_path) -> Path:
    write_prompts(tmp_path / "in.jsonl", NUM_PROMPTS)
    return tmp_path / "in.jsonl"


@pytest.fixture
def poisoned(tmp_path) -> Path:
    write_prompts(tmp_path / "in.jsonl", NUM_PROMPTS, POISON)
    return tmp_path / "in.jsonl"


@pytest.fixture(scope="module")
def cluster():
    """Two machines of two processors each, and a head without any."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **MACHINE})
        try:
            made.nodes = [made.add_node(num_cpus=2, **MACHINE) for _ in range(2)]
            yield made
        finally:
            made.shutdown()


def lose_a_machine(cluster) -> None:
    """At once, as by a power cut; there is another one for the tests that follow."""
    cluster.remove_node(cluster.nodes.pop(0), allow_graceful=False)
    cluster.nodes.append(cluster.add_node(num_cpus=2, **MACHINE))


def test_a_replica_that_is_killed_costs_nothing(tmp_path, source, cluster, expected):
    output = tmp_path / "out"
    driver = start(source, output, cluster.address, *SHARDS)
    wait_until(lambda: finished(output) > 100)
    next(replicas(os.getpid())).kill()
    out, err = end(driver)
    assert "has died" in err
    assert sum(report["num_deaths"] for report in json.loads(out)["replicas"]) == 1
    check(output, expected)
    # What it died of is on disk, and nothing was given up.
    assert len((output / "deaths.jsonl").read_text().splitlines()) >= 1


def test_a_machine_that_goes_away_costs_nothing(tmp_path, source, cluster, expected):
    output = tmp_path / "out"
    driver = start(source, output, cluster.address, *SHARDS)
    wait_until(lambda: finished(output) > 100)
    lose_a_machine(cluster)
    _, err = end(driver)
    assert "has gone with its machine" in err
    check(output, expected)
    assert (output / "deaths.jsonl").read_text() == ""  # no prompt is to blame


@pytest.mark.parametrize(("how", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_same_command_goes_on_after_the_driver_was_stopped(tmp_path, source, cluster, expected, how, status):
    output = tmp_path / "out"
    driver = start(source, output, cluster.address, *SHARDS)
    wait_until(lambda: finished(output) > 100)
    driver.send_signal(how)
    driver.wait(timeout=200)
    # A signal that comes while Ray waits in its own code arrives as a plain KeyboardInterrupt.
    _, err = end(driver, 130 if how == signal.SIGTERM and driver.returncode == 130 else status)
    assert how == signal.SIGKILL or "run the same command again" in err
    before = finished(output)
    assert before < NUM_PROMPTS
    out, _ = end(start(source, output, cluster.address, *SHARDS))
    assert sum(report["num_texts"] for report in json.loads(out)["replicas"]) <= NUM_PROMPTS - before
    check(output, expected)


def test_poison_prompts_end_as_errors_and_take_nobody_with_them(tmp_path, poisoned, cluster, expected):
    output = tmp_path / "out"
    out, err = end(start(poisoned, output, cluster.address, *SHARDS, "--max-deaths", "1"))
    assert "has failed (RuntimeError: a kernel has failed)" in err
    assert "1 processes died while they worked on this prompt" in err
    assert json.loads(out)["num_errors"] == len(POISON)
    check(output, expected, errors=(*POISON,))


def test_a_file_that_cannot_grow_ends_the_job_and_room_lets_it_go_on(tmp_path, source, cluster, expected):
    output = tmp_path / "out"
    output.mkdir()
    (output / "full-disk").write_text("25000")
    _, err = end(start(source, output, cluster.address, *SHARDS), 2)
    assert "cannot be written" in err
    assert "Make room" in err
    assert 0 < finished(output) < NUM_PROMPTS
    (output / "full-disk").unlink()
    end(start(source, output, cluster.address, *SHARDS))
    check(output, expected)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 300 kB, and what makes it larger."""
    output = tmp_path / "disk"
    output.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(output)]
    if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        yield output
    finally:
        subprocess.run(["umount", "--lazy", str(output)], check=True)


def resize(output: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(output)], check=True)


def test_a_full_disk_ends_the_job_and_the_merge_and_loses_nothing(source, cluster, expected, small_disk):
    output = small_disk / "out"
    _, err = end(start(source, output, cluster.address, *SHARDS), 2)
    assert "cannot be written" in err
    assert 0 < finished(output) < NUM_PROMPTS
    # Room for all shards, and not for all results once more.
    resize(small_disk, "1700k")
    _, err = end(start(source, output, cluster.address, *SHARDS), 2)
    assert "every shard is kept" in err
    assert finished(output) == NUM_PROMPTS
    assert not (output / "results.jsonl").exists()
    resize(small_disk, "8m")
    end(start(source, output, cluster.address, *SHARDS))
    check(output, expected)


def test_all_of_it_in_one_job(tmp_path, poisoned, cluster, expected):
    output = tmp_path / "out"
    driver = start(poisoned, output, cluster.address, *SHARDS)
    wait_until(lambda: finished(output) > 100)
    next(replicas(os.getpid())).kill()
    wait_until(lambda: finished(output) > 500)
    lose_a_machine(cluster)
    wait_until(lambda: finished(output) > 800)
    driver.kill()
    driver.communicate()
    assert finished(output) < NUM_PROMPTS
    end(start(poisoned, output, cluster.address, *SHARDS))
    check(output, expected, errors=(*POISON,))
