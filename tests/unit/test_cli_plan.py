import json
from dataclasses import replace

import pytest

from alisa.cli.main import main
from alisa.planner.presets import PRESETS
from alisa.planner.saved import save_profile
from alisa.scheduler.placement.file import load_schedule
from tests.tiny_models import build, config_of


def plan(capsys, *options):
    status = main(["plan", *options, "--json"])
    out, err = capsys.readouterr()
    return status, json.loads(out.splitlines()[-1]) if status == 0 else {}, err


def test_a_plan_from_a_shape(capsys, tmp_path):
    path = tmp_path / "schedule.json"
    options = ("--shape", "opt-13b", "--policy", "swa", "--hardware", "v100-32gb", "--batch", "64", "--save", str(path))
    status, record, err = plan(capsys, *options)
    assert status == 0
    assert record["fits"]
    assert record["bytes"]["kv_token"] == 800 * 1024
    assert 0 < record["offload_from"] < 512
    assert record["memory"][-1]["below_bytes"] > 0
    assert {"all-device", "static split (FlexGen-like)"} <= {other["name"] for other in record["baselines"]}
    assert "beta = 0" in " ".join(record["notes"])
    assert load_schedule(path).name == record["schedule"]["schedule"]
    assert "static split" in err
    use = f"alisa generate --policy swa --sparsity 0.8 --kv-dtype int8 --max-num-seqs 64 --schedule {path}"
    assert use in " ".join(err.split())


def test_a_plan_from_a_config(capsys, tmp_path):
    config_of("opt").save_pretrained(tmp_path)  # no weights
    options = ("--model", str(tmp_path), "--hardware", "h200", "--prompt-len", "30", "--output-len", "60")
    status, record, _ = plan(capsys, *options)
    assert status == 0
    assert record["schedule"] == {"schedule": "all-device"}
    assert record["offload_from"] is None


def test_work_that_does_not_fit_is_an_answer(capsys):
    status, record, err = plan(capsys, "--shape", "opt-30b", "--hardware", "v100-16gb")
    assert status == 0
    assert not record["fits"]
    assert "neither" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "either --model"),
        (("--shape", "opt-13b", "--model", "x"), "either --model"),
        (("--shape", "opt-14b", "--hardware", "h200"), "no shape 'opt-14b'"),
        (("--shape", "opt-13b", "--hardware", "b300"), "no machine 'b300'"),
        (("--shape", "opt-13b", "--hardware", "h200", "--batch", "0"), "--batch is 0"),
        (("--shape", "opt-13b", "--hardware", "h200", "--sparsity", "1"), "--sparsity is 1"),
        (("--shape", "opt-13b", "--hardware", "h200", "--prompt-len", "2000"), "2048 positions"),
        (("--shape", "opt-13b", "--hardware", "h200", "--dtype", "float64"), "no figures for float64"),
        (("--shape", "opt-13b", "--hardware", "h200", "--weight-dtype", "int8"), "no figures for int8 weights"),
        (("--shape", "opt-13b"), "alisa profile"),
    ],
)
def test_bad_options_end_in_one_sentence(capsys, options, message, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    status, _, err = plan(capsys, *options)
    assert status == 2
    assert message in err


def test_this_machine_is_what_the_profile_says(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    save_profile(PRESETS["h200"], "2026-01-01")
    status, record, _ = plan(capsys, "--shape", "opt-125m", "--kv-device-memory", "100MiB", "--kv-below-memory", "1GiB")
    assert status == 0
    assert record["device_kv_bytes"] <= 100 * 2**20


@pytest.mark.parametrize(
    ("kind", "asked", "planned"),
    [("Q4_1", "auto", "int4"), ("Q4_1", "float", "bfloat16"), ("Q8_0", "auto", "bfloat16"), ("Q4_1", "int8", "int8")],
)
def test_weights_of_a_file_in_4_bits_stay_so(capsys, monkeypatch, tmp_path, kind, asked, planned):
    gguf_files = pytest.importorskip("tests.gguf_files", reason="the gguf package writes the file")
    path = gguf_files.write_model(tmp_path / "x.gguf", build("llama-gqa-tied"), kind)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine = PRESETS["h200"]
    products = dict.fromkeys(("bfloat16", "int8", "int4"), machine.gemm["bfloat16"])
    cpu = replace(machine, gemm=products)
    save_profile(cpu, "2026-01-01")
    options = ["--model", str(path), "--prompt-len", "30", "--output-len", "60", "--save", str(tmp_path / "s.json")]
    options += [] if asked == "auto" else ["--weight-dtype", asked]
    status, record, err = plan(capsys, *options)
    assert status == 0
    assert record["weight_dtype"] == planned
    assert ("--weight-dtype" in err) == (asked != "auto"), "alisa generate chooses as the plan does"


def test_a_machine_without_products_in_4_bits_has_floats(capsys, tmp_path):
    gguf_files = pytest.importorskip("tests.gguf_files", reason="the gguf package writes the file")
    path = gguf_files.write_model(tmp_path / "x.gguf", build("llama-gqa-tied"), "Q4_1")
    options = ("--model", str(path), "--prompt-len", "30", "--output-len", "60", "--hardware", "h200")
    status, record, _ = plan(capsys, *options)
    assert status == 0
    assert record["weight_dtype"] == next(iter(PRESETS["h200"].gemm))
