"""Tiny models as GGUF files against the transformers models they were made from: every architecture, every wiring."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf", reason="the gguf package writes the files")

from alisa import LLM, SamplingParams
from alisa.errors import ModelError
from alisa.model.choose_linear import choose_linear
from alisa.model.gguf.model import GgufModel
from alisa.model.linear import FrameworkLinears
from alisa.model.linear_int8 import int8_panels
from alisa.model.linear_panels import PanelLinear
from alisa.spec import ModelSpec
from tests.equivalence.test_hf_logits import TOLERANCE, run, some_tokens
from tests.gguf_files import metadata_of, tensors_of, write, write_model
from tests.tiny_models import build, config_of

CPU = torch.device("cpu")
MODELS = [
    "llama", "llama-gqa-tied", "llama-biases-head-dim", "llama3-scaling", "llama-linear-scaling", "mistral", "qwen2",
    "qwen3", "pythia", "gpt2", "gemma3", "gemma3-scaled", "llama-yarn", "qwen3-yarn", "mistral-window",
    "gemma2", "granite", "olmo2", "smollm3-every-fourth", "phi3", "phi3-longrope", "stablelm", "starcoder2", "mixtral",
    "qwen3-moe",
]  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = build(name)
    if name.startswith("gemma"):
        # The format has no place for what queries are scaled by; it is the length of a head, but in the largest model.
        for layer in model.model.layers:
            layer.self_attn.scaling = model.config.head_dim**-0.5
    stored = GgufModel(write_model(tmp_path / "x.gguf", model))
    decoder = stored.decoder(torch.float32, CPU)
    tokens = some_tokens()
    with torch.no_grad():
        expected = model(tokens).logits
    torch.testing.assert_close(run(decoder, tokens), expected, atol=TOLERANCE, rtol=0)
    assert stored.dtype_name() == "float32"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((kind, "llama-gqa-tied") for kind in ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")),
        ("Q8_0", "mixtral"),
        ("MXFP4", "mixtral"),
    ],
)
def test_logits_of_quantised_files(kind: str, name: str, tmp_path: Path) -> None:
    """Transformers gets the numbers that the file stands for, as the gguf package decodes them."""
    model = build(name)
    stored = GgufModel(write_model(tmp_path / "x.gguf", model, kind))
    tokens = some_tokens()
    with torch.no_grad():
        expected = model(tokens).logits
    actual = run(stored.decoder(torch.float32, CPU), tokens)
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)
    assert stored.dtype_name() == {"F16": "float16", "BF16": "bfloat16"}.get(kind)


def test_weights_go_through_the_maker_of_layers(tmp_path: Path) -> None:
    """Weights in 8 bits are made of the decoded ones, as those of any checkpoint."""
    stored = GgufModel(write_model(tmp_path / "x.gguf", build("llama-gqa-tied"), "Q8_0"))
    reference = stored.decoder(torch.float32, CPU)
    seen: list[tuple[int, ...]] = []
    maximum = 0.0

    class Watched(FrameworkLinears):
        def layer(self, weight, bias, parts=1):
            nonlocal maximum
            seen.append(tuple(weight.shape))
            ours = PanelLinear(int8_panels(weight, parts), bias, None)
            x = torch.eye(weight.shape[1])
            maximum = max(maximum, float((ours(x) - super().layer(weight, bias)(x)).abs().max()))
            return ours

    decoder = stored.decoder(torch.float32, CPU, linears=Watched(CPU))
    assert len(seen) == 3 * 5 + 1
    assert 0 < maximum < 0.02
    tokens = some_tokens()
    assert torch.cosine_similarity(run(decoder, tokens), run(reference, tokens), dim=-1).min() > 0.99


def test_a_padded_vocabulary_is_that_of_the_table(tmp_path: Path) -> None:
    model = build("qwen2")
    metadata = metadata_of(model.config) | {"qwen2.vocab_size": 7}
    tensors = {key: (values, "F32") for key, values in tensors_of(model).items()}
    stored = GgufModel(write(tmp_path / "x.gguf", metadata, tensors))
    assert stored.spec.vocab_size == 120


def spec_with(path: Path, name: str, **changes: object) -> ModelSpec:
    """Spec of a tiny model with other metadata; the names are those of the architecture, None leaves one out."""
    model = build(name)
    values = metadata_of(model.config)
    kind = values["general.architecture"]
    for key, value in changes.items():
        values[key.replace("__", ".").replace("ARCH", kind)] = value
    kept = {key: value for key, value in values.items() if value is not None}
    tensors = {key: (values, "F32") for key, values in tensors_of(model).items()}
    return GgufModel(write(path / "x.gguf", kept, tensors)).spec


def test_a_file_may_say_how_it_wants_to_be_sampled_from(tmp_path: Path) -> None:
    model = build("qwen3")
    wishes = {"general.sampling.temp": 0.6, "general.sampling.top_k": 20, "general.sampling.sequence": "kp"}
    tensors = {key: (values, "F32") for key, values in tensors_of(model).items()}
    path = write(tmp_path / "x.gguf", metadata_of(model.config) | wishes, tensors)
    assert GgufModel(path).sampling() == {"temperature": pytest.approx(0.6), "top_k": 20}
    assert GgufModel(write_model(tmp_path / "y.gguf", model)).sampling() == {}


def test_mistral_has_its_window(tmp_path: Path) -> None:
    changes = {"ARCH__attention__sliding_window": 32}
    assert spec_with(tmp_path, "mistral", **changes).family == "mistral"


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("qwen2", {"ARCH__expert_count": 8}, r"not supported here: qwen2\.expert_count is 8"),
        ("phi3", {"ARCH__rope__scaling__type": "yarn"}, r"phi3\.rope\.scaling\.type is 'yarn', longrope with its"),
        (
            "llama",
            {"ARCH__attention__value_length": 8},
            r"llama\.attention\.value_length is 8, the length of a key, 16",
        ),
        ("llama", {"ARCH__rope__dimension_count": 8}, r"llama\.rope\.dimension_count is 8, the length of a head"),
        ("qwen2", {"ARCH__rope__scaling__type": "made-up"}, "'made-up'"),
        (
            "llama",
            {"ARCH__logit_scale": 0.5, "ARCH__a": 1, "ARCH__b": 1, "ARCH__c": 1},
            r"x\.gguf .*a is 1; .* and 1 more",
        ),
        ("llama", {"general__type": "adapter"}, "holds no model but 'adapter'"),
        ("llama", {"split__count": 3}, "one of 3 parts .*llama-gguf-split"),
        (
            "llama",
            {"general__architecture": "mamba"},
            "architecture 'mamba'; GGUF files may have gemma2, gemma3, gpt2, ",
        ),
        ("qwen2", {"ARCH__attention__head_count": 3}, "multiple"),
        ("llama", {"ARCH__block_count": None}, "num_hidden_layers is None"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(name, changes, words, tmp_path) -> None:
    with pytest.raises(ModelError, match=words):
        spec_with(tmp_path, name, **changes)


def test_what_switches_nothing_on_is_no_reason_to_refuse(tmp_path: Path) -> None:
    changes = {"ARCH__expert_count": 0, "ARCH__rope__scaling__type": "none", "ARCH__rope__scaling__finetuned": True}
    assert spec_with(tmp_path, "llama", **changes).num_layers == 3


def test_tensors_that_are_missing_or_too_many_are_named(tmp_path: Path) -> None:
    model = build("llama")
    tensors = {key: (values, "F32") for key, values in tensors_of(model).items()}
    tensors["blk.0.attn_sinks.weight"] = tensors.pop("blk.1.ffn_up.weight")
    stored = GgufModel(write(tmp_path / "x.gguf", metadata_of(model.config), tensors))
    missing = r"1 tensors are missing \(layers.1.mlp.up_proj.weight\)"
    unknown = r"1 are not part of a llama model \(blk.0.attn_sinks.weight\)"
    with pytest.raises(
        ModelError, match=rf"x\.gguf do not fit its metadata \(llama, 3 layers\): {missing} and {unknown}"
    ):
        stored.decoder(torch.float32, CPU)


@pytest.mark.parametrize("kind", ["F32", "Q4_0"])
def test_rows_that_are_no_heads_are_one_sentence(kind: str, tmp_path: Path) -> None:
    """Queries lie in the file with the halves of each head mixed, which an odd number of rows has not."""
    model = build("llama-gqa-tied")
    tensors = {key: (values, "F32") for key, values in tensors_of(model).items()}
    values, _ = tensors["blk.1.attn_q.weight"]
    tensors["blk.1.attn_q.weight"] = values[:-1], kind
    stored = GgufModel(write(tmp_path / "x.gguf", metadata_of(model.config), tensors))
    linears = None if kind == "F32" else choose_linear("int4", torch.float32, CPU)
    with pytest.raises(ModelError, match=r"x\.gguf: blk\.1\.attn_q\.weight \[\d+.*\] cannot be what its metadata"):
        stored.decoder(torch.float32, CPU, linears=linears)


def test_an_engine_takes_a_file_or_the_directory_that_holds_it(tmp_path: Path) -> None:
    write_model(tmp_path / "x.gguf", build("llama-gqa-tied"))
    (tmp_path / "README.md").touch()
    texts = []
    for place in (tmp_path, tmp_path / "x.gguf"):
        with LLM(str(place), policy="dense") as llm:
            [output] = llm.generate("abab", SamplingParams(max_tokens=8))
            texts.append(output.token_ids)
    assert texts[0] == texts[1]
    assert config_of("llama-gqa-tied").tie_word_embeddings
