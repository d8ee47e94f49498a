"""Blocks of prompts in memory and in files: what is found, what gives way, and what damage does."""

import logging
import multiprocessing
import os

import pytest
import torch

from alisa.cache.prefix.blocks import BlockLayout
from alisa.cache.prefix.cache import PrefixCache
from alisa.cache.prefix.files import BlockFiles
from alisa.errors import InputError
from alisa.scheduler.plan import ScheduledChunk
from alisa.scheduler.prefix import BLOCK_TOKENS, block_names

LAYOUT = BlockLayout(num_layers=2, num_kv_heads=2, head_dim=4, dtype=torch.bfloat16)
WITH_HIDDEN = BlockLayout(num_layers=2, num_kv_heads=2, head_dim=4, dtype=torch.float32, hidden_size=6)
CPU = torch.device("cpu")


def names_of(*token_ids):
    """Names of a prompt of whole blocks, each of one token id."""
    return block_names([token for token in token_ids for _ in range(BLOCK_TOKENS)], b"")


def values_of(name, layer, layout):
    """K, V and hidden of a block: a function of its name and of the layer."""
    generator = torch.Generator().manual_seed(int.from_bytes(name[:6], "little") + layer)
    heads = (BLOCK_TOKENS, layout.num_kv_heads, layout.head_dim)
    k, v = (torch.randn(heads, generator=generator).to(layout.dtype) for _ in range(2))
    return k, v, torch.randn(BLOCK_TOKENS, layout.hidden_size, generator=generator).to(layout.dtype)


def compute(cache, names, start=0, failed=(), layout=LAYOUT):
    """A step that reads one prompt from block `start` on."""
    chunk = ScheduledChunk(3, start * BLOCK_TOKENS, (len(names) - start) * BLOCK_TOKENS)
    cache.begin([chunk], [names])
    for layer in range(layout.num_layers):
        parts = zip(*(values_of(name, layer, layout) for name in names[start:]), strict=True)
        cache.write(layer, *(torch.cat(part) for part in parts))
    cache.end(failed)
    cache.check()


def found(cache, names, layout=LAYOUT):
    """How many blocks of a prompt the cache gives; they are what was computed."""
    count = cache.fetch(names, 0, len(names))
    slots = cache.slots(names[:count])
    for layer in range(layout.num_layers if count else 0):
        expected = [torch.cat(part) for part in zip(*(values_of(n, layer, layout) for n in names[:count]), strict=True)]
        for got, wanted in zip(cache.read(layer, slots, CPU), expected, strict=True):
            assert torch.equal(got, wanted)
    cache.end(())
    return count


def test_names_are_those_of_whole_beginnings():
    one, two = block_names(range(40), b"a"), block_names([*range(32), 7, 8], b"a")
    assert len(one) == 2
    assert one == two
    assert not {*one} & {*block_names(range(40), b"b")}
    assert not {*one} & {*block_names([5, *range(1, 40)], b"a")}
    assert block_names(range(15), b"a") == ()


@pytest.mark.parametrize("layout", [LAYOUT, WITH_HIDDEN])
def test_what_was_computed_is_found(layout):
    cache = PrefixCache(8, layout, None, BLOCK_TOKENS)
    compute(cache, names_of(1, 2, 3), layout=layout)
    assert found(cache, names_of(1, 2, 3, 4), layout) == 3
    assert found(cache, names_of(1, 2, 5), layout) == 2
    assert found(cache, names_of(2, 2), layout) == 0
    assert (cache.num_blocks, cache.nbytes) == (3, 3 * layout.nbytes)


def test_tokens_after_the_last_whole_block_are_not_kept():
    cache = PrefixCache(8, LAYOUT, None, BLOCK_TOKENS)
    names = names_of(1)
    cache.begin([ScheduledChunk(0, 0, 5), ScheduledChunk(1, 0, BLOCK_TOKENS + 3)], [(), names])
    for layer in range(2):
        rest = [torch.zeros(5, *part.shape[1:], dtype=part.dtype) for part in values_of(names[0], layer, LAYOUT)]
        mine = values_of(names[0], layer, LAYOUT)
        cache.write(layer, *(torch.cat((r, part, r[:3])) for r, part in zip(rest, mine, strict=True)))
    cache.end(())
    assert found(cache, names) == 1


def test_the_prompt_not_used_for_longest_gives_way_from_its_end_on():
    cache = PrefixCache(4, LAYOUT, None, BLOCK_TOKENS)
    compute(cache, names_of(1, 2))
    compute(cache, names_of(5, 6))
    assert found(cache, names_of(1, 2)) == 2
    compute(cache, names_of(7))
    assert [found(cache, names_of(*ids)) for ids in ((5, 6), (1, 2), (7,))] == [1, 2, 1]


def test_a_prompt_larger_than_the_cache_keeps_its_beginning():
    cache = PrefixCache(3, LAYOUT, None, BLOCK_TOKENS)
    names = names_of(*range(8))
    for start in (0, 2, 4, 6):
        compute(cache, names[: start + 2], start)
    assert found(cache, names) == 3


def test_blocks_of_a_sequence_that_lost_its_rows_are_not_kept():
    cache = PrefixCache(4, LAYOUT, None, BLOCK_TOKENS)
    compute(cache, names_of(1, 2), failed={3})
    assert found(cache, names_of(1, 2)) == 0


