"""Experiments: what their files may say, what a job asks, what the floor counts, and what a comparison concludes."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from alisa.cli.main import main
from alisa.config import EngineConfig
from alisa.errors import InputError
from alisa.lab.bench import suite
from alisa.lab.bench.compare import pairs, ratio, read_runs, series_of
from alisa.lab.bench.engines import reading_of
from alisa.lab.bench.experiment import Workload, experiment_from, load_experiment
from alisa.lab.bench.floor import Speeds, floor_of, pass_rows
from alisa.lab.bench.others import wait_for_quiet
from alisa.lab.bench.remote import measured
from alisa.lab.bench.remote.measured import Clock, EngineJob, NoRoom
from alisa.lab.bench.session import RunSpec, run_batch, run_turns
from alisa.lab.bench.shapes import SHAPES
from alisa.lab.bench.suite import Places, prepare_workload
from alisa.lab.plot.runs import draw_runs
from alisa.model.loader import random_decoder
from alisa.records.jsonl import line_of
from tests.run_records import run_record

EXPERIMENTS = sorted((Path(__file__).parents[2] / "benchmarks" / "experiments").glob("*.toml"))
WORKLOAD = {"name": "w", "model": "llama-tiny", "batch": 2, "prompt_len": 8, "output_len": 4}
RUN = {"name": "r", "engine": "alisa"}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_of_the_project_is_one(path):
    experiment = load_experiment(path)
    cells = [measurement.cell for measurement in experiment.measurements()]
    assert len(set(cells)) == len(cells)
    assert all(workload.model in SHAPES or workload.model.endswith(".gguf") for workload in experiment.workloads)


def test_rounds_follow_each_other_and_names_choose():
    values = {"name": "x", "rounds": 2, "defaults": WORKLOAD}
    values["workload"] = [{"name": "a"}, {"name": "b", "batch": 3}]
    values["run"] = [RUN, {"name": "s", "engine": "vllm", "workloads": ["b"]}]
    experiment = experiment_from(values)

    def chosen(*only):
        return [(m.round, m.workload.name, m.run.name) for m in experiment.measurements(only)]

    first = [(0, "a", "r"), (0, "b", "r"), (0, "b", "s")]
    assert chosen() == first + [(1, *rest) for _, *rest in first]
    assert chosen("s") == [(0, "b", "s"), (1, "b", "s")]
    assert chosen("a", "r", "s") == [(0, "a", "r"), (1, "a", "r")]
    with pytest.raises(InputError, match="no run and no workload 'c'; there is a, b, r, s"):
        chosen("c")


def test_a_cell_is_the_work_and_not_its_name():
    def cell(workload=(), **run):
        values = {"name": "x", "workload": [WORKLOAD | dict(workload)], "run": [RUN | run]}
        return experiment_from(values).measurements()[0].cell

    assert cell() == cell({"name": "other", "timeout_s": 5}, name="other") != cell(policy="dense")
    assert len({cell(), cell({"kv_share": 0.5}), cell({"seed": 1}), cell({"batch": 3})}) == 4
    assert cell({"batch": 1}) != cell({"batch": 1, "turns": 2}) != cell({"batch": 1, "turns": 3})
    assert cell(policy="dense") == "0abfe5738321343c", "records from before there were turns are found again"


@pytest.mark.parametrize(
    ("workload", "run", "message"),
    [
        ({"prompts": "x.txt"}, {}, "needs either prompt_len or prompts"),
        ({"batch": 0}, {}, "batch is 0, it must be above 0"),
        ({"batch": "2"}, {}, "batch is '2'"),
        ({"sice": 2}, {}, "does not know sice"),
        ({"batch": 1, "turns": 0}, {}, "turns is 0, it must be above 0"),
        ({"turns": 3}, {}, "has turns: it needs batch = 1 and prompt_len, and no kv_share"),
        ({"batch": 1, "turns": 3, "kv_share": 0.5}, {}, "has turns: it needs batch = 1"),
        ({}, {"engine": "vlm"}, "there is no engine 'vlm', there is alisa, transformers"),
        ({}, {"engine": "vllm", "policy": "swa"}, "has no option 'policy', it has none"),
        ({}, {"engine": "transformers", "cache": "big"}, "cache of the engine transformers is 'big', there is dynamic"),
        ({}, {"policy": "swo"}, "policy is 'swo', there is dense"),
        ({}, {"sparsity": 1.5}, "sparsity is 1.5"),
        ({}, {"workloads": ["v"]}, "names the workload 'v'"),
    ],
)
def test_faults_of_an_experiment(tmp_path, workload, run, message):
    path = tmp_path / "x.toml"
    tables = {"workload": WORKLOAD | workload, "run": RUN | run}
    lines = ['name = "x"']
    for name, table in tables.items():
        lines += [f"[[{name}]]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match=message) as raised:
        load_experiment(path)
    assert str(raised.value).startswith(str(path))


def a_job(**changes):
    values = {"model": "", "shape": {}, "prompts": [[1, 2, 3], [4, 5], [6]], "output_len": 5, "batch": 2, "dtype": ""}
    values |= {"threads": 1, "seed": 0, "kv_token_bytes": 10, "kv_budget_bytes": None, "options": {}}
    return EngineJob(**(values | changes))


def test_batches_of_engines_that_cannot_join_and_leave():
    def groups(**changes):
        return [(start, len(prompts)) for start, prompts in a_job(**changes).groups()]

    assert groups() == [(0, 2), (2, 1)]
    assert groups(batch=8) == [(0, 3)]
    assert groups(kv_budget_bytes=139) == [(0, 1), (1, 1), (2, 1)]  # a sequence caches up to 7 tokens
    with pytest.raises(NoRoom, match="one sequence takes 70 bytes, the budget is 69"):
        groups(kv_budget_bytes=69)
    assert a_job().warm_up().prompts == [[3, 2, 1], [5, 4]]
    long = a_job(prompts=[[*range(5000)]], turns=True).warm_up()
    assert long.prompts == [[*range(4999, 3975, -1)]]
    assert a_job().longest == 3 + 5
    assert a_job(turns=True).longest == 6 + 3 * 5


def test_the_clock_keeps_prompts_out_of_the_steps():
    clock = Clock(2)
    clock.first(0)
    clock.step()
    clock.first(1)
    seen = list(clock.first_token_s)
    clock.step()
    clock.first(1)
    clock.stop()
    assert clock.first_token_s == seen
    assert not clock.prompts_first
    assert sum(clock.step_s) < clock.wall_s
    assert len(clock.step_quartiles_s) == 3
    talk = Clock(2)
    talk.first(0)
    time.sleep(0.02)
    talk.turn()
    talk.first(1)
    assert talk.first_token_s[1] < 0.02, "counted from its own turn"


def test_the_floor_counts_weights_rows_and_products():
    spec, prompts, output_len = SHAPES["llama-tiny"], [10, 20, 30], 5
    speeds = Speeds(read_bytes_per_s=1e9, decode_gemm_s=0.5, prefill_gemm_s=2.0)

    def floor(engine, **options):
        reading = reading_of(engine, options, "bfloat16", max(prompts) + output_len)
        return floor_of(spec, "bfloat16", reading, speeds, prompt_lens=prompts, output_len=output_len, batch=2)

    dense = floor("vllm")
    row_bytes = 2 * spec.kv_size * 2
    tokens = sum(length + step + 1 for length in prompts for step in range(4))
    assert dense.rows_s == pytest.approx(tokens * spec.num_layers * row_bytes / 1e9)
    assert dense.weights_s == pytest.approx(3 * 4 / 2 * spec.step_weight_bytes("bfloat16") / 1e9)
    assert dense.gemm_s == 3 * 4 / 2 * 0.5
    assert dense.prefill_s == 60 / pass_rows(prompts) * 2.0 == 2.0
    assert dense.wall_s == dense.gemm_s + dense.rows_s + dense.prefill_s
    assert floor("alisa", policy="dense").rows_s == dense.rows_s
    # Up to 16 earlier tokens are all read; then 20 % of them, rounded to two halves, and the new one.
    sparse = sum(n + 1 if n <= 16 else 2 * ((n + 5) // 10) + 1 for p in prompts for n in range(p, p + 4))
    assert floor("alisa", sparsity=0.8).rows_s == pytest.approx(dense.rows_s * sparse / tokens)
    assert speeds.fastest(Speeds(2e9, 0.6, 1.0)) == Speeds(2e9, 0.5, 1.0)
    assert floor("openvino", variant="int8").gemm_s is None
    assert floor("openvino", variant="int8").weights_s == dense.weights_s / 2
    assert floor("alisa", weight_dtype="int8").gemm_s is None, "those products were not measured"
    own = Speeds(1e9, 0.2, 1.0, "int8")
    reading = reading_of("alisa", {"weight_dtype": "int8"}, "bfloat16", max(prompts) + output_len)
    eight = floor_of(
        spec, "bfloat16", reading, own.reading(speeds), prompt_lens=prompts, output_len=output_len, batch=2
    )
    assert (eight.gemm_s, eight.prefill_s, eight.weights_s) == (3 * 4 / 2 * 0.2, 1.0, dense.weights_s / 2)
    # Five bits for each weight of the layers, eight for the head.
    head = spec.vocab_size * spec.token_embed_dim
    four = (5 / 8 * (spec.step_weights - head) + head) / (2 * spec.step_weights)
    assert floor("openvino", variant="int4").weights_s == pytest.approx(dense.weights_s * four)
    assert floor("llamacpp").weights_s == dense.weights_s
    assert floor("llamacpp", weights="q8_0").weights_s == dense.weights_s / 2
    assert reading_of("llamacpp", {}, "bfloat16", 9, stored="int4").weights == "int4", "the file as it is"
    said = floor_of(
        spec,
        "bfloat16",
        reading_of("vllm", {}, "bfloat16", 9),
        speeds,
        prompt_lens=prompts,
        output_len=5,
        batch=1,
        known=30,
    )
    assert said.prefill_s == dense.prefill_s / 2, "half of the prompts was said before"


def test_prompts_are_the_same_everywhere_and_fit(tmp_path):
    places = Places(tmp_path, tmp_path, tmp_path)
    workload = Workload(**WORKLOAD, kv_share=0.5)
    work = prepare_workload(workload, None, places, 1)
    again = prepare_workload(workload, None, places, 1)
    assert work.prompts == again.prompts
    assert work.prompt_lens == [8, 8]
    assert work.kv_need_bytes == 2 * 11 * 2 * (2 * 2 * 32 * 2)
    assert work.kv_budget_bytes == work.kv_need_bytes // 2
    ragged = replace(workload, prompt_len=None, prompts="x.txt", batch=1)
    work = prepare_workload(ragged, ("one", "two words and more"), places, 1)
    assert 0 < work.prompt_lens[0] < work.prompt_lens[1]
    assert work.kv_need_bytes == (work.prompt_lens[1] + 3) * 2 * (2 * 2 * 32 * 2)
    with pytest.raises(InputError, match=r"'w' is of x\.gguf, which is not there; `make models` fetches the real ones"):
        prepare_workload(replace(workload, model="x.gguf"), None, places, 1)
    with pytest.raises(InputError, match="has a sequence of 608 tokens, llama-tiny has 512 positions"):
        prepare_workload(replace(workload, output_len=600), None, places, 1)


def test_turns_of_a_conversation_begin_with_what_was_said(tmp_path):
    places = Places(tmp_path, tmp_path, tmp_path)
    workload = Workload(**(WORKLOAD | {"batch": 1}), turns=3)
    work = prepare_workload(workload, None, places, 1)
    assert [len(ids) for ids in work.prompts] == [8, 8, 8]
    assert len(set(work.prompts)) == 3
    assert work.prompt_lens == [8, 8 + 4 + 8, 8 + 4 + 8 + 4 + 8]
    assert work.known == (8 + 4) + 2 * (8 + 4)
    assert work.kv_need_bytes == (3 * 12 - 1) * 2 * (2 * 2 * 32 * 2)
    assert work.job({}).turns
    with pytest.raises(InputError, match="has a sequence of 516 tokens"):
        prepare_workload(replace(workload, turns=43), None, places, 1)


def test_a_conversation_is_that_of_single_prompts():
    """Over the prefix cache, what each turn says is what the whole prompt says without one."""
    decoder = random_decoder(SHAPES["llama-tiny"], torch.float32, torch.device("cpu"))
    run_spec = RunSpec(EngineConfig(policy="dense", kv_disk_memory=0, max_num_seqs=1, max_model_len=160))
    turns = [[7 + number] * 40 for number in range(3)]
    firsts, handed = [], []
    spoken = run_turns(decoder, run_spec, turns, 6, on_turn=lambda: handed.append(len(firsts)), on_first=firsts.append)
    assert (firsts, handed) == ([0, 1, 2], [0, 1, 2])
    said = []
    for ids, answer in zip(turns, spoken.outputs, strict=True):
        said += ids
        [alone] = run_batch(decoder, run_spec, [said], 6).outputs
        assert alone == answer
        said += answer
    found = [record.cached_tokens for record in spoken.records if record.cached_tokens]
    assert found == [32, 80], "the whole blocks of the prompts before"


def test_waiting_for_a_quiet_machine_ends():
    assert wait_for_quiet(0.05, look_s=0.03) >= 0


def test_time_of_a_process_below_that_still_runs_is_not_that_of_others():
    spin = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) as child:
        child.stdout.read(1)
        assert child.pid in measured._descendants(os.getpid())
        assert measured._ticks(child.pid) >= 0.25 * os.sysconf("SC_CLK_TCK")
        child.kill()
    clock = Clock(1)
    clock.first(0)
    clock.stop()
    assert 0 <= clock.others_share <= 1


def a_record(run, rates, workload="w", others=0.0):
    return [
        run_record(run, rate=rate, wall_s=100 / rate, workload=workload, others_share=others, cell=f"{run} {number}")
        for number, rate in enumerate(rates)
    ]


def write(path, records):
    path.write_bytes(b"".join(line_of(record.line()) for record in records))


FAILED = run_record("f", status="failed", reason="why")


def test_ratios_say_whether_they_are_more_than_chance():
    records = a_record("a", [10, 11, 12]) + a_record("b", [20, 21, 29]) + a_record("c", [9, 11.5, 30])
    a, b, c = series_of(records)["w"]
    assert ratio(b, a).value == 21 / 11
    assert ratio(b, a).certain is True
    assert ratio(a, b).certain is True
    assert ratio(c, a).certain is False
    [once] = series_of(a_record("d", [40, 41]))["w"]
    assert ratio(once, a).certain is None
    assert a.floor_share == pytest.approx(11 / 100)
    assert [base.run for _, base in pairs([FAILED, *records], None)["w"]] == ["a"] * 4
    assert [base and base.run for _, base in pairs(records, a_record("b", [5]))["w"]] == [None, "b", None]


def test_comparison_and_figure_of_files(tmp_path, capsys):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    records = [*a_record("a", [10, 11, 12]), *a_record("b", [20, 22, 24], others=0.2), FAILED]
    write(first, records)
    write(second, a_record("b", [10, 11, 12]))
    assert main(["bench", "compare", str(first)]) == 0
    out, err = capsys.readouterr()
    assert "2.00x" in {word for line in out.splitlines() if line.endswith("x  ") for word in line.split()}
    assert "f failed: why" in out
    assert "b *" in out
    assert "not to be relied on" in err
    assert main(["bench", "compare", str(first), str(second)]) == 0
    assert "2.00x" in capsys.readouterr().out
    assert main(["bench", "plot", str(first), "--output", str(tmp_path / "x.svg")]) == 0
    assert "tokens per second" in (tmp_path / "x.svg").read_text()
    panel = draw_runs(records).axes[0]
    assert [bar.get_width() for bar in panel.patches] == [11, 22]
    second.write_text('{"kind": "ppl", "cell": 1}\n')
    assert main(["bench", "compare", str(second)]) == 2
    assert "line 1: not a record of alisa bench run" in capsys.readouterr().err


DRIVER = """
import sys
from measured import Clock, EngineJob, finish, unavailable
job = EngineJob.read()
if job.options["cache"] == "static":
    sys.exit("TypeError: no such cache")
