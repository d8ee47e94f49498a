"""The parts of a job on many machines that need no Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from alisa.cli.job_directory import JobDirectory, JobFacts, TextDeaths
from alisa.cli.main import main
from alisa.cli.merge import merge_shards
from alisa.cli.prompts import each_sample, in_part, read_prompts
from alisa.cli.shard_work import groups
from alisa.cli.shards import cut_input
from alisa.config import EngineConfig
from alisa.dist.cluster import Node, size_replicas
from alisa.dist.share import with_whole_paths
from alisa.errors import InputError

GIB = 2**30


def cut(path, size=3, n=1, limit=None, keep_invalid=False):
    return cut_input(path, shard_size=size, n=n, limit=limit, keep_invalid=keep_invalid)


def plain(prompts):
    """Without the name, which says where in which file."""
    return [replace(prompt, name="") for prompt in prompts]


@pytest.mark.parametrize("text", [b"a\nb\n\nc\nd\ne", b"\xef\xbb\xbfa\r\n\n \nb\nc\n", b"only"])
@pytest.mark.parametrize("size", [1, 2, 100])
def test_shards_together_are_the_file(tmp_path, text, size):
    path = tmp_path / "in.txt"
    path.write_bytes(text)
    sharded = cut(path, size)
    with JobDirectory(tmp_path / "out", sharded, JobFacts("r", "i", 1, size), 3) as directory:
        found = [prompt for number in directory.waiting for prompt in directory.task(number).prompts.read()]
    expected = each_sample(read_prompts(path), 1)
    assert plain(found) == plain(expected)
    assert [prompt.name for prompt in found] == [prompt.name for prompt in expected]


def test_shards_count_the_texts_of_each_prompt(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a", "n": 3}\n{"prompt": "b"}\n{"prompt": "c"}\n')
    sharded = cut(path, 2, n=2)
    assert [shard.num_texts for shard in sharded.shards] == [5, 2]
    assert sharded.num_texts == 7
    assert cut(path, 2, n=2, limit=1).num_texts == 3
    assert cut(path).fingerprint != cut(path, limit=1).fingerprint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}', "line 2: the id 1"),
        ('{"prompt": "a"}\n{"text": 1}', "line 2: found text"),
        ("\n\n", "holds no prompt"),
    ],
)
def test_an_input_that_cannot_be_used_is_refused_before_anything_runs(tmp_path, text, message):
    path = tmp_path / "in.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        cut(path)
    with pytest.raises(InputError, match=r"ends in \.jsonl or \.txt"):
        cut(path.with_suffix(".json"))


def test_parts_of_the_input_are_all_of_it_once(tmp_path):
    path = tmp_path / "in.txt"
    path.write_text("\n".join("abcdefg"))
    prompts = each_sample(read_prompts(path), 2)
    parts = [in_part(prompts, f"{number}/3") for number in range(3)]
    assert sorted((p.index, p.sample) for part in parts for p in part) == [(p.index, p.sample) for p in prompts]
    assert in_part(prompts, None) == prompts
    for wrong in ("3/3", "a/3", "1", "1/0", "-1/3"):
        with pytest.raises(InputError, match="write I/N"):
            in_part(prompts, wrong)
    with pytest.raises(InputError, match="fewer prompts than parts"):
        in_part(prompts, "8/9")


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "in.txt"
    path.write_text("\n".join("abcdefgh"))
    with JobDirectory(tmp_path / "out", cut(path, 4), JobFacts("r", "i", 8, 4), 3) as made:
        yield made


def test_deaths_are_of_the_texts_that_were_in_the_model_and_outlive_the_driver(directory, tmp_path):
    directory.died(0)  # nothing of it was in the model yet
    assert not directory.is_suspect(0)
    directory.files(0).running.write_text("[1, 3]")
    directory.died(0)
    directory.files(0).running.write_text("[3]")
    directory.died(0)
    expected = {1: TextDeaths(together=1), 3: TextDeaths(together=1, alone=1)}
    assert directory.task(0).deaths == expected
    directory.files(1).running.write_text("[2]")  # another shard may have run beside it
    directory.died(1)
    assert directory.task(1).deaths == {2: TextDeaths(together=1)}
    directory.__exit__(None, None, None)
    with JobDirectory(directory.path, cut(tmp_path / "in.txt", 4), JobFacts("r", "i", 8, 4), 3) as again:
        assert again.task(0).deaths == expected
        assert again.is_suspect(1)


def test_a_directory_is_of_one_job_and_of_one_command(directory, tmp_path):
    sharded = cut(tmp_path / "in.txt", 4)
    with pytest.raises(InputError, match="written by another process"):
        JobDirectory(directory.path, sharded, JobFacts("r", "i", 8, 4), 3)
    directory.__exit__(None, None, None)
    with pytest.raises(InputError, match="other prompts; choose another --output"):
        JobDirectory(directory.path, sharded, JobFacts("r", "other", 8, 4), 3)
    with pytest.raises(InputError, match="other model, policy or sampling settings"):
        JobDirectory(directory.path, sharded, JobFacts("other", "i", 8, 4), 3)


def test_suspects_run_in_small_groups_and_at_last_alone():
    once, twice, alone = TextDeaths(1), TextDeaths(2), TextDeaths(1, 1)

    def grouped(deaths, num_texts, finished=()):
        return [*groups(SimpleNamespace(deaths=deaths), num_texts, frozenset(finished))]

    assert grouped({}, 5, {1}) == [(0, 2, 3, 4)]
    assert grouped({2: once, 4: twice}, 5) == [(0, 1, 3), (2,), (4,)]
    assert [len(group) for group in grouped(dict.fromkeys(range(40), once), 40)] == [16, 16, 8]
    assert grouped({0: twice, 1: alone, 2: twice}, 4, {0}) == [(3,), (1,), (2,)]


def write_results(directory, number, indices):
    path = directory.files(number).whole
    path.write_text("".join(json.dumps({"index": index, "text": str(index)}) + "\n" for index in indices))
    return path


def merge(directory, tmp_path):
    shards = cut(tmp_path / "in.txt", 4).shards
    return merge_shards(((shard, directory.files(shard.number).whole) for shard in shards), directory.results)


def test_a_merge_orders_and_drops_doubles(directory, tmp_path):
    write_results(directory, 0, [2, 0, 1, 1, 3])
    write_results(directory, 1, [7, 6, 5, 4])
    merged = merge(directory, tmp_path)
    assert (merged.num_results, merged.num_doubles, merged.num_errors) == (8, 1, 0)
    assert [json.loads(line)["index"] for line in directory.results.read_text().splitlines()] == [*range(8)]


@pytest.mark.parametrize(
    ("second", "message"), [([4, 5, 6], "holds 3 of 4 results"), ([4, 5, 6, 1], "prompt 1, which is of another shard")]
)
def test_a_merge_that_lacks_something_gives_no_file(directory, tmp_path, second, message):
    write_results(directory, 0, range(4))
    write_results(directory, 1, second)
    with pytest.raises(InputError, match=message):
        merge(directory, tmp_path)
    assert not directory.results.exists()


def node(cpus, gpus=0, memory=16 * GIB) -> Node:
    return Node("n", cpus, gpus, memory)


def size(nodes, replicas="auto", cpus=None, memory=None, device="auto"):
    return size_replicas(nodes, replicas=replicas, cpus=cpus, memory_bytes=memory, device=device)


def test_replicas_take_whole_machines_or_equal_parts_or_gpus():
    two = [node(8), node(4), node(0)]
    found = size(two)
    assert (found.num_replicas, found.share.num_cpus) == (3, 4)
    assert found.share.memory_bytes == 8 * GIB
    assert size(two, replicas=6).share.num_cpus == 2
    assert size(two, replicas=2, cpus=4).num_replicas == 2
    assert size(two, memory=5 * GIB).num_replicas == 3
    found = size([node(16, gpus=4), node(8)])
    assert (found.num_replicas, found.share.num_cpus, found.share.num_gpus) == (4, 4, 1)
    assert size([node(16, gpus=4), node(8)], device="cpu").share.num_gpus == 0


def test_what_finds_no_room_is_refused_with_the_numbers():
    with pytest.raises(InputError, match="room for 12"):
        size([node(8), node(4)], replicas=13)
    with pytest.raises(InputError, match="room for 0"):
        size([node(8)], memory=17 * GIB)
    with pytest.raises(InputError, match="offers a GPU"):
        size([node(8)], device="cuda")
    with pytest.raises(InputError, match="offers a CPU"):
        size([node(0)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ray", "local"), "--ray works on a file"),
        (("--ray", "local", "--input", "-", "--output", "d"), "--ray works on a file"),
        (("--ray", "local", "--input", "a.txt", "--output", "d", "--verify"), "--verify is of one engine"),
        (("--ray", "local", "--input", "a.txt", "--output", "d", "--shard", "0/2"), "--shard is of one engine"),
        (("--ray", "local", "--replicas", "0"), "--replicas is 0"),
        (("--ray", "local", "--max-deaths", "0"), "--max-deaths is 0"),
        (("--replicas", "2", "a"), "there is no --ray"),
    ],
)
def test_commands_that_cannot_be_meant_say_why(capsys, options, message):
    assert main(["generate", *options]) == 2
    assert message in capsys.readouterr().err


def test_without_ray_the_extra_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "in.txt").write_text("a")
    words = ["--ray", "local", "--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out")]
    assert main(["generate", *words]) == 2
    assert "pip install 'alisa[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["serve", "--ray", "local"]) == 2
    assert "pip install 'alisa[ray]'" in capsys.readouterr().err


def test_all_but_the_router_that_ray_serve_loads_can_be_imported_without_ray():
    code = """
