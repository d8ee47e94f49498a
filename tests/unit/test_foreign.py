"""Repositories that are not a plain float model: they run as in transformers, or one sentence says what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alisa.errors import ModelError
from alisa.model.loader import load_decoder, load_spec
from tests.equivalence.test_hf_logits import run, some_tokens
from tests.tiny_models import build, save

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save(build("llama-gqa-tied"), tmp_path_factory.mktemp("plain"))


@pytest.fixture
def copy(plain, tmp_path):
    for path in plain.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def rename(directory: Path, change, **added) -> None:
    path = directory / "model.safetensors"
    tensors = {change(name): tensor for name, tensor in load_file(path).items()}
    save_file(tensors | added, path)


def set_config(directory: Path, **fields) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def logits(directory):
    return run(load_decoder(directory, torch.float32, CPU), some_tokens())


@pytest.mark.parametrize(
    "wrapper", ["module.", "_orig_mod.", "language_model.", "base_model.model.", "module._orig_mod."]
)
def test_a_wrapped_model_runs(wrapper, plain, copy):
    rename(copy, lambda name: wrapper + name)
    assert torch.equal(logits(copy), logits(plain))


def test_tensors_that_transformers_leaves_are_left_with_a_warning(plain, copy, caplog):
    extra = {
        "v_head.summary.weight": torch.ones(1, 64),
        "v_head.summary.bias": torch.ones(1),
        "model.layers.0.self_attn.k_scale": torch.ones(1),
        "model.layers.0.self_attn.k_proj.k_scale": torch.ones(1),
    }
    rename(copy, str, **extra)
    assert torch.equal(logits(copy), logits(plain))
    assert "4 tensors are no part of the model" in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: rename(d, str, **{"model.layers.0.q.lora_A.weight": torch.ones(2)}), "an adapter .LoRA.: merge it"),
        (lambda d: rename(d, lambda n: n.replace("q_proj.weight", "q_proj.qweight")), "quantised, and only float"),
        (lambda d: rename(d, str, **{"score.weight": torch.ones(2, 64)}), "of a classifier"),
        (lambda d: set_config(d, tie_word_embeddings=False), "set tie_word_embeddings to true"),
        (lambda d: (d / "adapter_config.json").write_text("{}"), "an adapter.* merge the two once with peft"),
        (lambda d: (d / "quantize_config.json").write_text("{}"), "quantised by GPTQ"),
        (lambda d: (d / "quant_config.json").write_text("{}"), "quantised by AWQ"),
        (
            lambda d: (d / "model.safetensors").rename(d / "consolidated.safetensors"),
            "consolidated.safetensors .the form of the model's maker",
        ),
        (lambda d: rename(d, lambda n: n.replace("mlp", "ffn")), "download the repository again"),
    ],
)
def test_what_it_is_is_said(change, words, copy):
    change(copy)
    with pytest.raises(ModelError, match=words):
        load_decoder(copy, torch.float32, CPU)


def test_four_bits_of_mlx_are_named(copy):
    set_config(copy, quantization={"group_size": 64, "bits": 4})
    with pytest.raises(ModelError, match=r"quantised \(MLX, 4 bits\)"):
        load_spec(copy)


def test_the_text_part_of_a_multimodal_model_runs(tmp_path):
    text = build("gemma3")
    plain = save(text, tmp_path / "text")
    seeing = tmp_path / "seeing"
    seeing.mkdir()
    inner = json.loads((plain / "config.json").read_text())
    (seeing / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": inner, "vision_config": {}}))
    for prefix in ("language_model.", "model.language_model."):
        names = load_file(plain / "model.safetensors")
        tensors = {prefix + name.removeprefix("model." if "." in prefix[:-1] else ""): t for name, t in names.items()}
        save_file(tensors | {"vision_tower.patch.weight": torch.ones(3)}, seeing / "model.safetensors")
        assert torch.equal(logits(seeing), logits(plain))
