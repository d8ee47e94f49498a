"""The engine generates the same tokens with the Triton kernels as without them."""

import pytest
import torch

from alisa import LLM, SamplingParams
from alisa.kernels.choose import REFERENCE_BACKEND, choose_backend
from tests.kernels.triton_device import on_each_device


@on_each_device
@pytest.mark.parametrize(
    ("policy", "kv_dtype"), [pytest.param("swa", "int8", marks=pytest.mark.slow), ("sketch", "float32")]
)
def test_tokens_are_those_of_the_torch_twin(device, policy, kv_dtype, tiny_model, monkeypatch):
    pytest.importorskip("triton")
    tokens = []
    for kernels in (choose_backend(torch.device("cuda")), REFERENCE_BACKEND):
        monkeypatch.setattr("alisa.engine.loaded.choose_backend", lambda _, chosen=kernels: chosen)
        llm = LLM(
            tiny_model("llama-gqa-tied"), policy=policy, sparsity=0.5, dtype="float32", kv_dtype=kv_dtype, device=device
        )
        prompts = [list(range(3, 3 + length)) for length in (14, 9)]
        outputs = llm.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True))
        tokens.append([output.token_ids for output in outputs])
    assert tokens[0] == tokens[1]
