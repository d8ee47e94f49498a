"""A prompt of 32 thousand tokens under a tenth of the memory that its KV rows take."""

import json
import subprocess
import sys

import pytest

# A process of its own: its peak memory is the program's, not that of the tests before.
SCRIPT = """
import json, resource, sys
import torch
from alisa.config import SamplingParams
from alisa.engine.engine import Engine
from alisa.engine.kernels import choose_kernels
from alisa.engine.memory import Caps, make_memory
from alisa.engine.placement import Placement
from alisa.engine.recorder import Stopwatch
from alisa.engine.requests import Request
from alisa.engine.runner import Runner
from alisa.engine.threads import make_governor
from alisa.kv.codec import make_codec
from alisa.model.loader import random_decoder
from alisa.policy.table import make_policy
from alisa.spec import ModelSpec, Rope
from alisa.types import Medium, RowFormat

length, share = int(sys.argv[1]), float(sys.argv[2])
spec = ModelSpec(
    family="llama", num_layers=6, hidden_size=256, num_heads=8, num_kv_heads=8, head_dim=64, ffn_size=512,
    vocab_size=512, max_positions=40000, norm="rmsnorm", norm_eps=1e-5, activation="silu", gated_mlp=True,
    rope=Rope(10000.0, 64),
)
decoder = random_decoder(spec, torch.float32, torch.device("cpu"), 0)
policy, kernels = make_policy("swa", 0.95), choose_kernels(decoder.device)
codec = make_codec(RowFormat("float32", 8, 64))
total = (length + 7) * 6 * codec.format.row_bytes
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
memory = make_memory(decoder, policy, codec, kernels, [length + 7], Caps(int(share * total), 0, None, None), None, 1)
state = policy.start(spec, 1, length + 7, decoder.device, kernels.selection)
runner = Runner(decoder, policy, memory.store, state, kernels.prefill, kernels.attend, Stopwatch(), looks_ahead=True)
engine = Engine(
    runner, Placement(memory.scheduler, memory.limits, memory.store, policy), eos_ids=frozenset(), prefill_chunk=1024,
    governor=make_governor(),
)
ids = torch.randint(0, 512, (length,), generator=torch.Generator().manual_seed(1)).tolist()
engine.submit(Request(0, tuple(ids), SamplingParams(max_tokens=8, ignore_eos=True), 8))
most, tokens = 0, []
while (result := engine.step()) is not None:
    most = max(most, result.record.kv_bytes)
    tokens = list(result.advanced[0].output_ids) if result.advanced else tokens
print(json.dumps({"total": total, "cap": int(share * total), "kv_peak": most, "tokens": tokens,
                  "grown": peak() - before, "state": state.nbytes}))
memory.store.close()
"""


def run(length, share):
    command = [sys.executable, "-c", SCRIPT, str(length), str(share)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=570)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_prompt_ten_times_larger_than_the_arena_stays_under_the_cap():
    capped = run(32 * 1024, 0.1)
    assert len(capped["tokens"]) == 8
    assert capped["kv_peak"] <= capped["cap"]
    # What it adds to the process: the arena, the policy's state, and bounded working memory (64 MiB of rows going
    # down, blocks of 32 MiB of scores, a chunk's activations).
    assert capped["grown"] < capped["cap"] + capped["state"] + (400 << 20)
    assert capped["grown"] < 0.75 * capped["total"] + capped["state"]


@pytest.mark.slow
def test_the_tokens_are_those_of_a_roomy_arena():
    assert run(6 * 1024, 0.1)["tokens"] == run(6 * 1024, 1.0)["tokens"]