import importlib, pkgutil, sys
sys.modules["ray"] = None
import alisa.dist
names = [module.name for module in pkgutil.iter_modules(alisa.dist.__path__)]
assert "prefix_router" in names and len(names) > 8
for name in names:
    if name != "prefix_router":
        importlib.import_module(f"alisa.dist.{name}")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_job_on_many_machines_is_asked_for_without_torch():
    code = "import sys, alisa.cli.ray_job, alisa.cli.ray_serve; assert not {'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_files_are_the_same_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("m.gguf").touch()
    given = EngineConfig(model="m.gguf", kv_disk_path=Path("disk"), prefix_cache=True, prefix_cache_disk=Path("cache"))
    found = with_whole_paths(given)
    assert found.model == str(tmp_path / "m.gguf")
    assert (found.kv_disk_path, found.prefix_cache_disk) == (tmp_path / "disk", tmp_path / "cache")
    for model in ("owner/name", None):
        assert with_whole_paths(EngineConfig(model=model)) == EngineConfig(model=model)


def test_every_path_of_the_engine_is_made_whole():
    paths = {field.name for field in fields(EngineConfig) if "Path" in str(field.type)}
    given = EngineConfig(prefix_cache=True, **dict.fromkeys(paths, Path("x")))
    assert all(getattr(with_whole_paths(given), name).is_absolute() for name in paths)
    assert len(paths) >= 3
