"""The decoder's own promises: packing, what is held, random weights, precision, and finding a model."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from alisa.errors import InputError, ModelError
from alisa.model import hub, precision
from alisa.model.hub import resolve_model
from alisa.model.linear import FrameworkLinears
from alisa.model.loader import load_decoder, random_decoder
from alisa.model.names import weight_bytes
from alisa.model.precision import resolve_device, resolve_dtype
from alisa.model.rope import Rotation, inverse_frequencies
from alisa.spec import Rope
from tests.equivalence.test_hf_logits import causal_of, run
from tests.specs import small_spec
from tests.tiny_models import build, save

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def test_weight_bytes_count_what_is_held():
    untied = dataclasses.replace(small_spec(), tied_embeddings=False)
    # float16 is not packed, and shares a tied table with the logits.
    for spec in (untied, small_spec()):
        assert random_decoder(spec, torch.float16, CPU).weight_bytes == weight_bytes(spec, 2)
    # As torch packs them, where there are no panels: for the logits, and plain for the look-up.
    tied = small_spec()
    table = tied.vocab_size * tied.hidden_size
    packed = random_decoder(tied, torch.float32, CPU, linears=FrameworkLinears(CPU))
    assert packed.weight_bytes == weight_bytes(tied, 4) + 4 * table


def test_random_weights_repeat_and_keep_activations_finite():
    spec = small_spec(num_layers=40)
    tokens = torch.arange(64)[None] % spec.vocab_size
    first, again, other = (run(random_decoder(spec, torch.float32, CPU, seed), tokens) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.isfinite().all()
    assert 0.1 < first.std() < 10


def test_attend_is_called_once_per_layer_in_order_with_the_promised_shapes():
    spec = small_spec(num_layers=3)
    seen = []

    def attend(layer, q, k, v, hidden):
        seen.append((layer, *(tuple(x.shape) for x in (q, k, v, hidden))))
        return causal_of(decoder)(layer, q, k, v, hidden)

    decoder = random_decoder(spec, torch.float32, CPU)
    hidden = decoder.forward(torch.zeros(2, 5, dtype=torch.int64), torch.arange(5).expand(2, 5), attend)
    assert seen == [(layer, (2, 5, 4, 8), (2, 5, 2, 8), (2, 5, 2, 8), (2, 5, 32)) for layer in range(3)]
    assert hidden.shape == (2, 5, 32)
    assert not hidden.requires_grad
    logits = decoder.logits(hidden[:, -1])
    assert logits.shape == (2, 100)
    assert logits.dtype == torch.float32


def test_a_cached_step_equals_the_whole_sequence(tmp_path):
    """One token at a time, with k and v kept by `attend`, gives the logits of one pass over everything."""
    decoder = load_decoder(save(build("llama3-scaling"), tmp_path), torch.float32, CPU)
    tokens = torch.randint(0, 120, (1, 20), generator=torch.Generator().manual_seed(0))
    whole = run(decoder, tokens)[0]
    cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(layer, q, k, v, hidden):
        if layer in cache:
            k, v = (torch.cat(pair, dim=1) for pair in zip(cache[layer], (k, v), strict=True))
        cache[layer] = (k.clone(), v.clone())  # the next layer overwrites what this one was given
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

    for position in range(20):
        hidden = decoder.forward(tokens[:, position : position + 1], torch.tensor([[position]]), attend)
        torch.testing.assert_close(decoder.logits(hidden[0])[0], whole[position], atol=1e-4, rtol=0)


def test_rotation_keeps_distances_and_far_positions_apart():
    frequencies = inverse_frequencies(Rope(10000.0, 16), CPU)
    x = torch.ones(1, 1, 1, 16, dtype=torch.bfloat16)
    near, far = (Rotation(torch.tensor([[p]]), frequencies)(x).float() for p in (100_000, 100_001))
    assert (near - far).norm() > 0.1 * x.float().norm(), "positions are not rounded to bfloat16"
    torch.testing.assert_close(near.norm(), x.float().norm(), rtol=2**-7, atol=0)


@pytest.mark.parametrize(
    ("asked", "stored", "device", "fast", "expected"),
    [
        ("auto", "float32", CPU, True, torch.float32),
        ("auto", "float32", CUDA, True, torch.float32),
        ("auto", "float16", CUDA, True, torch.float16),
        ("auto", "bfloat16", CUDA, False, torch.bfloat16),
        ("auto", "float16", CPU, True, torch.bfloat16),
        ("auto", "bfloat16", CPU, True, torch.bfloat16),
        ("auto", "float16", CPU, False, torch.float32),
        ("auto", None, CPU, False, torch.float32),
        ("auto", None, CUDA, False, torch.bfloat16),
        ("float16", "float32", CPU, True, torch.float16),
        ("bfloat16", "float32", CPU, False, torch.bfloat16),
    ],
)
def test_dtype(monkeypatch, asked, stored, device, fast, expected):
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: fast)
    assert resolve_dtype(asked, stored, device) == expected


def test_native_bfloat16_is_what_the_cpu_lists():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "flags" not in flags:
        pytest.skip("no x86 /proc/cpuinfo here")
    if "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("torch is told not to use what the CPU lists (ATEN_CPU_CAPABILITY)")
    assert precision.has_native_bfloat16() == ("avx512_bf16" in flags or "amx_bf16" in flags)


def test_bfloat16_is_fast_where_kernels_or_instructions_are(monkeypatch):
    for native, kernels in itertools.product((False, True), ((), ("avx2",))):
        monkeypatch.setattr(precision, "has_native_bfloat16", lambda native=native: native)
        monkeypatch.setattr(precision, "prefill_isa_names", lambda kernels=kernels: kernels)
        assert precision.has_fast_bfloat16() == (native or kernels != ())


def test_device(monkeypatch):
    assert resolve_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == CPU
    with pytest.raises(InputError, match=r"device cuda is asked for, but torch .* use --device cpu or auto"):
        resolve_device("cuda")
    with pytest.raises(InputError, match="auto, cpu, cuda"):
        resolve_device("tpu")
    with pytest.raises(InputError, match="auto, float32"):
        resolve_dtype("int8", None, CPU)


def test_directories_are_taken_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_model(str(tmp_path / "model")) == tmp_path / "model"
    assert resolve_model("~/model") == tmp_path / "model"
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"is a file; give a \.gguf file, or the directory"):
        resolve_model(str(tmp_path / "file"))


def test_a_gguf_file_is_taken_as_it_is(tmp_path):
    (tmp_path / "x.gguf").touch()
    assert resolve_model(str(tmp_path / "x.gguf")) == tmp_path / "x.gguf"


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["x.gguf", "README.md"], "x.gguf"),
        (["x.gguf", "config.json", "tokenizer.json"], "x.gguf"),
        (["x.gguf", "mmproj-x.gguf"], "x.gguf"),
        (["x.gguf", "y.gguf", "config.json", "model.safetensors"], None),
        (["x.gguf", "config.json", "pytorch_model.bin"], None),
        (["config.json"], None),
    ],
)
def test_a_directory_without_other_weights_stands_for_its_gguf_file(files, chosen, tmp_path, monkeypatch):
    for name in files:
        (tmp_path / name).touch()
    assert resolve_model(str(tmp_path)) == (tmp_path if chosen is None else tmp_path / chosen)
    # The same of a repository.
    fake = FakeHub(monkeypatch, files)
    assert resolve_model("owner/name") == Path("downloaded" if chosen is None else f"downloaded/{chosen}")
    assert (fake.patterns is None) == (chosen is not None)


def test_of_several_gguf_files_one_must_be_named(tmp_path, monkeypatch):
    files = [f"x.Q{bits}_0.gguf" for bits in range(4, 9)]
    for name in files:
        (tmp_path / name).touch()
    FakeHub(monkeypatch, files)
    for name in (str(tmp_path), "owner/name"):
        words = r"holds 5 GGUF files \(x\.Q4_0\.gguf, x\.Q5_0\.gguf, x\.Q6_0\.gguf and 2 more\); give the path of one"
        with pytest.raises(ModelError, match=words):
            resolve_model(name)


def test_a_cached_gguf_file_is_used_offline(monkeypatch, tmp_path):
    FakeHub(monkeypatch, error=ConnectionError("x"), cached=tmp_path)
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "x.gguf").touch()
    assert resolve_model("owner/name") == tmp_path / "part" / "x.gguf"


@pytest.mark.parametrize("name", ["./x", "/no/such/place", "a/b/c", "models/", "~/x", "", "two words", "a\\b"])
def test_what_looks_like_a_path_is_not_asked_from_the_hub(name, monkeypatch):
    monkeypatch.setattr(hub, "_download", lambda hub_id: pytest.fail(f"asked for {hub_id}"))
    with pytest.raises(ModelError, match="does not exist"):
        resolve_model(name)


class FakeHub:
    """Stands for the hub: a list of files, or an error; and a local cache that may have a snapshot."""

    def __init__(self, monkeypatch, files=(), error=None, cached=None):
        self.patterns = None
        self._files, self._error, self._cached = files, error, cached
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda hub_id, name: f"downloaded/{name}")

    def model_info(self, hub_id, timeout):
        if self._error is not None:
            raise self._error
        return huggingface_hub.ModelInfo(id=hub_id, siblings=[{"rfilename": name} for name in self._files])

    def snapshot_download(self, hub_id, allow_patterns=None, local_files_only=False):
        if local_files_only:
            if self._cached is None:
                raise errors.LocalEntryNotFoundError("no snapshot")
            return str(self._cached)
        self.patterns = allow_patterns
        return "downloaded"


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (["model.safetensors", "pytorch_model.bin", "tf_model.h5"], {"model.safetensors"}),
        (["model-00001-of-00002.safetensors", "consolidated.safetensors"], {"model-00001-of-00002.safetensors"}),
        (["pytorch_model.bin", "flax_model.msgpack", "rust_model.ot"], {"pytorch_model.bin"}),
        (["pytorch_model-00001-of-00002.bin", "adapter.safetensors"], {"pytorch_model-00001-of-00002.bin"}),
    ],
)
def test_only_one_format_of_the_weights_is_downloaded(files, wanted, monkeypatch):
    text = ["config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja"]
    fake = FakeHub(monkeypatch, [*files, *text, "README.md", "onnx/model.onnx"])
    assert resolve_model("owner/name") == Path("downloaded")
    chosen = set(huggingface_hub.utils.filter_repo_objects([*files, *text, "README.md"], allow_patterns=fake.patterns))
    assert chosen == wanted | set(text)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.OfflineModeIsEnabled("off"), "HF_HUB_OFFLINE is set"),
        (ConnectionError("x"), "the hub cannot be reached"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError("first line\nsecond line"), r"\(first line\)"),
    ],
)
def test_a_failed_download_says_why(error, words, monkeypatch):
    FakeHub(monkeypatch, error=error)
    with pytest.raises(ModelError, match=f"'owner/name' is not a directory here, and it cannot be .*{words}") as caught:
        resolve_model("owner/name")
    assert "\n" not in str(caught.value)


def test_a_cached_snapshot_is_used_offline(monkeypatch, tmp_path):
    FakeHub(monkeypatch, error=ConnectionError("x"), cached=tmp_path)
    with pytest.raises(ModelError, match="cannot be reached"):
        resolve_model("owner/name")
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()
    assert resolve_model("owner/name") == tmp_path
