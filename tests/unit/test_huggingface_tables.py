"""The tables of docs/huggingface.md."""

import json

from huggingface_tables import presses, steps


def cell(policy, sparsity, kind, task, value, versus, **more):
    settings = {"windows": 4, "context": 2048, "prefill": 1536} if kind == "ppl" else {"length": 1024}
    return {
        "cell": f"{policy} {sparsity} {task}",
        "kind": kind,
        "task": task,
        "policy": policy,
        "sparsity": sparsity,
        "value": value,
        "versus_dense": versus,
        "versus_dense_error": 0.01,
        "settings": settings,
        "units": [value] * 5,
        "model": "small",
        "stamp": {"dtype": "bfloat16"},
    } | more


def test_presses_stand_beside_policies_each_against_its_own_dense_row(tmp_path):
    (tmp_path / "accuracy").mkdir()
    records = [
        cell("dense", 0.0, "ppl", "wikitext2", 19.2, 1.0, read_share=1.0),
        cell("sketch", 0.8, "ppl", "wikitext2", 19.3, 1.005, read_share=0.2),
        cell("none", 0.0, "ppl", "wikitext2", 19.1, 1.0, read_share=1.0),
        cell("SnapKVPress", 0.8, "ppl", "wikitext2", 20.6, 1.075, read_share=0.314),
        cell("dense", 0.0, "recall", "needle 1024", 0.8, 0.0),
        cell("SnapKVPress", 0.8, "recall", "needle 1024", 0.2, -0.6),
    ]
    (tmp_path / "accuracy" / "presses_smollm2.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert presses(tmp_path).splitlines() == [
        "`small`, bfloat16:",
        "",
        "|  | sparsity | read | WikiText-2, 4 x 2048, 1536 of them the prompt | needle 1024, 5 texts |",
        "|---|---|---|---|---|",
        "| alisa `dense` | 0 | 100 % | 19.20 | 80.0 % |",
        "| dense (kvpress's transformers) | 0 | 100 % | 19.10 |  |",
        "| alisa `sketch` | 0.8 | 20 % | 0.50 ± 1.00 |  |",
        "| kvpress SnapKV | 0.8 | 31 % | 7.50 ± 1.00 | 60.0 ± 1.0 |",
    ]


def test_the_newest_record_of_each_workload_is_shown_against_transformers(tmp_path):
    def record(step_s):
        result = {"prefill_s": [1.0] * 3, "step_s": [step_s] * 3, "peak_bytes": [2**30] * 3}
        return {
            "model": "small",
            "dtype": "bfloat16",
            "batch": 8,
            "prompt_len": 4096,
            "output_len": 128,
            "sparsity": 0.8,
            "rounds": 2,
            "stamp": {"num_threads": 2, "cpu": "a CPU"},
            "results": {"transformers": result | {"step_s": [0.3] * 3}, "sketch": result},
        }

    (tmp_path / "huggingface.jsonl").write_text("".join(json.dumps(record(s)) + "\n" for s in (0.2, 0.1)))
    text = steps(tmp_path)
    assert text.count("batch 8, 4096 + 128 tokens") == 1
    assert "| sketch | 1.00 s | 100 ms | 3.00 | 1.0 GiB |" in text
