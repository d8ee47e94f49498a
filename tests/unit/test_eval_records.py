"""The file of cells: resumable, of any mixture, and never silently damaged."""

import json
from dataclasses import replace

import pytest

from alisa import LLM
from alisa.errors import InputError
from alisa.lab.eval.measurement import UnitResults, measure_cells
from alisa.lab.eval.record_file import RecordFile, eval_record
from alisa.lab.eval.statistics import difference, mean
from alisa.lab.eval.subject import BASELINE, Subject, Variant, variants
from alisa.lab.eval.tables import tables
from alisa.policy.registry import POLICIES


class Counting:
    """An evaluation of two units that counts how often it runs."""

    kind = "recall"
    task = "fake 8"
    metric = "accuracy"
    length = 8

    def __init__(self, seed=0):
        self.settings = {"seed": seed}
        self.ran = []

    def measure(self, subject, variant):
        self.ran.append(variant)
        return UnitResults([1.0, 1.0] if variant == BASELINE else [1.0, variant.sparsity], {"extra": 1})

    def value(self, units):
        return mean(units)

    def versus(self, units, baseline):
        return difference(units, baseline)


@pytest.fixture(scope="module")
def subject():
    return Subject.of(LLM(dtype="float32"))


CHOSEN = variants(["dense", "swa", "sketch"], [0.0, 0.5], ["auto", "int8"])


def test_variants_are_every_combination_once_and_dense_has_no_sparsity():
    assert CHOSEN[0] == BASELINE
    assert len(CHOSEN) == len(set(CHOSEN)) == 2 * (1 + 2 * 2)
    assert [variant for variant in CHOSEN if variant.policy == "dense"] == [BASELINE, Variant("dense", 0.0, "int8")]


def test_cells_are_measured_once_and_compared_with_dense(subject, tmp_path):
    path = tmp_path / "cells.jsonl"
    with RecordFile(path) as file:
        records = list(measure_cells(subject, Counting(), CHOSEN, file))
    assert [eval_record(json.loads(line)) for line in path.read_text().splitlines()] == records
    swa = next(r for r in records if (r.policy, r.sparsity, r.kv_dtype) == ("swa", 0.5, "int8"))
    assert (swa.value, swa.standard_error) == (0.75, 0.25)
    assert (swa.versus_dense, swa.versus_dense_error) == (-0.25, 0.25)
    assert (swa.kv_token_bytes, swa.details["extra"]) == (4 * 2 * (64 + 4) * 2, 1)
    assert swa.policy_token_bytes > 0

    again, other = Counting(), Counting(seed=1)
    with RecordFile(path) as file:
        assert list(measure_cells(subject, again, CHOSEN, file)) == records
        assert len(list(measure_cells(subject, other, CHOSEN[:3], file))) == 3
    assert again.ran == []
    assert other.ran == list(CHOSEN[:3])
    assert len(path.read_text().splitlines()) == len(CHOSEN) + 3


def test_a_resumed_run_pairs_with_the_baseline_of_the_first(subject, tmp_path):
    path = tmp_path / "cells.jsonl"
    with RecordFile(path) as file:
        list(measure_cells(subject, Counting(), CHOSEN[:1], file))
    resumed = Counting()
    with RecordFile(path) as file:
        records = list(measure_cells(subject, resumed, CHOSEN[:3], file))
    assert resumed.ran == list(CHOSEN[1:3])
    assert [record.versus_dense for record in records] == [0.0, -0.5, -0.25]


def test_rows_whose_heads_are_in_parts_now_are_measured_anew(subject, tmp_path, monkeypatch):
    chosen = variants(["dense"], [0.0], ["auto", "int8", "int4"])
    with RecordFile(tmp_path / "cells.jsonl") as file:
        list(measure_cells(subject, Counting(), chosen, file))
    monkeypatch.setattr("alisa.spec.PART_LEN", subject.spec.head_dim // 2)
    again = Counting()
    with RecordFile(tmp_path / "cells.jsonl") as file:
        list(measure_cells(subject, again, chosen, file))
    assert [variant.kv_dtype for variant in again.ran] == ["int4"]


def test_a_policy_that_means_something_else_now_is_measured_anew(subject, tmp_path, monkeypatch):
    path = tmp_path / "cells.jsonl"
    with RecordFile(path) as file:
        list(measure_cells(subject, Counting(), CHOSEN, file))
    newer = replace(POLICIES["sketch"], edition=POLICIES["sketch"].edition + 1)
    monkeypatch.setattr("alisa.lab.eval.measurement.POLICIES", {**POLICIES, "sketch": newer})
    again = Counting()
    with RecordFile(path) as file:
        list(measure_cells(subject, again, CHOSEN, file))
    assert again.ran == [variant for variant in CHOSEN if variant.policy == "sketch"]


def test_a_shortened_baseline_is_refused_in_a_sentence(subject, tmp_path):
    path = tmp_path / "cells.jsonl"
    with RecordFile(path) as file:
        list(measure_cells(subject, Counting(), CHOSEN[:1], file))
    record = json.loads(path.read_text())
    del record["units"]
    path.write_text(json.dumps(record) + "\n")
    with RecordFile(path) as file, pytest.raises(InputError, match="choose another --output"):
        list(measure_cells(subject, Counting(), CHOSEN[:2], file))


def test_a_torn_line_is_cut_off_and_foreign_files_are_refused(subject, tmp_path):
    path = tmp_path / "cells.jsonl"
    with RecordFile(path) as file:
        list(measure_cells(subject, Counting(), CHOSEN[:2], file))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:50])
    with RecordFile(path):
        assert path.read_bytes() == whole
    for content, message in (
        ("my notes\n", "line 1: not a result of alisa eval"),
        ("my notes", "its last line is not a result"),
        ('{"kind": "run"}\n', "line 1: not a result of alisa eval"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            RecordFile(path)
        assert path.read_text() == content


def test_a_figure_that_is_no_number_is_one_sentence(subject, tmp_path):
    class Broken(Counting):
        def measure(self, subject, variant):
            return UnitResults([float("nan"), 1.0], {})

    path = tmp_path / "cells.jsonl"
    with (
        RecordFile(path) as file,
        pytest.raises(InputError, match="its value is nan, and JSON has finite numbers only"),
    ):
        list(measure_cells(subject, Broken(), CHOSEN[:1], file))
    assert path.read_bytes() == b""


def test_tables_have_a_row_for_each_policy_and_a_column_for_each_sparsity(subject):
    with RecordFile(None) as file:
        [table] = tables(list(measure_cells(subject, Counting(), CHOSEN, file)))
    assert table.header == ("", "level", "0", "0.5")
    assert table.rows[0] == ("dense, float32", "100.0%", "", "")
    assert table.rows[1] == ("swa, float32", "", "50.0% (-50.0 ± 50.0)", "75.0% (-25.0 ± 25.0)")
    assert [row[0] for row in table.rows[3:]] == ["dense, int8", "swa, int8", "sketch, int8"]