def test_a_step_that_did_not_end_leaves_nothing():
    cache = PrefixCache(2, LAYOUT, None, BLOCK_TOKENS)
    names = names_of(1, 2)
    cache.begin([ScheduledChunk(0, 0, 2 * BLOCK_TOKENS)], [names])
    compute(cache, names_of(3, 4))
    assert [found(cache, names_of(3, 4)), found(cache, names)] == [2, 0]


def test_files_outlive_the_cache_and_fill_the_gaps_of_memory(tmp_path):
    names = names_of(1, 2, 3, 4)
    compute(PrefixCache(8, LAYOUT, BlockFiles(tmp_path / "new", 1 << 20), BLOCK_TOKENS), names)
    cache = PrefixCache(2, LAYOUT, BlockFiles(tmp_path / "new", 1 << 20), BLOCK_TOKENS)
    assert cache.fetch(names, 0, 4) == 2, "as many as memory holds"
    cache.end(())
    assert cache.fetch(names, 2, 2) == 2, "then the others, in their place"
    cache.end(())
    assert (tmp_path / "new").stat().st_mode & 0o77 == 0
    assert all(path.stat().st_mode & 0o77 == 0 for path in (tmp_path / "new").glob("*/*"))


def test_a_miss_costs_no_block_its_place(tmp_path):
    cache = PrefixCache(2, LAYOUT, BlockFiles(tmp_path, 1 << 20), BLOCK_TOKENS)
    compute(cache, names_of(1, 2))
    assert found(cache, names_of(8, 9)) == 0
    assert cache.num_blocks == 2


@pytest.mark.parametrize("damage", ["payload", "header", "short", "long", "empty", "other"])
def test_a_damaged_block_is_a_miss_and_is_written_anew(damage, tmp_path, caplog):
    names = names_of(1, 2, 3)
    compute(PrefixCache(8, LAYOUT, BlockFiles(tmp_path, 1 << 20), BLOCK_TOKENS), names)
    path, other = (tmp_path / name.hex()[:2] / f"{name.hex()}.kv" for name in (names[1], names[2]))
    content = bytearray(path.read_bytes())
    if damage in ("payload", "header"):
        content[-1 if damage == "payload" else 20] ^= 1
    else:
        wholes = {"short": content[:-1], "long": content + b"x", "empty": b"", "other": other.read_bytes()}
        content = wholes[damage]
    path.write_bytes(content)
    cache = PrefixCache(8, LAYOUT, BlockFiles(tmp_path, 1 << 20), BLOCK_TOKENS)
    with caplog.at_level(logging.WARNING):
        assert found(cache, names) == 1
    assert "damaged" in caplog.text
    assert not path.exists()
    compute(cache, names, 1)
    assert found(PrefixCache(8, LAYOUT, BlockFiles(tmp_path, 1 << 20), BLOCK_TOKENS), names) == 3


def test_the_directory_stays_under_its_cap_and_keeps_what_was_used(tmp_path):
    most = 40 * LAYOUT.nbytes
    cache = PrefixCache(4, LAYOUT, BlockFiles(tmp_path, most), BLOCK_TOKENS)
    for prompt in range(60):
        compute(cache, names_of(1000 + prompt, 2))
        assert found(cache, names_of(1000, 2)) == 2, "used all the time"
    size = sum(path.stat().st_size for path in tmp_path.glob("*/*"))
    assert most // 2 < size <= most
    again = PrefixCache(4, LAYOUT, BlockFiles(tmp_path, most), BLOCK_TOKENS)
    assert [found(again, names_of(1000 + prompt, 2)) for prompt in (0, 1, 59)] == [2, 0, 2]


def test_what_others_keep_in_the_directory_is_left_alone(tmp_path):
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / "notes.txt").write_text("mine" * 10_000)
    old = tmp_path / "ab" / "x.part"
    old.write_text("a writer died")
    os.utime(old, (0, 0))
    BlockFiles(tmp_path, 1000)
    assert [path.name for path in tmp_path.glob("*/*")] == ["notes.txt"]


def test_a_directory_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot hold the prefix cache: Not a directory"):
        BlockFiles(tmp_path / "file" / "below", 1 << 20)


def test_a_full_disk_ends_the_writing_not_the_run(tmp_path, monkeypatch, caplog):
    cache = PrefixCache(8, LAYOUT, BlockFiles(tmp_path, 1 << 20), BLOCK_TOKENS)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with caplog.at_level(logging.WARNING):
        compute(cache, names_of(1, 2, 3))
    assert caplog.text.count("No space left on device") == 1
    assert found(cache, names_of(1, 2, 3)) == 3
    assert not list(tmp_path.glob("*/*"))


def fill(directory, first):
    cache = PrefixCache(4, LAYOUT, BlockFiles(directory, 30 * LAYOUT.nbytes), BLOCK_TOKENS)
    for turn in range(40):
        names = names_of(first + turn % 7, 1, turn % 3)
        start = found(cache, names)
        if start < len(names):
            compute(cache, names, start)


def test_processes_share_a_directory(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=fill, args=(tmp_path, first)) for first in (0, 3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0], "every block that was found was right"
    assert not list(tmp_path.glob("*/*.part"))
    cache = PrefixCache(4, LAYOUT, BlockFiles(tmp_path, 1 << 20), BLOCK_TOKENS)
    assert sum(found(cache, names_of(first, 1, last)) for first in range(10) for last in range(3)) > 0
