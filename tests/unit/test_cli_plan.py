import json
from dataclasses import asdict, fields, replace

import pytest

from alisa.cli.main import main
from alisa.cli.plan import Plan
from alisa.cli.plan_modes import ModeQuestion
from alisa.config import EngineConfig
from alisa.planner.presets import PRESETS
from alisa.planner.saved import save_profile
from alisa.scheduler.placement.file import load_schedule
from tests.tiny_models import build, config_of

GPU = ("--shape", "opt-13b", "--hardware", "h200")


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
        ((*GPU, "--max-num-seqs", "0"), "--max-num-seqs is 0"),
        ((*GPU, "--exact", "--policy", "swa"), "cannot forget"),
        ((*GPU, "--exact", "--num-speculative-tokens", "0"), "num_speculative_tokens is 0"),
        ((*GPU, "--exact", "--sparse-prompts", "0.03"), "leave one out"),
        ((*GPU, "--exact", "--draft-acceptance", "1.5"), "--draft-acceptance is 1.5"),
        ((*GPU, "--draft-acceptance", "0.5"), "give --exact or --speculative lookup"),
        ((*GPU, "--sparse-prompts", "0.03"), "a GPU reads prompts densely"),
        ((*GPU, "--sparse-prompts", "1"), "sparse_prompts is 1"),
        ((*GPU, "--sparse-share", "0.5"), "give --sparse-prompts, too"),
        ((*GPU, "--kv-host-memory", "much"), "not a memory size"),
        ((*GPU, "--schedule", "nowhere.json"), "nowhere.json"),
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
    status, record, _ = plan(capsys, "--shape", "opt-125m", "--kv-device-memory", "100MiB", "--kv-host-memory", "1GiB")
    assert status == 0
    assert record["device_kv_bytes"] <= 100 * 2**20


@pytest.mark.parametrize(
    ("below", "cap", "other"), [("host", "host", "disk"), ("disk", "disk", "host")], ids=["GPU", "CPU"]
)
def test_the_cap_below_is_that_of_the_tier_that_the_machine_has(capsys, tmp_path, below, cap, other):
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(asdict(replace(PRESETS["v100-32gb"], below=below))))
    work = ("--shape", "opt-13b", "--hardware", str(path), "--policy", "swa", "--batch", "64")
    ample = plan(capsys, *work)[1]
    capped = plan(capsys, *work, f"--kv-{cap}-memory", "0")[1]
    ignored = plan(capsys, *work, f"--kv-{other}-memory", "0")[1]
    assert max(row["below_bytes"] for row in ample["memory"]) > 0
    assert max(row["below_bytes"] for row in capped["memory"]) == 0
    assert ignored["schedule"] == ample["schedule"]


def test_a_plan_takes_the_engines_options_by_their_names():
    """But those of a run's own housekeeping, which change nothing that is planned."""
    names = {field.name for group in (Plan, ModeQuestion) for field in fields(group)}
    assert {field.name for field in fields(EngineConfig)} - names == {
        "device",
        "fair",
        "kv_disk_path",
        "max_model_len",
        "max_step_tokens",
        "prefill_chunk",
        "prefix_cache",
        "prefix_cache_disk",
        "prefix_cache_disk_memory",
        "prefix_cache_memory",
        "schedule_policy",
    }


LLAMA = ("--shape", "llama-7b", "--hardware", "h100-80gb", "--batch", "64", "--prompt-len", "1024")


