"""Checkpoints as they are found: formats, shards, prefixes, tied tables, damage; and how much memory loading takes."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from alisa.errors import ModelError
from alisa.model.loader import checkpoint_dtype, load_decoder, load_spec
from alisa.model.safetensors_file import SafetensorsFile
from alisa.model.torch_file import TorchFile
from alisa.model.weights import Checkpoint, weight_files
from tests.equivalence.test_hf_logits import run, some_tokens
from tests.tiny_models import build, save

CPU = torch.device("cpu")


def logits(directory: Path) -> torch.Tensor:
    return run(load_decoder(directory, torch.float32, CPU), some_tokens())


@pytest.fixture
def opt(tmp_path) -> Path:
    return save(build("opt"), tmp_path / "opt")


def rewrite(directory: Path, change) -> None:
    """Replace the tensors of a one-file checkpoint by what `change` makes of them."""
    path = directory / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path)


def as_bin(directory: Path, change=dict, **options) -> None:
    path = directory / "model.safetensors"
    torch.save(change(load_file(path)), directory / "pytorch_model.bin", **options)
    path.unlink()


@pytest.mark.parametrize("prefixed", ["model.decoder.", "decoder.", ""])
@pytest.mark.parametrize("format", ["safetensors", "bin", "legacy-bin"])
def test_formats_and_prefixes_give_the_same_logits(opt, format, prefixed):
    expected = logits(opt)
    rewrite(opt, lambda state: {name.replace("model.decoder.", prefixed): tensor for name, tensor in state.items()})
    if format != "safetensors":
        as_bin(opt, _use_new_zipfile_serialization=format == "bin")
    assert torch.equal(logits(opt), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "pythia"])
def test_names_without_the_usual_prefix(name, tmp_path):
    directory = save(build(name), tmp_path)
    expected = logits(directory)
    prefixes = ("model.", "transformer.", "gpt_neox.")

    def strip(state):
        return {key.removeprefix(next((p for p in prefixes if key.startswith(p)), "")): v for key, v in state.items()}

    rewrite(directory, strip)
    assert torch.equal(logits(directory), expected)


def test_shards_of_either_format(tmp_path):
    model = build("qwen3")
    expected = logits(save(model, tmp_path / "one"))
    shards = save(model, tmp_path / "many", max_shard_size="100kB")
    assert len(weight_files(shards)) > 3
    assert torch.equal(logits(shards), expected)
    index = shards / "model.safetensors.index.json"
    for path in weight_files(shards):
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()
    (shards / "pytorch_model.bin.index.json").write_text(index.read_text().replace(".safetensors", ".bin"))
    index.unlink()
    assert torch.equal(logits(shards), expected)


def test_shards_without_an_index_are_counted(tmp_path):
    shards = save(build("llama"), tmp_path, max_shard_size="100kB")
    (shards / "model.safetensors.index.json").unlink()
    logits(shards)
    weight_files(shards)[-1].unlink()
    with pytest.raises(ModelError, match=r"\d of \d weight files"):
        logits(shards)


def test_safetensors_are_preferred(opt):
    (opt / "pytorch_model.bin").write_bytes(b"not read")
    assert [path.name for path in weight_files(opt)] == ["model.safetensors"]


def test_a_tied_model_may_repeat_its_table(tmp_path):
    directory = save(build("llama-gqa-tied"), tmp_path)
    expected = logits(directory)
    rewrite(directory, lambda state: state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()})
    decoder = load_decoder(directory, torch.float32, CPU)
    assert decoder.spec.tied_embeddings
    assert torch.equal(run(decoder, some_tokens()), expected)


def test_a_tied_model_with_another_output_keeps_both_as_in_transformers(tmp_path):
    directory = save(build("llama-gqa-tied"), tmp_path)
    rewrite(directory, lambda state: state | {"lm_head.weight": state["model.embed_tokens.weight"].flip(0)})
    decoder = load_decoder(directory, torch.float32, CPU)
    assert not decoder.spec.tied_embeddings
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        torch.testing.assert_close(run(decoder, some_tokens()), reference(some_tokens()).logits, atol=1e-4, rtol=0)


def test_buffers_of_older_libraries_are_ignored(tmp_path):
    directory = save(build("gpt2"), tmp_path)
    expected = logits(directory)
    extra = {"transformer.h.0.attn.bias": torch.ones(1, 1, 128, 128), "transformer.h.2.attn.masked_bias": torch.ones(1)}
    rewrite(directory, lambda state: state | extra)
    assert torch.equal(logits(directory), expected)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_are_cast_while_loading(opt, stored):
    rewrite(opt, lambda state: {name: tensor.to(stored) for name, tensor in state.items()})
    expected = logits(opt)
    rewrite(opt, lambda state: {name: tensor.float() for name, tensor in state.items()})
    assert torch.equal(logits(opt), expected)


def test_the_dtype_of_a_checkpoint(opt):
    config = json.loads((opt / "config.json").read_text())
    assert checkpoint_dtype(opt) == "float32"
    for fields in ({"torch_dtype": "float16"}, {"dtype": "torch.bfloat16"}):
        clean = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
        (opt / "config.json").write_text(json.dumps(clean | fields))
        assert checkpoint_dtype(opt) == next(iter(fields.values())).removeprefix("torch.")
    (opt / "config.json").write_text(json.dumps(clean))
    rewrite(opt, lambda state: {name: tensor.bfloat16() for name, tensor in state.items()})
    assert checkpoint_dtype(opt) == "bfloat16"
    as_bin(opt)
    assert checkpoint_dtype(opt) == "bfloat16"


def test_progress_adds_up_to_the_whole(opt):
    seen: list[tuple[int, int]] = []
    load_decoder(opt, torch.bfloat16, CPU, lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    num_parameters = sum(tensor.numel() for tensor in load_file(opt / "model.safetensors").values())
    assert seen[-1] == (2 * num_parameters, 2 * num_parameters)


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "config.json").unlink(), "no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "not readable JSON"),
        (lambda d: (d / "config.json").write_text("[]"), "holds a list"),
        (lambda d: (d / "config.json").write_text("{}"), "does not name a model_type"),
        (lambda d: (d / "model.safetensors").unlink(), "holds no weights"),
        (
            lambda d: (d / "model.safetensors").rename(d / "consolidated.safetensors"),
            r"only as consolidated\.safetensors \(the form of the model's maker\), which is not read here; take",
        ),
        (
            lambda d: ((d / "config.json").unlink(), (d / "model.safetensors").rename(d / "consolidated.00.pth")),
            r"no config\.json, and holds its weights only as consolidated\.00\.pth",
        ),
        (
            lambda d: (d / "model.safetensors").rename(d / "adapter_model.safetensors"),
            r"adapter_model\.safetensors \(an adapter, the changes to another model\), .* merge the two",
        ),
        (lambda d: (d / "model.safetensors").rename(d / "model.onnx"), r"model\.onnx \(ONNX\)"),
        (lambda d: cut(d / "model.safetensors", 100_000), r"model.safetensors is cut short: 100000 of \d+ bytes"),
        (lambda d: cut(d / "model.safetensors", 500), "model.safetensors is cut short: 500 of"),
        (lambda d: cut(d / "model.safetensors", 5), "not a usable safetensors file"),
        (lambda d: cut(d / "model.safetensors", 0), "not a usable safetensors file"),
        (
            lambda d: (d / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/"),
            "does not begin with",
        ),
        (lambda d: (d / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"nothing!"), "header is damaged"),
        (lambda d: rewrite(d, lambda s: dict(list(s.items())[2:])), "2 tensors are missing"),
        (
            lambda d: rewrite(d, lambda s: s | {"adapter.a": torch.ones(1), "b": torch.ones(1)}),
            "2 are not part of a opt",
        ),
        (
            lambda d: rewrite(d, lambda s: s | {"model.decoder.layers.1.fc1.weight": torch.ones(95, 64)}),
            r"model.decoder.layers.1.fc1.weight \[95, 64\] cannot make up layers.1.up.weight \[96, 64\]",
        ),
        (
            lambda d: rewrite(d, lambda s: s | {"model.decoder.layers.1.fc1.weight": torch.ones(96, 64).char()}),
            "fc1.weight is stored as I8",
        ),
        (
            lambda d: as_bin(d, lambda s: s | {"model.decoder.layers.1.fc1.weight": torch.ones(96, 64).char()}),
            "as int8",
        ),
        (lambda d: (as_bin(d), cut(d / "pytorch_model.bin", 90_000)), "pytorch_model.bin cannot be read .*download"),
        (lambda d: (as_bin(d), cut(d / "pytorch_model.bin", 0)), "pytorch_model.bin cannot be read .*download"),
        (lambda d: as_bin(d, lambda s: [1, 2]), "holds a list"),
        (lambda d: as_bin(d, lambda s: {"run": Path("x")}), "holds more than weights"),
    ],
)
def test_damage_is_named_in_one_sentence(opt, damage, words):
    damage(opt)
    with pytest.raises(ModelError, match=words) as caught:
        load_decoder(opt, torch.float32, CPU)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["pythia", "gpt2", "llama-gqa-tied"])
def test_misshapen_fused_tensors_are_named(name, tmp_path):
    directory = save(build(name), tmp_path)
    endings = ("1.attention.query_key_value.weight", "1.attn.c_attn.weight", "1.self_attn.k_proj.weight")
    rewrite(directory, lambda s: {n: t[:-1, :-1] if n.endswith(endings) else t for n, t in s.items()})
    with pytest.raises(ModelError, match=r"cannot make up layers\.1\.(q|kv)\.weight"):
        load_decoder(directory, torch.float32, CPU)


def test_missing_and_damaged_shards(tmp_path):
    shards = save(build("llama"), tmp_path, max_shard_size="100kB")
    weight_files(shards)[1].unlink()
    with pytest.raises(ModelError, match=r"1 of \d+ weight files of .* are missing: model-00002-of-"):
        Checkpoint(shards)
    (shards / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="should map tensors to files"):
        Checkpoint(shards)


def test_a_pickle_that_runs_code_is_not_opened(opt, tmp_path):
    target = tmp_path / "owned"

    class Attack:
        def __reduce__(self):
            return (Path.touch, (target,))

    (opt / "model.safetensors").unlink()
    (opt / "pytorch_model.bin").write_bytes(pickle.dumps(Attack(), protocol=2))
    with pytest.raises(ModelError, match=r"pytorch_model\.bin"):
        load_decoder(opt, torch.float32, CPU)
    assert not target.exists()


def test_own_reader_agrees_with_the_library(opt):
    path = opt / "model.safetensors"
    file = SafetensorsFile(path)
    expected = load_file(path)
    assert set(file.names) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(file.read(name), tensor)
        assert file.shape(name) == tuple(tensor.shape)
    save_file({"empty": torch.ones(0, 3), "one": torch.tensor(2.5)}, path)
    odd = SafetensorsFile(path)
    assert odd.read("empty").shape == (0, 3)
    assert odd.read("one").item() == 2.5


def test_a_mapped_file_is_opened_anew_now_and_then(opt, monkeypatch):
    as_bin(opt)
    monkeypatch.setattr("alisa.model.torch_file._REOPEN_BYTES", 10_000)
    file = TorchFile(opt / "pytorch_model.bin")
    for name, tensor in torch.load(opt / "pytorch_model.bin").items():
        assert torch.equal(file.read(name), tensor)


MEASURE = """
import sys, threading
from pathlib import Path
import torch
from alisa.model.stored import open_model

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