if job.options["cache"] == "offloaded":
    unavailable("no GPU")
else:
    clock = Clock(len(job.prompts))
    for index in range(len(job.prompts)):
        clock.first(index)
    clock.stop()
    finish(job, clock, packages=[], num_output=len(job.prompts) * job.output_len, notes=[str(job.kv_budget_bytes)])
"""


def test_an_experiment_from_its_file_to_its_records(tmp_path, capsys, monkeypatch):
    measured, measure_once = [], cache(suite.measure_floor)

    def floor_once(work, weight_dtype="float"):
        measured.append(work.workload.name)
        return measure_once(work, weight_dtype)

    monkeypatch.setattr(suite, "measure_floor", floor_once)
    (tmp_path / "transformers_engine.py").write_text(DRIVER)
    python = tmp_path / "transformers" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    tables = ["[[workload]]", *(f"{key} = {json.dumps(value)}" for key, value in WORKLOAD.items()), "kv_share = 0.5"]
    tables += ["[[run]]", 'name = "ours"', 'engine = "alisa"', "sparsity = 0.5", "prefetch = false"]
    for name in ("dynamic", "static", "offloaded"):
        tables += ["[[run]]", f'name = "{name}"', 'engine = "transformers"', f'cache = "{name}"']
    tables += ["[[run]]", 'name = "gone"', 'engine = "vllm"', "[[run]]", 'name = "gpu"', 'engine = "flexgen"']
    path, output = tmp_path / "x.toml", tmp_path / "x.jsonl"
    path.write_text("\n".join(['name = "x"', *tables]))
    folders = ["--drivers", str(tmp_path), "--environments", str(tmp_path), "--models", str(tmp_path)]
    words = ["bench", "run", str(path), "--output", str(output), "--resume", "--patience", "0", "--threads", "1"]
    assert main([*words, *folders]) == 0
    told = capsys.readouterr().err
    assert "[6/6] w, gpu: unavailable: FlexGen" in told
    assert measured == ["w"] * 3, "before, and after each that ran"
    records = {record.run: record for record in read_runs(output)}
    statuses = {"ours": "ran", "dynamic": "ran", "static": "failed", "offloaded": "unavailable", "gone": "missing"}
    assert {run: records[run].status for run in statuses} == statuses
    assert records["static"].reason == "exit status 1: TypeError: no such cache"
    assert records["gone"].reason.endswith("make peer-vllm")
    ours = records["ours"]
    assert ours.notes[0] == "bfloat16 weights, bfloat16 KV rows"
    assert ours.notes[-1] == "no prefetching"
    assert ours.details["kv_peak_bytes"] <= ours.kv_budget_bytes == ours.kv_need_bytes // 2
    assert ours.details["stored_rows"] > 0
    assert records["dynamic"].notes == (str(ours.kv_budget_bytes),)
    assert ours.figures.tokens_per_s == pytest.approx(8 / ours.figures.wall_s)
    assert ours.floor.wall_s == ours.floor.prefill_s + ours.floor.decode_s
    assert ours.stamp.num_threads == 1
    # What ran or cannot run is not tried again; what failed, or was missing, is.
    assert main([*words, *folders, "--only", "dynamic", "static", "gone"]) == 0
    told = capsys.readouterr().err
    assert "[2/2] w, gone: missing" in told
    assert "dynamic" not in told


def test_prompts_from_a_variable_that_is_not_set(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("ALISA_PROMPTS", raising=False)
    ragged = next(path for path in EXPERIMENTS if path.stem == "ragged")
    assert main(["bench", "run", str(ragged), "--models", str(tmp_path)]) == 2
    assert "reads its prompts from $ALISA_PROMPTS; set that environment variable." in capsys.readouterr().err
    assert main(["bench", "run", str(ragged), "--resume"]) == 2
    assert "--resume needs the --output file" in capsys.readouterr().err
