"""What a request gets does not depend on its company, nor on where its rows lie, nor on the threads: to the last bit.

Token ids are compared, and all logits as bytes: 16-bit models turn a last bit into another token only now and then. The
fuzz (`pytest -m slow`) tries random settings; ALISA_FUZZ_SEED and ALISA_FUZZ_CASES choose others.
"""

import json
import os
import random
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import pytest
import torch
from torch import Tensor

from alisa import LLM, SamplingParams
from alisa.errors import CapacityError
from alisa.kernels.choose import choose_backend
from alisa.lab.scoring import ScoredItem, Scorer
from alisa.model.choose_linear import choose_linear
from alisa.model.decoder import Decoder
from alisa.policy.layer_budgets import BudgetedModel, LayerBudget, LayerBudgets
from alisa.policy.registry import POLICIES
from tests.caps import device_cap
from tests.combinations import each

PROMPT_LENGTHS = (3, 290, 41, 130, 17)
NEW_TOKENS = 16
SIZES = {"max_num_seqs": len(PROMPT_LENGTHS), "max_model_len": max(PROMPT_LENGTHS) + NEW_TOKENS}


@dataclass
class Result:
    """Token ids of every request, and all logits as bytes.

    A set, because a preempted request goes through its tokens again.
    """

    tokens: list[tuple[int, ...]]
    logits: set[bytes]

    def __add__(self, other: "Result") -> "Result":
        return Result(self.tokens + other.tokens, self.logits | other.logits)


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prompts_of(llm, lengths=PROMPT_LENGTHS, seed=11):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, llm.spec.vocab_size, (length,), generator=generator).tolist() for length in lengths]


def run(llm, prompts, num_threads=1, new_tokens=NEW_TOKENS, temperature=0.0):
    """Generate, and keep what the output layer says."""
    logits: set[bytes] = set()
    output_layer = Decoder.logits

    def keep(self: Decoder, hidden: Tensor) -> Tensor:
        found = output_layer(self, hidden)
        logits.update(row.numpy().tobytes() for row in found)
        return found

    params = [SamplingParams(max_tokens=new_tokens, ignore_eos=True, temperature=temperature, seed=5)] * len(prompts)
    Decoder.logits = keep  # of the class: an engine has a copy, for its rows
    try:
        with threads(num_threads):
            outputs = llm.generate(prompts, params)
    finally:
        Decoder.logits = output_layer
    return Result([output.token_ids for output in outputs], logits)


def score(llm, prompts, result, num_threads=1, max_batch=8):
    """The logits that teacher-forced decoding of the same tokens gives."""
    scorer = Scorer(llm.decoder, choose_backend(torch.device("cpu")), 1 << 30, max_batch, llm.config.prefill_chunk)
    items = [ScoredItem(prompt, tokens) for prompt, tokens in zip(prompts, result.tokens, strict=True)]
    logits: set[bytes] = set()
    with threads(num_threads):
        for batch in scorer.batches(items, llm.codec, llm.policy):
            for step in scorer.steps(llm.policy, llm.codec, [items[index] for index in batch]):
                logits.update(row.numpy().tobytes() for row in step.logits)
    return logits


def count_deleted(llm):
    """A list that grows by the rows that every later stream has deleted."""
    deleted = []
    stream = llm.stream

    def counting(prompts, params):
        found = stream(prompts, params)
        close = found.close
        found.close = lambda: (deleted.append(found.report().summary.traffic.deleted_rows), close())
        return found

    llm.stream = counting
    return deleted


def budgets_file(directory, layers):
    """Budgets of the model inside the package at sparsity 0.5."""
    record = LayerBudgets(
        model=BudgetedModel.of(LLM().spec),
        policy="sketch",
        edition=POLICIES["sketch"].edition,
        budgets=(LayerBudget(sparsity=0.5, layers=layers),),
        found={},
    )
    path = directory / "budgets.json"
    path.write_text(json.dumps(asdict(record)))
    return path


def count_pieces(llm, monkeypatch):
    """A list that grows with every selection that is read in pieces."""
    asked = []
    kernel_class = type(llm._model.backend.attend)
    in_pieces = kernel_class.in_pieces
    monkeypatch.setattr(kernel_class, "in_pieces", lambda *args: asked.append(1) or in_pieces(*args))
    return asked


