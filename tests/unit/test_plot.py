"""Figures from records; skipped where matplotlib is not installed (extra `plot`)."""

import builtins
import json

import pytest

from alisa.cli.main import main

CELL = {"model": "m", "kv_dtype": "float32", "versus_dense_error": 0.01}
STEPS = [[0.9, 0.95], [0.7, 0.8]]


def cells(kind, task, **more):
    for policy, sparsities in (("dense", [0.0]), ("swa", [0.5, 0.8]), ("sketch", [0.5, 0.8])):
        for sparsity in sparsities:
            name = f"{kind} {task} {policy} {sparsity}"
            yield (
                CELL
                | more
                | {
                    "kind": kind,
                    "cell": name,
                    "task": task,
                    "policy": policy,
                    "sparsity": sparsity,
                    "value": 1 - sparsity,
                    "versus_dense": 1 + sparsity / 10 if kind == "ppl" else -sparsity,
                }
            )


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def files(tmp_path):
    maps = {"by_depth": [[0.0, 0.5, 4], [1.0, 1.0, 4]], "length": 256, "by_distance": [[64, 1.0, 4], [256, 0.25, 4]]}
    study = dict.fromkeys(("spearman", "overlap", "returning"), 0.5) | {"weight_sparsity_by_layer_and_step": STEPS}
    return {
        "ppl": write(tmp_path / "ppl.jsonl", cells("ppl", "text")),
        "recall": write(tmp_path / "recall.jsonl", cells("recall", "needle 256", **maps)),
        "sparsity": write(tmp_path / "sparsity.jsonl", cells("sparsity", "text", **study)),
        "other": write(tmp_path / "other.jsonl", [{"kind": "other"}]),
        "notes": write(tmp_path / "notes.jsonl", [[1]]),
    }


def test_each_kind_gets_its_figure(files, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["plot", files["ppl"]]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'ppl.svg'}\n"
    assert main(["plot", files["ppl"], files["recall"], files["sparsity"], "--output", str(tmp_path / "all.svg")]) == 0
    names = ["all-accuracy.svg", "all-recall-map.svg", "all-recall-distance.svg", "all-attention.svg"]
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in names]
    for name in names:
        assert (tmp_path / name).read_text().rstrip().endswith("</svg>")
    assert main(["plot", files["recall"], "--figure", "recall-map", "--output", str(tmp_path / "map.png")]) == 0
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_shares_by_distance_are_those_of_all_tasks_together(tmp_path):
    """2 of 4 needles and 6 of 6 look-ups within 64 tokens are 80 %; copied tokens do not count."""
    pytest.importorskip("matplotlib")
    from alisa.lab.plot.recall_distance import draw_recall_distance, has_distances

    cell = CELL | {"kind": "recall", "policy": "swa", "sparsity": 0.8}
    records = [
        cell | {"task": "needle 256", "by_distance": [[64, 0.5, 4], [256, 0.0, 4]]},
        cell | {"task": "lookup 512", "by_distance": [[64, 1.0, 6]]},
        cell | {"task": "copy 256", "by_distance": [[64, 1.0, 48]]},
    ]
    figure = draw_recall_distance([record for record in records if has_distances(record)])
    (line,) = figure.axes[0].lines
    assert line.get_ydata().tolist() == [80.0, 0.0]


def test_the_same_records_give_the_same_file(files, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("one.svg", "two.svg"):
        assert main(["plot", files["ppl"], "--output", str(tmp_path / name)]) == 0
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{other}"], "No figure can be drawn from other; there is accuracy, recall-map"),
        (["{notes}"], "line 1: not a record of alisa"),
        (["none.jsonl"], "none.jsonl cannot be read"),
        (["{ppl}", "--figure", "pie"], "There is no figure 'pie'; there is accuracy"),
        (["{ppl}", "--output", "a.txt"], "must end in one of .svg, .png, .pdf"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(options, message, files, capsys):
    pytest.importorskip("matplotlib")
    assert main(["plot", *(option.format(**files) for option in options)]) == 2
    assert message in capsys.readouterr().err


def test_without_matplotlib_the_way_out_is_named(files, monkeypatch, capsys):
    real = builtins.__import__

    def refuse(name, *rest, **more):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert main(["plot", files["ppl"]]) == 2
    assert "pip install 'alisa[plot]'" in capsys.readouterr().err
