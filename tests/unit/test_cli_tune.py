"""`alisa tune` on the model inside the package, and what reads its file."""

import json
from dataclasses import asdict

import pytest

from alisa import LLM, SamplingParams
from alisa.cli import tune
from alisa.cli.main import main, parse
from alisa.cli.plan import Plan
from alisa.cli.tune import Choice, beside
from alisa.errors import InputError
from alisa.planner.presets import PRESETS
from alisa.planner.shapes import SHAPES
from alisa.policy.layer_budgets import STEPS, BudgetedModel, LayerBudget, LayerBudgets, load_layer_budgets
from alisa.policy.registry import POLICIES

SENTENCE = "It was a dark night, and the ship had been at sea for three weeks when the captain called all men. "


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(SENTENCE * 40)
    return path


def tuned(text, output, *more):
    sizes = ["--context", "96", "--prefill", "48", "--windows", "2", "--dtype", "float32"]
    return main(["tune", "--text", str(text), "--output", str(output), *sizes, *more])


def test_what_it_finds_is_read_by_the_engine(text, tmp_path, capsys, monkeypatch):
    path = tmp_path / "budgets.json"
    # Whatever the check says: this text is far too short to tell.
    monkeypatch.setattr(tune, "_pays", lambda gain: True)
    assert tuned(text, path, "--sparsity", "0.8,0.9", "--json") == 0
    out, err = capsys.readouterr()
    assert "shared out by" in err
    record = json.loads(out)
    budgets = load_layer_budgets(path)
    assert record["budgets"] == json.loads(path.read_text())["budgets"]
    assert [budget.sparsity for budget in budgets.budgets] == [0.8, 0.9]
    for budget in budgets.budgets:
        assert set(budget.layers) <= set(STEPS)
        assert sum(budget.layers) / len(budget.layers) >= budget.sparsity - 1e-9
    errors = budgets.found["errors"]
    assert [len(layer) for layer in errors] == [len(STEPS)] * len(budgets.budgets[0].layers)
    assert all(layer[0] > layer[-1] for layer in errors), "reading more errs less"
    assert budgets.found["reused"][0] == [None] * len(STEPS)
    assert all(0 < share < 1 for share in budgets.found["reused"][1])

    params = SamplingParams(max_tokens=8, ignore_eos=True)
    with LLM(sparsity=0.9, budgets=path, dtype="float32") as llm:
        assert llm.policy.budget.layers == budgets.budgets[1].layers
        shared = llm.generate([SENTENCE * 4], params)
    with LLM(sparsity=0.9, dtype="float32") as llm:
        equal = llm.generate([SENTENCE * 4], params)
    assert shared.report.summary.tokens_attended != equal.report.summary.tokens_attended


def test_equal_budgets_are_kept_where_nothing_is_better(text, tmp_path, capsys, monkeypatch):
    path = tmp_path / "budgets.json"
    monkeypatch.setattr(tune, "_pays", lambda gain: False)
    assert tuned(text, path, "--sparsity", "0.9") == 0
    assert "no way is better than equal budgets" in capsys.readouterr().err
    assert set(load_layer_budgets(path).budgets[0].layers) == {0.9}


def test_the_evaluations_run_with_and_without(text, tmp_path, capsys):
    path, cells = tmp_path / "budgets.json", tmp_path / "cells.jsonl"
    assert tuned(text, path, "--sparsity", "0.9", "--quiet") == 0
    values = json.loads(path.read_text())
    values["budgets"][0]["layers"] = [0.5, *values["budgets"][0]["layers"][1:]]
    path.write_text(json.dumps(values))
    sizes = ["--context", "96", "--prefill", "48", "--windows", "2", "--mode", "layerwise"]
    command = ["eval", "ppl", "--text", str(text), *sizes, "--policy", "sketch,local", "--sparsity", "0.8,0.9"]
    assert main([*command, "--budgets", str(path), "--output", str(cells), "--quiet"]) == 0
    assert "sketch, float32, budgets" in capsys.readouterr().out
    records = [json.loads(line) for line in cells.read_text().splitlines()]
    assert len(records) == 1 + 4 + 1
    [own] = [record for record in records if "layers" in record]
    assert (own["policy"], own["sparsity"], own["layers"][0]) == ("sketch", 0.9, 0.5)
    [equal] = [r for r in records if (r["policy"], r["sparsity"]) == ("sketch", 0.9) and "layers" not in r]
    assert own["read_share"] > equal["read_share"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--policy", "swa"], "--policy swa reads the same in all layers"),
        (["--sparsity", "0.3"], "--sparsity is 0.3, allowed is 0.5 to 0.995"),
        (["--windows", "0"], "--windows is 0"),
        (["--windows", "500"], "windows of 96 tokens, and 1000 are needed"),
    ],
)
def test_what_cannot_be_tuned_is_one_sentence(more, message, text, tmp_path, capsys):
    assert tuned(text, tmp_path / "budgets.json", *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "budgets.json").exists()


def test_budgets_lie_beside_the_model(tmp_path):
    file = tmp_path / "model.Q4_1.gguf"
    file.touch()
    assert beside(str(tmp_path)) == tmp_path / "alisa-budgets.json"
    assert beside(str(file)) == tmp_path / "model.Q4_1.alisa-budgets.json"
    for elsewhere in (None, "some/hub-id"):
        with pytest.raises(InputError, match="say where with --output FILE"):
            beside(elsewhere)


def test_plans_count_with_the_layer_that_reads_most(tmp_path):
    spec, path = SHAPES["opt-1.3b"], tmp_path / "budgets.json"
    record = LayerBudgets(
        model=BudgetedModel.of(spec),
        policy="sketch",
        edition=POLICIES["sketch"].edition,
        budgets=(LayerBudget(sparsity=0.9, layers=(0.7, *[0.95] * (spec.num_layers - 1))),),
        found={},
    )
    path.write_text(json.dumps(asdict(record)))
    hardware = PRESETS["v100-32gb"]
    [method] = Plan(shape="opt-1.3b", sparsity=0.9, kv_dtype="int8", budgets=path)._methods(hardware, spec, "float")
    assert sum(method.reads(1000)) == 300
    with pytest.raises(InputError, match=r"they are for a sparsity of 0\.9, not of 0\.8"):
        Plan(shape="opt-1.3b", budgets=path)._methods(hardware, spec, "float")


def test_a_choice_says_what_it_gained():
    divergence = {"equal": 0.02, "error": 0.01, "unread": 0.03}
    assert str(Choice(0.9, "error", (), divergence)) == (
        "sparsity 0.9: shared out by error, 0.01000 nats a token instead of 0.02000"
    )


def test_results_of_other_budgets_are_of_another_run(tmp_path):
    path, other = tmp_path / "budgets.json", tmp_path / "other.json"
    record = LayerBudgets(
        model=BudgetedModel.of(SHAPES["opt-1.3b"]),
        policy="sketch",
        edition=POLICIES["sketch"].edition,
        budgets=(LayerBudget(sparsity=0.9, layers=(0.9,) * SHAPES["opt-1.3b"].num_layers),),
        found={},
    )
    path.write_text(json.dumps(asdict(record)))
    other.write_text(path.read_text())
    digests = [parse(["generate", "a", "--budgets", str(each)]).digest() for each in (path, other)]
    path.write_text(path.read_text().replace("[0.9,", "[0.8,"))
    digests += [parse(["generate", "a", *words]).digest() for words in (["--budgets", str(path)], [])]
    assert digests[0] == digests[1]
    assert len({*digests}) == 3
