"""A prompt of 32 thousand tokens under a tenth of the memory that its KV rows take."""

import json
import subprocess
import sys

import pytest

# A process of its own: its peak memory is the program's, not that of the tests before.
SCRIPT = """
import json, resource, sys
import torch
from alisa.config import EngineConfig, SamplingParams
from alisa.engine.builder import build_engine
from alisa.engine.loaded import LoadedModel
from alisa.kernels.choose import choose_backend
from alisa.model.loader import random_decoder
from alisa.spec import ModelSpec, Rope, RowFormat

length, share = int(sys.argv[1]), float(sys.argv[2])
spec = ModelSpec(
    family="llama", num_layers=6, hidden_size=256, num_heads=8, num_kv_heads=8, head_dim=64, ffn_size=512,
    vocab_size=512, max_positions=40000, norm="rmsnorm", norm_eps=1e-5, activation="silu", gated_mlp=True,
    rope=Rope(10000.0, 64),
)
decoder = random_decoder(spec, torch.float32, torch.device("cpu"), 0)
model = LoadedModel("", decoder, None, choose_backend(decoder.device))
row_bytes = 6 * RowFormat("float32", 8, 64).row_bytes
total = (length + 8) * row_bytes
config = EngineConfig(
    policy="swa", sparsity=0.95, kv_device_memory=int(share * total), max_num_seqs=1, max_model_len=length + 8
)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
engine, setup = build_engine(model, config)
ids = torch.randint(0, 512, (length,), generator=torch.Generator().manual_seed(1)).tolist()
engine.add_request(ids, SamplingParams(max_tokens=8, ignore_eos=True))
most, tokens = 0, []
while (record := (output := engine.step()).record) is not None:
    most = max(most, record.kv_bytes + record.state_bytes)
    tokens += [token for delta in output.deltas for token in delta.token_ids]
print(json.dumps({"total": total, "cap": setup.device_bytes, "peak": most, "tokens": tokens, "grown": peak() - before}))
engine.close()
"""


def run(length, share):
    command = [sys.executable, "-c", SCRIPT, str(length), str(share)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=570)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_prompt_ten_times_larger_than_the_pool_stays_under_the_cap():
    capped = run(32 * 1024, 0.2)
    assert len(capped["tokens"]) == 8
    assert capped["peak"] <= capped["cap"]
    # What it adds to the process: what the cap covers, and bounded working memory (blocks of 32 MiB of scores, a
    # chunk's activations).
    assert capped["grown"] < capped["cap"] + (300 << 20)
    assert capped["grown"] < 0.75 * capped["total"]


@pytest.mark.slow
def test_the_tokens_are_those_of_a_roomy_pool():
    assert run(6 * 1024, 0.2)["tokens"] == run(6 * 1024, 1.0)["tokens"]
