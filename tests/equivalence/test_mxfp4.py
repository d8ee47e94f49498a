"""GPT-OSS as it is published, experts in MXFP4: what our decoder makes of it is what transformers does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from alisa.errors import ModelError
from alisa.model.loader import checkpoint_dtype, load_decoder
from alisa.model.packed import packed_tensors
from alisa.model.safetensors_file import SafetensorsFile
from tests.equivalence.test_hf_logits import TOLERANCE, run, save, some_tokens
from tests.tiny_models import build

CPU = torch.device("cpu")
EXPERTS = ("gate_up_proj", "down_proj")


def packed(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes UInt8[experts, out, blocks, 16] and scales UInt8[experts, out, blocks] of `[experts, in, out]`, rounded."""
    rows = weight.transpose(1, 2).unflatten(2, (-1, 32))
    largest = rows.abs().amax(dim=3)
    scales = (torch.floor(torch.log2(largest)) - 2 + 127).clamp(0, 254).to(torch.uint8)
    steps = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = rows / torch.exp2(scales.float() - 127).unsqueeze(3)
    codes = (values.abs().unsqueeze(4) - steps).abs().argmin(dim=4) + 8 * (values < 0)
    pairs = codes.to(torch.uint8).unflatten(3, (16, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4), scales


def publish(directory: Path) -> torch.nn.Module:
    """A tiny model in the published form; returned with the numbers that transformers decodes."""
    model = build("gpt-oss")
    save(model, directory)
    state = load_file(directory / "model.safetensors")
    published: dict[str, torch.Tensor] = {}
    weights = dict(model.named_parameters())
    for name, tensor in state.items():
        if not name.endswith(EXPERTS):
            published[name] = tensor
            continue
        codes, scales = packed(tensor)
        published |= {f"{name}_blocks": codes, f"{name}_scales": scales}
        with torch.no_grad():
            weights[name].copy_(convert_moe_packed_tensors(codes, scales))
    assert len(published) == len(state) + 2 * model.config.num_hidden_layers
    save_file(published, directory / "model.safetensors")
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"quantization_config": {"quant_method": "mxfp4"}}
    path.write_text(json.dumps(config), encoding="utf-8")
    return model


def test_logits_are_those_of_transformers(tmp_path: Path) -> None:
    model = publish(tmp_path)
    tokens = some_tokens()
    with torch.no_grad():
        expected = model(tokens).logits
    assert expected.std() > 0.5
    actual = run(load_decoder(tmp_path, torch.float32, CPU), tokens)
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)
    assert checkpoint_dtype(tmp_path) == "float32", "that of the other tensors"


def test_every_number_of_the_format(tmp_path: Path) -> None:
    """All codes with all powers of two that stay finite, in 40 rows of 3 blocks: more than is decoded at once."""
    rng = np.random.default_rng(1)
    codes = torch.from_numpy(rng.integers(0, 256, (2, 1000, 3, 16), dtype=np.uint8))
    scales = torch.from_numpy(rng.integers(2, 252, (2, 1000, 3), dtype=np.uint8))
    save_file({"x_blocks": codes, "x_scales": scales}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    [tensor] = packed_tensors(dict.fromkeys(file.names, file)).values()
    expected = convert_moe_packed_tensors(codes, scales, dtype=torch.bfloat16)
    assert tensor.shape("x") == tuple(expected.shape) == (2, 96, 1000)
    for part in range(2):
        assert torch.equal(tensor.read("x", part), expected[part])


def test_halves_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    publish(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    save_file(state | {name: state[name][:, :-1].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(
        ModelError, match=r"down_proj_blocks \[.*\] and .*down_proj_scales \[.*\] are no tensor in MXFP4"
    ):
        load_decoder(tmp_path, torch.float32, CPU)
    del state[name]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"1 tensors are missing \(layers\.1\.mlp\.experts\.down_proj\)"):
        load_decoder(tmp_path, torch.float32, CPU)