def test_drafts_are_planned_where_they_pay_and_refused_where_they_cannot(capsys, tmp_path):
    path = tmp_path / "schedule.json"
    exact = (*LLAMA, "--policy", "streaming", "--sparsity", "0.9", "--exact")
    status, record, err = plan(capsys, *exact, "--save", str(path))
    drafts, said = record["drafts"], " ".join(err.split())
    assert status == 0
    assert (drafts["source"], drafts["acceptance"], drafts["most"]) == ("policy", 0.87, 8)
    assert drafts["factor"] > 1.1
    assert drafts["tokens_per_step"] > 2
    assert record["decode"]["total_s"] == pytest.approx(drafts["drafting_s"] + drafts["verifying_s"])
    assert "streaming makes them up" in said
    assert f"they pay if {drafts['pays_from']:.0%} are right" in said
    assert "--exact --num-speculative-tokens 8 --kv-dtype float16" in said
    unlucky = plan(capsys, *exact, "--draft-acceptance", "0.1")
    assert unlucky[1]["drafts"]["factor"] == 1
    assert "they do not pay" in " ".join(unlucky[2].split())
    few = plan(capsys, *exact, "--num-speculative-tokens", "1")[1]["drafts"]
    assert few["tokens_per_step"] == pytest.approx(1.87)
    never = plan(capsys, "--shape", "opt-125m", "--hardware", "h200", "--batch", "1", "--exact")
    assert never[1]["drafts"]["pays_from"] is None
    assert "they cannot pay" in " ".join(never[2].split())


def test_drafts_from_the_text_are_planned_by_what_prose_gave(capsys):
    options = (*LLAMA, "--policy", "dense", "--speculative", "lookup")
    prose, copied = (plan(capsys, *options, *more)[1] for more in ((), ("--draft-acceptance", "0.62")))
    assert prose["drafts"]["acceptance"] == 0.08
    assert prose["drafts"]["drafting_s"] == 0
    assert copied["drafts"]["factor"] > 1.5 > prose["drafts"]["factor"] >= 1
    assert copied["seconds"] < prose["seconds"]
    assert plan(capsys, *LLAMA)[1]["drafts"] is None


@pytest.fixture
def long_model(tmp_path):
    """A machine and a model that read prompts of more than 2048 tokens."""
    machine, model = tmp_path / "cpu.json", tmp_path / "model"
    machine.write_text(json.dumps(asdict(replace(PRESETS["h200"], below="disk"))))
    config = config_of("llama-gqa-tied")
    config.max_position_embeddings = 20000
    config.save_pretrained(model)
    return ("--model", str(model), "--hardware", str(machine), "--output-len", "16", "--batch", "2")


def test_prompts_that_are_read_sparsely_take_less(capsys, long_model):
    long = (*long_model, "--prompt-len", "8192")
    dense, sparse, half, told = (
        plan(capsys, *long, *more)
        for more in (
            (),
            ("--sparse-prompts", "0.03"),
            ("--sparse-prompts", "0.5", "--sparse-share", "0.25"),
            ("--sparse-prompts", "0"),
        )
    )
    assert dense[1]["sparse_prompts"] is None
    found = sparse[1]["sparse_prompts"]
    assert found["share"] == pytest.approx(0.49, abs=0.02)
    assert sparse[1]["prefill"]["attention_s"] + found["saved_s"] == pytest.approx(dense[1]["prefill"]["attention_s"])
    assert half[1]["prefill"]["attention_s"] < sparse[1]["prefill"]["attention_s"]
    assert told[1]["sparse_prompts"]["share"] == 1
    assert "44% of the attention after 2048 tokens is taken to be left" in " ".join(sparse[2].split())
    short = plan(capsys, *long_model, "--prompt-len", "2000", "--sparse-prompts", "0.03")
    assert "read densely" in short[2]
    assert short[1]["sparse_prompts"]["saved_s"] == 0


def test_a_given_schedule_is_priced_as_it_is(capsys, tmp_path):
    path = tmp_path / "static.json"
    path.write_text('{"schedule": "static", "offload_ratio": 0.5}')
    given, best = (plan(capsys, *LLAMA, *more) for more in (("--schedule", str(path)), ()))
    assert given[1]["schedule"] == {"schedule": "static", "offload_ratio": 0.5}
    assert given[1]["seconds"] >= best[1]["seconds"]
    assert "that was given" in given[2]


def test_no_more_prompts_run_together_than_are_allowed(capsys):
    few = plan(capsys, *LLAMA, "--max-num-seqs", "10")[1]
    assert (few["together"], few["waves"]) == (10, 7)
    assert plan(capsys, *LLAMA, "--max-num-seqs", "100")[1]["together"] == 64


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
