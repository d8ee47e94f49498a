"""The documents' figures: there is a table where there are records, none where there are none, and staleness shows."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tables
from provenance import provenance
from table_blocks import engines, kernels, machine
from tables import BLOCKS, filled

from alisa.lab.bench.compare import with_best_floors
from alisa.records.jsonl import line_of
from alisa.records.schema import Floor
from tests.run_records import STAMP, run_record

FLOOR = Floor(1.0, 2.0, 5.0, 1.0, 3e10)


def record(run, *, others=0.0, date="2026-01-01T00:00", cell=None, floor=FLOOR, **more):
    stamp = replace(STAMP, date=date)
    return run_record(run, others_share=others, cell=cell or run, stamp=stamp, floor=floor, **more)


def write_runs(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(line_of(record.line()) for record in records))


def write(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_nothing_stands_where_nothing_was_measured(tmp_path):
    for name, block in BLOCKS.items():
        assert block(tmp_path) == "", name
    text = "a\n<!-- benchmarks: all -->\nold 12.3\n<!-- end -->\nb\n"
    assert filled(text, tmp_path) == "a\n<!-- benchmarks: all -->\n<!-- end -->\nb\n"
    with pytest.raises(KeyError, match="none"):
        filled(text.replace("all", "none"), tmp_path)


def test_engines_side_by_side(tmp_path):
    failed = record("gone", status="failed", reason="why")
    again = record("ours", rate=123.4, others=0.3, date="2026-02-01T00:00")
    write_runs(tmp_path / "runs" / "a.jsonl", [again, record("other", rate=20.0), failed])
    write_runs(tmp_path / "runs" / "b.jsonl", [record("ours", rate=1.0)])  # an older record of the same cell
    text = engines("paper")(tmp_path)
    assert text.splitlines()[4:6] == [
        "| **ours** \\* | 123 |  | 1.23 s | 3.0 GiB | 80 % |",
        "| other | 20.0 |  | 1.23 s | 3.0 GiB | 80 % |",
    ]
    assert "K and V capped at 0.2 GiB of 1.0 GiB" in text
    assert "No figures: gone: why." in text
    assert "\\* Other programs took up to 30 % of the processors" in text
    assert "`alisa bench run benchmarks/experiments/paper.toml" in text
    assert "Measured 2026-01-01 to 2026-02-01 on 2 threads of CPU X." in text
    assert engines("paper", "v")(tmp_path) == engines("llama")(tmp_path) == ""
    assert machine(tmp_path) == (
        "Measured on 2 threads of CPU X, torch 2.13, 2026-01-01 to 2026-02-01; memory is read at 30 to 30 GB/s. "
        "Weights are random."
    )


def test_a_table_of_several_machines_says_whose_lines_are_whose():
    new = {"date": "2026-03-01T00:00", "commit": "1f-dirty", "num_threads": 4, "cpu": "Y"}
    old = new | {"date": "2026-01-02T00:00", "commit": None, "cpu": "X"}
    assert provenance([("a", new)]) == "Measured 2026-03-01 at 1f on 4 threads of Y."
    assert provenance([("a", new), ("b", old), ("a", old | {"date": "2026-01-03T00:00"}), ("c", None)]) == (
        "Measured 2026-03-01 at 1f on 4 threads of Y (a). Measured 2026-01-02 to 2026-01-03 on 4 threads of X (b, a). "
        "Machine and commit were not recorded (c)."
    )


def test_floors_of_one_machine_do_not_price_those_of_another():
    fast = record("ours", floor=replace(FLOOR, gemm_s=1.0))
    slow = record("other")
    slow = replace(slow, stamp=replace(slow.stamp, cpu="CPU Y"))
    assert [found.floor.gemm_s for found in with_best_floors([fast, slow])] == [1.0, 5.0]
    assert [found.floor.gemm_s for found in with_best_floors([fast, record("other")])] == [1.0, 1.0]


def test_llama_cpp_stands_beside_the_formats_that_a_file_is_loaded_in(tmp_path):
    stamp = {"date": "2026-03-01T00:00", "commit": "1f", "num_threads": 2, "cpu": "Y"}
    common = {"model": "x.gguf", "file_bytes": 9, "all_s": 0.5, "rss_before": 2**20, "rss_peak": 2**21, "stamp": stamp}
    ours = common | {"weights": "int4", "header_s": 0.1, "tokenizer_s": 0.15, "weights_s": 0.25, "weight_bytes": 2**22}
    theirs = common | {"weights": "llama.cpp", "version": "0.3", "all_s": 0.25, "weight_bytes": 2**21}
    write(tmp_path / "loading.jsonl", [ours | {"gguf_package_header_s": 1.7}, theirs])
    rows = BLOCKS["loading"](tmp_path).splitlines()[2:]
    assert rows[:2] == [
        "| `x.gguf` | int4 | 0.10 | 0.15 | 0.25 | 0.50 | 4 | 1 | 2 | 1.7 |",
        "| `x.gguf` | llama.cpp (0.3) |  |  |  | 0.25 | 2 | 1 | 2 |  |",
    ]
    assert rows[-1] == "Measured 2026-03-01 at 1f on 2 threads of Y."


def test_one_user_with_floats_is_one_line_under_either_name(tmp_path):
    found = {
        "model": "x.gguf",
        "kv_dtype": "auto",
        "policy": "dense",
        "prompt_len": 16,
        "prefill_s": 1.0,
        "floor_s": 0.1,
    }
    times = {"auto": 0.4, "float": 0.2}
    write(
        tmp_path / "one_user.jsonl",
        [found | {"weight_dtype": name, "step_s": {"median": s, "all": [s]}} for name, s in times.items()],
    )
    rows = BLOCKS["one-user"](tmp_path).splitlines()[4:5]
    assert rows == ["| bfloat16 | bfloat16 | `dense` | 16 | 5 (5 to 5) | 50 % | 16 |"]


def test_kernels(tmp_path):
    timing = {"role": "kernel", "median_s": 0.0123, "low_s": 0.012, "high_s": 0.013}
    case = {"case": "bf16-20", "others_share": 0.2, "kernel_bytes_per_s": 2e10, "bandwidth_share": 0.75}
    case |= {"speedup": {"dense": 5.0, "gather": None, "reference": 7.0}, "timings": {"kernel": timing}}
    write(tmp_path / "kernels.jsonl", [{"isa": "avx2", "cases": [case]}])
    expected = "| bf16-20 (avx2) \\* | 12.3 (12 to 13) | 20.0 | 75 % | 5.0x |  | 7.0x |"
    assert expected in kernels(tmp_path).splitlines()


def test_a_document_that_says_something_else_is_noticed(tmp_path):
    (tmp_path / "results").mkdir()
    write_runs(tmp_path / "results" / "runs" / "a.jsonl", [record("ours")])
    page = tmp_path / "page.md"
    page.write_text("<!-- benchmarks: all -->\n<!-- end -->\n")

    def run(word):
        command = [sys.executable, str(Path(tables.__file__)), word, "--results", str(tmp_path / "results"), str(page)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    status, told = run("--check")
    assert status == 1
    assert "is not what the records say" in told
    assert run("--write") == (0, "")
    assert "## The paper's workload" in page.read_text()
    assert run("--check") == (0, "")
    page.write_text(page.read_text().replace("10.0", "11.0"))
    assert run("--check")[0] == 1


def test_a_fleet_has_the_newest_record_of_each_kind(tmp_path):
    stamp = {"num_cpus": 2.0, "cpu": "C", "date": "2026-01-02T03:04"}
    old = {
        "kind": "fleet-driver",
        "num_prompts": 1,
        "read_prompt_s": 1.0,
        "merge_result_s": 1.0,
        "dispatch_s": {"2": 1.0},
    }
    driver = old | {"read_prompt_s": 5.4e-5, "merge_result_s": 2e-5, "dispatch_s": {"2": 7e-4, "16": 1.6e-3}}
    ways = {"plain_start_s": 3.0, "plain_s": 300.0, "ray_start_s": 9.0, "ray_s": 306.0, "overhead": 0.02}
    overhead = {"kind": "fleet-overhead", "num_prompts": 10, "max_tokens": 64, "same_tokens": True, **ways}
    answer = {"replicas": 1000, "seconds": 7200.0, "efficiency": 0.5, "driver_share": 0.1, "storage_share": 0.2}
    answer |= {"store_bytes": 46 * 10**6, "bottleneck": "loading weights"}
    plan = {"kind": "fleet-plan", "model": "M", "hardware": "H", "batch": 1, "prompt_len": 2, "output_len": 3}
    plan["fleets"] = {"10000000": [answer], "1000000000": [answer]}
    records = [old, driver, overhead, plan]
    write(tmp_path / "fleet.jsonl", [{"stamp": stamp, "others_cpu_share": 0.25} | record for record in records])
    text = BLOCKS["fleet-driver"](tmp_path)
    assert "counted | 54 µs |" in text
    assert "0.7 ms with 2, 1.6 ms with 16" in text
    text = BLOCKS["fleet-overhead"](tmp_path)
    assert "| `--ray local --replicas 1` | 9.00 s | 306 s |" in text
    assert "+2.0 % of time" in text
    text = BLOCKS["fleet-saturation"](tmp_path)
    assert "| 10 million | 1,000 | 2.0 | 50 % | 10 % | 20 % | 46 MB | loading weights |" in text
    assert "| 1 billion |" in text


def test_rules_for_prompts_have_errors_of_several_windows_and_no_divergence_where_it_was_not_measured(tmp_path):
    common = {"model": "m", "text": "test.txt", "context": 4096, "windows": 1, "chosen": 0.5, "left_out": 0.01}
    flash = common | {"rule": "flash", "parameter": 0.1, "products": 0.8}
    run = {"kl": 0.004, "kl_error": None, "kl_most": 0.5, "lost": 0.01, "lost_error": None}
    exact = common | {"rule": "exact", "parameter": 0.95, "kl": 0.001, "windows": 2, "kl_error": 0.0001}
    exact |= {"lost": -0.002, "lost_error": 0.001, "products": 0.7}
    means = common | {"rule": "means64", "parameter": 0.98, "products": 0.9}
    write(tmp_path / "sparse_prefill.jsonl", [flash | run | {"kl": 0.9}, flash | run, exact, means, flash])
    assert tables.BLOCKS["accuracy-sparse-prefill"](tmp_path).splitlines()[2:] == [
        "| m | WikiText-2, 1 x 4096 | `means64` 0.98 | 1.0 % |  |  |  | 50 % | 90 % | 1.11x |",
        "| m | WikiText-2, 1 x 4096 | `flash` 0.1 | 1.0 % | 4.00 | 500 | 1.00 | 50 % | 80 % | 1.25x |",
        "| m | WikiText-2, 2 x 4096 | `exact` 0.95 | 1.0 % | 1.00 ± 0.10 |  | -0.20 ± 0.10 | 50 % | 70 % |  |",
    ]


def test_what_sparse_prompts_save_and_lose(tmp_path):
    common = {"model": "m-1", "context": 4096, "alpha": 0.03}
    time = common | {"kind": "sparse-prompts-time", "dense_cpu_s": 12.0, "sparse_cpu_s": 10.0}
    loss = common | {"kind": "sparse-prompts-loss", "text": "test.txt", "windows": 1, "read": 0.7, "perplexity": 16.4}
    loss |= {"lost": 0.001, "lost_error": None}
    recall = common | {"kind": "sparse-prompts-recall", "task": "needle 4096 asked", "texts": 5, "read": 0.6}
    recall |= {"dense": 1.0, "sparse": 0.8}
    write(tmp_path / "sparse_prompts.jsonl", [time | {"dense_cpu_s": 1.0}, loss, recall, time])
    assert tables.BLOCKS["accuracy-sparse-prompts-time"](tmp_path).splitlines()[2:] == [
        "| m | 4096 | 0.03 | 12.0 s | 10.0 s | 1.20x |"
    ]
    assert tables.BLOCKS["accuracy-sparse-prompts-loss"](tmp_path).splitlines()[2:] == [
        "| m | WikiText-2, 1 x 4096 | 0.03 | 70 % | perplexity 16.40 | 0.10 % |",
        "| m | needle 4096 asked, 5 texts | 0.03 | 60 % | 100 % recalled | 20 points |",
    ]


def test_what_the_server_costs(tmp_path):
    figures = {"alone_tokens_per_s": 300.0, "served_tokens_per_s": 294.0, "overhead": 0.021, "served_cpu_us": 6000.0}
    figures |= {"loop_cpu_us": 40.0, "lag_p50_ms": 0.2, "lag_p99_ms": 9.0, "clients": 16, "prompt_len": 64}
    record = {"model": "m", "output_len": 128, "rounds": [{}, {}], **figures}
    new = record | {"clients_cpu_us": 20.0}
    write(tmp_path / "server_overhead.jsonl", [new | {"overhead": 0.5}, new, record | {"overhead": 0.6}])
    text = BLOCKS["server-overhead"](tmp_path)
    assert text.startswith("16 clients, prompts of 64 tokens, 128 tokens of output, 2 rounds")
    assert text.endswith(
        "| `m` | 300 tokens/s | 294 tokens/s | 2.1 % | 6000 us | 40.0 us | 20.0 us | 0.2 ms | 9.0 ms |"
    )


def test_what_an_order_lets_in_at_equal_latency(tmp_path):
    def result(order, load, normalised):
        tail = {"fcfs": 150.0, "hrrn": 200.4}[order]
        return {"latency_p99_s": tail, "load": load, "order": order, "normalised_s": normalised}

    record = {"order": ["fcfs", "hrrn"], "load": [0.5, 1.0, 1.5], "traffic": "heavy", "arrivals": "bursts"}
    record |= {"num_requests": 99, "prompts": "a.json", "max_num_seqs": 16, "seeds": 3}
    fcfs = [result("fcfs", load, seconds) for load, seconds in ((0.5, 0.1), (1.0, 0.3), (1.5, 0.5))]
    hrrn = [result("hrrn", load, seconds) for load, seconds in ((0.5, 0.1), (1.0, 0.2), (1.5, 0.3))]
    write(tmp_path / "queue_orders.jsonl", [record | {"results": []}, record | {"results": fcfs + hrrn}])
    text = BLOCKS["queue-orders"](tmp_path)
    assert "| heavy, bursts | `hrrn` | 0.10 | 0.20 | 0.30 |" in text
    # fcfs has 0.2 s at a load of 0.75 and 0.4 s at 1.25.
    assert text.endswith("| heavy, bursts | 1.33x | above 1.20x | 150 s | 200 s |")
