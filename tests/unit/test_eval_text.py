"""Reading texts as they are shipped, and cutting them into windows."""

import json
from math import exp, sqrt

import pytest

from alisa import LLM
from alisa.errors import InputError
from alisa.lab.eval.documents import read_documents
from alisa.lab.eval.statistics import difference, exponential, mean
from alisa.lab.eval.windows import cut_windows
from tests.shared import shared_path


def test_a_directory_gives_its_test_split(tmp_path):
    for name in ("valid.txt", "test.txt", "SOURCE.md", "LICENSE"):
        (tmp_path / name).write_text(f"text of {name}")
    assert read_documents(tmp_path) == ["text of test.txt"]
    (tmp_path / "test.txt").unlink()
    (tmp_path / "more.jsonl").write_text('{"text": "a line"}\n')
    assert read_documents(tmp_path) == ["a line", "text of valid.txt"]


def test_a_directory_of_sources_is_read_whole_but_for_its_licence(tmp_path):
    for name in ("abc.py", "doctest.py", "LICENSE.txt", "README.txt", "data.bin"):
        (tmp_path / name).write_text(f"text of {name}")
    assert read_documents(tmp_path) == ["text of abc.py", "text of doctest.py"]


def test_alpaca_records_are_joined_by_blank_lines(tmp_path):
    path = tmp_path / "alpaca.json"
    records = [
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "Hi!"},
        {"text": "plain"},
    ]
    path.write_text(json.dumps(records))
    assert read_documents(path) == ["Add.\n\n1, 2\n\n3", "Say hi.\n\nHi!", "plain"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n[1]\n', "record 2 is not a JSON object"),
        ("a.json", "[{", "is not JSON"),
        ("a.jsonl", '{"body": "x"}\n', 'no "text", "prompt" or "instruction" in it; there is body'),
        ("a.txt", " \n", "has no text"),
    ],
)
def test_unusable_text_is_refused(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_documents(tmp_path / name)
    with pytest.raises(InputError, match="no file or directory"):
        read_documents(tmp_path / "none")


def test_published_sets_are_read_as_they_are():
    assert read_documents(shared_path("data/wikitext2"))[0].startswith(" \n = Robert <unk> = \n")
    assert "no it was n't black monday" in read_documents(shared_path("data/ptb"))[0][:40]
    assert len(read_documents(shared_path("data/alpaca_en_demo"))) == 999
    assert len(read_documents(shared_path("data/prose/heldout"))) == 3


def test_windows_follow_each_other_behind_the_leading_token(tmp_path):
    tokenizer = LLM().tokenizer
    text = "The ship had been at sea for many days. " * 60
    windows = cut_windows(tokenizer, [text], context=50, prefill=20, count=None)
    ids = [token for window in windows for token in (*window.item.prompt_ids[1:], *window.item.output_ids)]
    whole = tokenizer.encode(text)
    assert ids == whole[1 : 1 + 49 * len(windows)]
    assert len(whole) - 1 - len(ids) < 49
    for window in windows:
        assert (len(window.item.prompt_ids), len(window.item.output_ids)) == (20, 30)
        assert window.item.prompt_ids[0] == whole[0]
        assert window.scored_bytes == len(tokenizer.decode(window.item.output_ids).encode())
    spread = cut_windows(tokenizer, [text], context=50, prefill=20, count=3)
    assert [windows.index(window) for window in spread] == [index * len(windows) // 3 for index in range(3)]
    with pytest.raises(InputError, match="less than one window of 5000"):
        cut_windows(tokenizer, [text], context=5000, prefill=20, count=None)


def test_standard_errors_are_those_of_the_mean_and_of_the_paired_difference():
    assert mean([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5, sqrt((2.25 + 0.25) * 2 / 3 / 4)))
    assert difference([1.1, 5.1, 9.1], [1.0, 5.0, 9.0]) == pytest.approx((0.1, 0.0))
    assert exponential(mean([0.0, 2.0])) == pytest.approx((exp(1), exp(1) * 1.0))
    assert mean([1.0]).standard_error != mean([1.0]).standard_error  # NaN: one unit has no spread