THREE_PHASES = {
    "schedule": "three-phase",
    "offload_from": 3,
    "recompute_from": 8,
    "offload_ratio": 0.7,
    "recompute_ratio": 0.6,
}


STATIC = {"schedule": "static", "offload_ratio": 0.75}


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "dense"},
        {"policy": "swa", "dtype": "float32"},
        {"policy": "sketch", "coverage": 0.6, "kv_dtype": "k8v4"},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                {"policy": "sketch"},
                {"policy": "dense", "kv_dtype": "int8", "weight_dtype": "int8"},
                {"policy": "swa"},
                {"policy": "dense", "dtype": "float32"},
                {"policy": "sketch", "dtype": "float16"},
                {"policy": "sketch", "layers": (0.3, 0.9, 0.5, 0.3)},
                {"policy": "swa", "kv_dtype": "int4", "weight_dtype": "int8"},
            )
        ),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_no_company_placement_or_thread_changes_a_bit(options, tmp_path, monkeypatch):
    options = {"dtype": "bfloat16", "sparsity": 0.5, "prefill_chunk": 64, **SIZES} | options
    if layers := options.pop("layers", None):
        options["budgets"] = budgets_file(tmp_path, layers)
    together = LLM(**options)
    prompts = prompts_of(together)
    expected = run(together, prompts)
    assert run(together, prompts, num_threads=2) == expected, "two threads"
    alone = [run(together, [prompt], num_threads=2) for prompt in prompts]
    assert sum(alone[1:], alone[0]) == expected, "alone"
    assert run(LLM(**(options | {"max_num_seqs": 2})), prompts) == expected, "two at a time"
    assert score(together, prompts, expected) == expected.logits, "scored together"
    assert score(together, prompts, expected, num_threads=2, max_batch=1) == expected.logits, "scored alone"

    total = sum(PROMPT_LENGTHS) + len(PROMPT_LENGTHS) * NEW_TOKENS
    third = LLM(**options, kv_device_memory=device_cap(together, total // 3))
    assert run(third, prompts) == expected, "a third of the rows"
    for chunk in (16, 100, 1024):
        assert run(LLM(**(options | {"prefill_chunk": chunk})), prompts) == expected, "read in other steps"
    in_turns = {"max_num_seqs": 2, "max_step_tokens": 16}
    assert run(LLM(**(options | in_turns)), prompts) == expected, "read while others are answered"
    capped = LLM(**options, kv_device_memory=device_cap(together, 40))
    asked = count_pieces(capped, monkeypatch)
    assert run(capped, prompts, num_threads=2) == expected, "in pieces"
    assert asked, "the cap was not small enough for pieces"
    half, disk = device_cap(together, total // 2), total // 4 * together.describe()["kv_token_bytes"]
    preempting = LLM(**options, kv_device_memory=half, kv_disk_memory=disk)
    assert run(preempting, prompts) == expected, "preempted"
    schedule = tmp_path / "schedule.json"
    schedule.write_text(json.dumps(THREE_PHASES))
    phases = LLM(**options, schedule=schedule, kv_device_memory=half)
    deleted = count_deleted(phases)
    assert run(phases, prompts) == expected, "three phases"
    assert sum(deleted) > 0


@pytest.mark.parametrize(
    ("policy", "dtype", "kernels"),
    [("dense", "bfloat16", "torch"), ("dense", "float32", "fastest"), ("sketch", "bfloat16", "fastest")],
)
def test_sliding_windows_keep_the_promise(policy, dtype, kernels, tiny_model, tmp_path, monkeypatch):
    if kernels == "torch":
        monkeypatch.setattr("alisa.kernels.native.library.available", lambda: False)
    options = {"policy": policy, "dtype": dtype, "sparsity": 0.5, "prefill_chunk": 32}
    options |= {"max_num_seqs": 3, "max_model_len": 100}
    directory = tiny_model("gemma3")
    together = LLM(directory, **options)
    prompts = prompts_of(together, (3, 75, 41))
    expected = run(together, prompts, new_tokens=12)
    alone = [run(together, [prompt], num_threads=2, new_tokens=12) for prompt in prompts]
    assert sum(alone[1:], alone[0]) == expected, "alone"
    capped = LLM(directory, **options, kv_device_memory=device_cap(together, 30))
    assert run(capped, prompts, num_threads=2, new_tokens=12) == expected, "under a cap"
    schedule = tmp_path / "schedule.json"
    schedule.write_text(json.dumps(THREE_PHASES))
    phases = LLM(directory, **options, schedule=schedule, kv_device_memory=device_cap(together, 100))
    deleted = count_deleted(phases)
    assert run(phases, prompts, new_tokens=12) == expected, "three phases"
    assert sum(deleted) > 0


@each(
    policy=["dense", "swa", "h2o", "sketch"],
    dtypes=[("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "int8"), ("bfloat16", "int4")],
)
def test_the_steps_a_long_prompt_is_read_in_change_no_bit(policy, dtypes):
    """A prompt of more than one section, cut within and across them, and one beside it; the model takes 2048 tokens."""
    dtype, kv_dtype = dtypes
    options = {"policy": policy, "sparsity": 0.9, "dtype": dtype, "kv_dtype": kv_dtype, "max_num_seqs": 2}
    results = []
    for chunk in (2048, 700, 96):
        llm = LLM(**options, prefill_chunk=chunk)
        results.append(run(llm, prompts_of(llm, (1300, 150)), new_tokens=3))
    assert all(result == results[0] for result in results)


def test_plain_torch_keeps_the_promise(tiny_model, monkeypatch):
    """Where there are no native kernels."""
    monkeypatch.setattr("alisa.kernels.native.library.available", lambda: False)
    options = {"policy": "dense", "dtype": "bfloat16", "prefill_chunk": 32, "max_num_seqs": 3, "max_model_len": 100}
    together = LLM(tiny_model("llama-gqa-tied"), **options)
    assert together.describe()["attention"] == "torch"
    prompts = prompts_of(together, (3, 70, 41))
    expected = run(together, prompts, new_tokens=30)
    alone = [run(together, [prompt], num_threads=2, new_tokens=30) for prompt in prompts]
    assert sum(alone[1:], alone[0]) == expected
    capped = LLM(tiny_model("llama-gqa-tied"), **options, kv_device_memory=device_cap(together, 12))
    asked = count_pieces(capped, monkeypatch)
    assert run(capped, prompts, new_tokens=30) == expected
    assert asked


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.float32, "float"),
        (torch.bfloat16, "float"),
        (torch.float16, "float"),
        (torch.bfloat16, "int8"),
        (torch.bfloat16, "int4"),
    ],
)
@pytest.mark.parametrize("num_in", [256, 1024, 1536, 2112])
def test_a_row_of_a_product_does_not_depend_on_the_others(dtype, weight_dtype, num_in):
    """Shapes as in real models: the tiny ones have too few inputs for a product to be cut."""
    generator = torch.Generator().manual_seed(num_in)
    weight = torch.randn(320, num_in, generator=generator).to(dtype) / num_in**0.5
    x = torch.randn(70, num_in, generator=generator).to(dtype)
    linear = choose_linear(weight_dtype, dtype, weight.device).layer(weight, None)
    expected = linear(x)
    for num_threads in (1, 2):
        with threads(num_threads):
            for count in (1, 2, 3, 4, 7, 16, 33, 64):
                for first in range(0, 70 - count, 1 if count < 3 else 5):
                    found = linear(x[first : first + count])
                    assert torch.equal(found, expected[first : first + count]), (num_threads, count, first)


@each(
    family=["opt-gelu-no-bias", "pythia", "gpt2", "llama", "qwen3", "gemma3-scaled", "qwen3-moe"],
    dtype=["float32", "bfloat16"],
)
def test_activations_and_norms_of_every_kind_know_no_company(family, dtype, tiny_model):
    llm = LLM(tiny_model(family), policy="dense", dtype=dtype, prefill_chunk=32)
    prompts = prompts_of(llm, (3, 41, 17, 60, 33))
    expected = run(llm, prompts)
    alone = [run(llm, [prompt], num_threads=2) for prompt in prompts]
    assert sum(alone[1:], alone[0]) == expected


# --- the fuzz --------------------------------------------------------------------------------------------------------


def random_case(draw):
    """One request list, how it is to be, and a setting in which it must come out the same."""
    family = draw.choice(["embedded", "embedded", "llama-gqa-tied", "opt", "qwen3", "gemma3", "mistral-window"])
    longest = 400 if family == "embedded" else 80
    schedule = draw.choice(
        [
            None,
            None,
            STATIC,
            THREE_PHASES | {"offload_from": draw.randint(5, 40), "recompute_from": draw.randint(41, 90)},
        ]
    )
    policy = draw.choice(["dense", "dense", "swa", "h2o", "sketch", "sketch", "local", "strided"])
    return {
        "family": family,
        "options": {
            "policy": policy,
            "sparsity": draw.choice([0.0, 0.4, 0.8]),
            "dtype": draw.choice(["bfloat16", "bfloat16", "float16", "float32"]),
            "weight_dtype": draw.choice(["auto", "auto", "int8"]),
            "kv_dtype": draw.choice(["auto", "auto", "bfloat16", "int8", "int4", "k8v4"]),
            "prefill_chunk": draw.choice([16, 64, 1024]),
        },
        "lengths": [draw.randint(1, longest) for _ in range(draw.randint(1, 7))],
        "new_tokens": draw.randint(2, 30),
        "temperature": draw.choice([0.0, 0.0, 0.8]),
        "seed": draw.randint(0, 999),
        "num_threads": draw.choice([1, 2, 3]),
        "max_num_seqs": draw.choice([1, 2, 5, 32]),
        "other_chunk": draw.choice([16, 50, 1024]),
        # A static schedule keeps its part of every sequence on the device, and is refused where that cannot be.
        "cap": draw.choice([None, 0.7] if schedule is STATIC else [None, 0.7, 0.3, 0.1, 0.0]),
        "disk": draw.choice([None, None, 0.4]),
        "schedule": schedule,
    }


def check_case(case, tiny_model, tmp_path):
    """The requests one by one on one thread, against all of them in the setting of the case; False: it is refused."""
    model = None if case["family"] == "embedded" else tiny_model(case["family"])
    max_model_len = max(case["lengths"]) + case["new_tokens"]
    options = case["options"] | {"max_num_seqs": case["max_num_seqs"], "max_model_len": max_model_len}
    plain = LLM(model, **options)
    prompts = prompts_of(plain, case["lengths"], case["seed"])
    rules = {"new_tokens": case["new_tokens"], "temperature": case["temperature"]}
    alone = [run(plain, [prompt], **rules) for prompt in prompts]
    expected = sum(alone[1:], alone[0])
    token_bytes = plain.describe()["kv_token_bytes"]
    total = sum(case["lengths"]) + len(prompts) * case["new_tokens"]
    setting = {}
    if case["cap"] is not None:
        setting["kv_device_memory"] = device_cap(plain, max(int(case["cap"] * total), 8))
    if case["disk"] is not None and case["cap"] is not None:
        longest = max_model_len + 16
        setting["kv_disk_memory"] = int(max(case["disk"] * total, longest) * token_bytes)
    if case["schedule"] is not None:
        setting["schedule"] = tmp_path / "schedule.json"
        setting["schedule"].write_text(json.dumps(case["schedule"]))
    try:
        llm = LLM(model, **(options | {"prefill_chunk": case["other_chunk"]}), **setting)
        found = run(llm, prompts, num_threads=case["num_threads"], **rules)
    except CapacityError:
        return False
    assert found.tokens == expected.tokens
    assert found.logits == expected.logits
    return True


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_random_settings_change_no_bit(tiny_model, tmp_path):
    """A failure ends with the case as JSON: `check_case(json.loads(...), tiny_model, tmp_path)` repeats it."""
    seed = int(os.environ.get("ALISA_FUZZ_SEED", "0"))
    num_cases, num_run = int(os.environ.get("ALISA_FUZZ_CASES", "250")), 0
    for number in range(num_cases):
        case = random_case(random.Random(f"{seed}/{number}"))
        try:
            num_run += check_case(case, tiny_model, tmp_path)
        except Exception as error:
            error.add_note(f"case {number} of seed {seed}: {json.dumps(case)}")
            raise
    assert num_run >= num_cases // 2, f"{num_cases - num_run} of {num_cases} settings were refused"
