"""Records of `alisa bench run` for tests."""

from alisa.records.schema import Floor, RunFigures, RunRecord, Stamp, WorkloadRecord

STAMP = Stamp(date="2026-01-01T00:00", cpu="CPU X", num_threads=2)
FLOOR = Floor(0.25, 0.25, 0.5, 0.25, 1e9)


def run_record(run, *, rate=10.0, wall_s=10.0, floor=FLOOR, workload="w", cell=None, stamp=STAMP, **changes):
    """A run that ran; with a status and a reason, one that did not."""
    figures = RunFigures(
        tokens_per_s=rate,
        decode_tokens_per_s=None,
        wall_s=wall_s,
        first_token_median_s=1.234,
        first_token_last_s=2.0,
        peak_rss_bytes=3 * 2**30,
    )
    work = WorkloadRecord(
        name=workload,
        model="m",
        batch=2,
        output_len=4,
        prompt_len=8,
        dtype="bfloat16",
        seed=0,
        timeout_s=60,
        num_sequences=2,
        prompt_tokens=16,
    )
    values = {
        "cell": cell or f"{run} {workload} {rate}",
        "experiment": "paper",
        "workload": work,
        "run": run,
        "engine": "alisa" if run.startswith("ours") else "vllm",
        "options": {},
        "round": 0,
        "status": "ran",
        "stamp": stamp,
        "kv_need_bytes": 2**30,
        "kv_budget_bytes": 2**28,
        "figures": figures,
        "floor": floor,
        "others_share": 0.0,
        "versions": {"torch": "2.13"},
    }
    if "reason" in changes:
        values |= {"figures": None, "floor": None}
    return RunRecord(**(values | changes))