directory, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
# What torch brings with its first packed product belongs to the baseline, not to the weights.
from alisa.model.choose_linear import choose_linear
linears = choose_linear(sys.argv[3], dtype, torch.device("cpu"))
linears.layer(torch.ones(64, 64, dtype=dtype), None)(torch.ones(2, 64, dtype=dtype))
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
decoder = open_model(directory).decoder(dtype, torch.device("cpu"), linears=linears)
print(before, status("VmHWM"), status("VmRSS"), decoder.weight_bytes)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=4000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=7,
        num_attention_heads=12,
        tie_word_embeddings=False,
    )
    # No initialisation: any numbers will do, and zeros that were never written would not need memory.
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    state = {name: torch.full(tensor.shape, 0.5) for name, tensor in model.state_dict().items()}
    directory = tmp_path_factory.mktemp("large")
    config.save_pretrained(directory)
    save_file(state, directory / "model.safetensors")
    assert (directory / "model.safetensors").stat().st_size > 200e6
    return directory


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("format", "dtype", "weights", "share"),
    [
        ("safetensors", "float32", "float", 1.0),
        pytest.param("safetensors", "bfloat16", "float", 0.5, marks=pytest.mark.slow),
        pytest.param("safetensors", "bfloat16", "int8", 0.264, marks=pytest.mark.slow),
        pytest.param("bin", "float32", "float", 1.0, marks=pytest.mark.slow),
        ("gguf", "bfloat16", "float", 0.5),
        pytest.param("gguf", "bfloat16", "int4", 0.18, marks=pytest.mark.slow),
    ],
)
def test_nothing_is_held_twice_while_loading(large, format, dtype, weights, share, tmp_path):
    directory = large
    stored_bytes = (large / "model.safetensors").stat().st_size
    if format == "bin":
        directory = tmp_path
        (directory / "config.json").write_bytes((large / "config.json").read_bytes())
        torch.save(load_file(large / "model.safetensors"), directory / "pytorch_model.bin")
    if format == "gguf":
        gguf_files = pytest.importorskip("tests.gguf_files", reason="the gguf package writes the file")
        config = transformers.AutoConfig.from_pretrained(large)
        tensors = gguf_files.named(load_file(large / "model.safetensors"), config)
        kind = "Q4_1" if weights == "int4" else "F32"
        stored = {name: (values, kind if values.ndim > 1 else "F32") for name, values in tensors.items()}
        directory = gguf_files.write(tmp_path / "x.gguf", gguf_files.metadata_of(config), stored)
    command = [sys.executable, "-c", MEASURE, str(directory), dtype, weights]
    source = str(Path(__file__).parents[2] / "src")
    result = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": source})
    before, peak, after, weight_bytes = map(int, result.stdout.split())
    assert weight_bytes == pytest.approx(stored_bytes * share, rel=0.01)
    # The largest tensor exists three times at the worst (as stored, as cast or joined, packed), a mapped file adds what
    # is read of it before it is opened anew, and the allocator keeps some holes.
    largest_bytes = 2 * 2048 * 768 * 4
    mapped_bytes = 64 * 2**20 if format == "bin" else 0
    assert peak - before < 1.15 * weight_bytes + 3 * largest_bytes + mapped_bytes
    if (format, dtype) == ("safetensors", "float32"):
        assert peak - before < 1.35 * weight_bytes
    if weights == "int4":
        assert peak - before < 1.5 * weight_bytes, "the layers never exist as floats"
    assert after - before < 1.35 * weight_bytes, "what was read is gone afterwards"
    assert after - before > 0.95 * weight_bytes, "the measurement sees the weights"


def test_load_spec_reads_the_config_only(opt):
    (opt / "model.safetensors").unlink()
    assert load_spec(opt).family == "opt"
