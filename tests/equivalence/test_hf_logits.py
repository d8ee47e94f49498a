"""The decoder against transformers: same weights, same tokens, same logits, for every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from alisa.kernels.base import Attend
from alisa.kernels.native.product import model_isa_names
from alisa.model.decoder import Decoder
from alisa.model.linear import FrameworkLinears, LinearMaker
from alisa.model.loader import load_decoder, load_spec
from alisa.model.stack import LayerStack
from tests.tiny_models import TINY_MODELS, build, save

CPU = torch.device("cpu")
NUM_TOKENS = 100
BY_LENGTH = {"llama-dynamic", "phi3-longrope"}
"""Models whose keys follow from more than their positions."""
TOLERANCE = 1e-4
"""float32: logits reach about 10 and a sum has at most 96 products: 10 * 96 * 2^-24 = 6e-5 at the worst."""


def causal_of(decoder: Decoder) -> Attend:
    """Dense causal attention over B sequences of the same length, through windows, caps and sinks of the model."""
    shape, sinks = decoder.spec.attention, decoder.sinks

    def causal(layer: int, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        group = shape.num_heads // shape.num_kv_heads
        scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(group, dim=2)).float() * shape.scale
        if shape.softcap is not None:
            scores = shape.softcap * torch.tanh(scores / shape.softcap)
        ages = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
        seen = (ages >= 0) & (ages < (shape.window(layer) or len(ages)))
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            of_heads = sinks[layer][:, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, of_heads), dim=-1)
        weights = scores.softmax(dim=-1)[..., : q.shape[1]].to(q.dtype)
        return torch.einsum("bhts,bshd->bthd", weights, v.repeat_interleave(group, dim=2))

    return causal


def run(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Logits [B, T, V] of whole sequences."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    hidden = decoder.forward(tokens, positions, causal_of(decoder), torch.full_like(tokens, tokens.shape[1]))
    return decoder.logits(hidden.flatten(0, 1)).view(*tokens.shape, -1)


def some_tokens(batch: int = 2) -> Tensor:
    return torch.randint(0, 120, (batch, NUM_TOKENS), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("linears", [None, FrameworkLinears(CPU)], ids=["fastest", "in-torch"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_float32_logits_are_those_of_transformers(name: str, linears: LinearMaker | None, tmp_path: Path) -> None:
    """With native layers, where there are any, and with those in torch, which a GPU runs."""
    model = build(name)
    decoder = load_decoder(save(model, tmp_path), torch.float32, CPU, linears=linears)
    tokens = some_tokens()
    with torch.no_grad():
        expected = model(tokens).logits
    actual = run(decoder, tokens)
    assert actual.dtype == torch.float32
    assert expected.std() > 0.5, "logits this small would pass any tolerance"
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("isa", model_isa_names())
@pytest.mark.parametrize("name", ["opt-350m", "pythia", "gemma3-scaled", "olmo2", "granite", "qwen3-moe"])
def test_layers_of_every_instruction_set_say_the_same(name: str, isa: str, tmp_path: Path) -> None:
    """Wirings that differ: norms after sums, both in parallel, on both sides, of heads, of all heads; experts."""
    decoder = load_decoder(save(build(name), tmp_path), torch.float32, CPU)
    tokens = some_tokens()
    expected = run(decoder, tokens)
    decoder._stack = LayerStack(
        decoder.spec, decoder._layers, decoder._final_norm, decoder._rope_of_layer, torch.float32, isa
    )
    torch.testing.assert_close(run(decoder, tokens), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_a_scaling_that_a_user_adds_to_a_new_config_counts(name: str, scaling: dict[str, Any], tmp_path: Path) -> None:
    """As model cards say: beside the `rope_parameters` that transformers 5 has written."""
    directory = save(build(name), tmp_path)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    assert "rope_parameters" in config
    plain = run(load_decoder(directory, torch.float32, CPU), some_tokens())
    # Short, so that every kind changes something within the tokens of this test.
    path.write_text(json.dumps(config | {"rope_scaling": scaling, "max_position_embeddings": 64}))
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = some_tokens()
    with torch.no_grad():
        expected = reference(tokens).logits
    actual = run(load_decoder(directory, torch.float32, CPU), tokens)
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)
    assert (actual - plain).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", TINY_MODELS)
def test_bfloat16_errs_no_more_than_transformers_does(name: str, tmp_path: Path) -> None:
    """Against float32 logits of the same rounded weights, our bfloat16 error is that of transformers up to a third.

    How rounding grows through a network depends on its weights, so the yardstick is the reference's own error. A
    rounded router sends some tokens to other experts, so of models with experts the middle token is taken.
    """
    model = build(name).to(torch.bfloat16)
    decoder = load_decoder(save(model, tmp_path), torch.bfloat16, CPU)
    tokens = some_tokens()
    with torch.no_grad():
        reference = model(tokens).logits.float()
        exact = model.float()(tokens).logits
    of_tokens = Tensor.median if decoder.spec.num_experts else Tensor.mean
    reference_error = of_tokens((reference - exact).pow(2).mean(dim=-1)).sqrt()
    error = of_tokens((run(decoder, tokens) - exact).pow(2).mean(dim=-1)).sqrt()
    assert 0 < error < 4 / 3 * reference_error
    assert error < 0.1 * exact.std()


@pytest.mark.parametrize("name", ["llama-gqa-tied", "qwen3", "opt", "opt-350m", "pythia", "gpt2"])
def test_a_changed_weight_is_noticed(name: str, tmp_path: Path) -> None:
    """The comparison can fail: one percent more on one matrix in the middle is far outside the tolerance."""
    model = build(name)
    decoder = load_decoder(save(model, tmp_path), torch.float32, CPU)
    tokens = some_tokens()
    middle = [p for n, p in model.named_parameters() if ".1." in n and p.dim() == 2][-1]
    with torch.no_grad():
        middle *= 1.01
        expected = model(tokens).logits
    assert (run(decoder, tokens) - expected).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("name", TINY_MODELS)
def test_packed_sequences_follow_their_positions(name: str, tmp_path: Path) -> None:
    """Two sequences of different lengths as one row of tokens give what each gives alone."""
    decoder = load_decoder(save(build(name), tmp_path), torch.float32, CPU)
    first, second = some_tokens()[0, :30], some_tokens()[1, :70]

    def block_causal(layer: int, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        causal = causal_of(decoder)
        halves = [causal(layer, q[:, s], k[:, s], v[:, s], hidden[:, s]) for s in (slice(0, 30), slice(30, 100))]
        return torch.cat(halves, dim=1)

    packed = torch.cat((first, second))[None]
    positions = torch.cat((torch.arange(30), torch.arange(70)))[None]
    lengths = torch.tensor([30] * 30 + [70] * 70)[None]
    logits = decoder.logits(decoder.forward(packed, positions, block_causal, lengths)[0])
    torch.testing.assert_close(logits[:30], run(decoder, first[None])[0], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(logits[30:], run(decoder, second[None])[0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", sorted(TINY_MODELS.keys() - BY_LENGTH))
def test_project_kv_rebuilds_what_attend_saw(name: str, tmp_path: Path) -> None:
    """`attend` is shown the input of W_K and W_V; from it and the original positions, any rows come back."""
    model = build(name)
    decoder = load_decoder(save(model, tmp_path), torch.float32, CPU)
    inputs: dict[int, Tensor] = {}
    # Which input W_K reads is taken from transformers, so that the test does not repeat the decoder's own wiring.
    for layer in range(3):
        _key_projection(model, layer).register_forward_pre_hook(
            lambda module, args, layer=layer: inputs.update({layer: args[0].detach()})
        )
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def recording(layer: int, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        seen[layer] = (k.clone(), v.clone(), hidden.clone())
        return causal_of(decoder)(layer, q, k, v, hidden)

    tokens = some_tokens(batch=1)
    decoder.forward(tokens, torch.arange(NUM_TOKENS)[None], recording)
    with torch.no_grad():
        model(tokens)
    rows = torch.tensor([97, 3, 40, 41, 0])
    for layer in range(3):
        k, v = decoder.project_kv(layer, inputs[layer][0, rows], rows)
        spec = load_spec(tmp_path)
        assert k.shape == v.shape == (5, spec.num_kv_heads, spec.head_dim)
        torch.testing.assert_close(k, seen[layer][0][0, rows], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(v, seen[layer][1][0, rows], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(seen[layer][2], inputs[layer], atol=TOLERANCE, rtol=0)


def _key_projection(model: torch.nn.Module, layer: int) -> torch.nn.Module:
    """The module that computes K of one layer, under the name its family gives it."""
    ends = (
        f"layers.{layer}.self_attn.k_proj",
        f"layers.{layer}.self_attn.qkv_proj",
        f"layers.{layer}.attention.query_key_value",
        f"h.{layer}.attn.c_attn",
    )
    return next(module for name, module in model.named_modules() if name.endswith(ends))
