"""Config to spec: real configs as published, old and new layouts, and refusals that name every reason."""

from __future__ import annotations

import re

import pytest

from alisa.errors import ModelError
from alisa.model.families import FAMILIES, find_family
from alisa.model.names import layer_shapes, model_shapes
from alisa.spec import Rope, RopeScaling
from tests.tiny_models import TINY_MODELS, config_of

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
OPT_350M = {
    "model_type": "opt",
    "activation_function": "relu",
    "do_layer_norm_before": False,
    "ffn_dim": 4096,
    "hidden_size": 1024,
    "max_position_embeddings": 2048,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "vocab_size": 50272,
    "word_embed_proj_dim": 512,
}
PYTHIA = {
    "model_type": "gpt_neox",
    "hidden_act": "gelu",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
MISTRAL = LLAMA | {"model_type": "mistral", "num_key_value_heads": 8, "max_position_embeddings": 32768}
QWEN2 = LLAMA | {"model_type": "qwen2", "num_key_value_heads": 8, "max_position_embeddings": 32768}


WINDOWED = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 16}


def like(model_type, **fields):
    """A LLaMA config under another name."""
    plain = {name: value for name, value in LLAMA.items() if name != "rms_norm_eps"}
    return plain | {"model_type": model_type} | fields


def spec_of(config):
    return find_family(config["model_type"]).to_spec(config)


def test_llama_2():
    spec = spec_of(LLAMA)
    assert (spec.num_kv_heads, spec.head_dim, spec.max_positions, spec.tied_embeddings) == (32, 128, 4096, False)
    assert spec.rope == Rope(10000.0, 128)
    assert spec.num_parameters == pytest.approx(6.74e9, rel=0.001)


@pytest.mark.parametrize("layout", ["old", "new"])
def test_llama_3_1_in_both_layouts(layout):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old = {"rope_theta": 500000.0, "rope_scaling": scaling}
    new = {"rope_parameters": scaling | {"rope_theta": 500000.0}}
    spec = spec_of(LLAMA | {"num_key_value_heads": 8} | (old if layout == "old" else new))
    assert spec.rope == Rope(500000.0, 128, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192))
    assert spec.num_kv_heads == 8


def test_linear_scaling_under_its_oldest_name():
    spec = spec_of(LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}})
    assert spec.rope == Rope(10000.0, 128, RopeScaling("linear", 4.0))


@pytest.mark.parametrize("layout", ["old", "new"])
def test_pythia_in_both_layouts(layout):
    config = dict(PYTHIA)
    if layout == "new":
        del config["rotary_pct"], config["rotary_emb_base"]
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    spec = spec_of(config)
    assert spec.rope == Rope(10000.0, 16)
    assert spec.parallel_residual
    assert not spec.tied_embeddings


def test_opt_350m_is_the_odd_one():
    spec = spec_of(OPT_350M)
    assert (spec.embed_dim, spec.norm_place, spec.position_offset) == (512, "after_sum", 2)
    assert spec.position_table_size == 2050
    shapes = model_shapes(spec)
    assert shapes["project_in.weight"] == (1024, 512)
    assert "final_norm.weight" not in shapes


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (MISTRAL | {"sliding_window": 4096}, (4096,) * 32),
        (MISTRAL | {"sliding_window": None}, ()),
        (MISTRAL, (4096,) * 32),
        (QWEN2 | {"use_sliding_window": False, "sliding_window": 4096}, ()),
        (QWEN2 | WINDOWED, (None,) * 16 + (4096,) * 16),
        (QWEN2 | WINDOWED | {"max_window_layers": 0}, (4096,) * 32),
        (QWEN2 | WINDOWED | {"max_window_layers": 32}, ()),
        (QWEN2 | WINDOWED | {"layer_types": ["full_attention"] * 32}, ()),
        (QWEN2 | WINDOWED | {"layer_types": ["sliding_attention"] + ["full_attention"] * 31}, (4096,) + (None,) * 31),
    ],
)
def test_sliding_windows_by_layer(config, windows):
    spec = spec_of(config)
    assert spec.windows == windows
    assert spec.max_positions == 32768


@pytest.mark.parametrize("name", TINY_MODELS)
def test_defaults_are_those_of_transformers(name):
    """A config written with only what differs from the defaults means the same as one written in full."""
    config = config_of(name)
    assert spec_of(config.to_diff_dict() | {"model_type": config.model_type}) == spec_of(config.to_dict())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LLAMA | {"rope_scaling": {"rope_type": "xpos", "factor": 4.0}}, ["'xpos'", "default, linear, dynamic"]),
        (LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 4.0, "turn": 2}}, ["'linear' has turn"]),
        (LLAMA | {"attention_temperature": 0.5}, ["not known here", "attention_temperature (0.5)"]),
        (LLAMA | {"rope_interleaved": True}, ["rope_interleaved (True)"]),
        (LLAMA | {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "factor": 2}}, ["short_factor needs 64"]),
        (LLAMA | {"rope_scaling": {"type": "llama3", "factor": 8}}, ["low_freq_factor is None", "high_freq_factor"]),
        (MISTRAL | {"layer_types": ["full_attention"] * 32}, ["layer_types ("]),
        (QWEN2 | {"is_encoder_decoder": True}, ["is_encoder_decoder (True)"]),
        (like("gemma2", use_bidirectional_attention=True), ["use_bidirectional_attention is True"]),
        (like("gemma3_text", attn_logit_softcapping=50.0), ["attn_logit_softcapping is 50.0, supported is None"]),
        (like("gemma3_text", use_bidirectional_attention=True), ["use_bidirectional_attention is True"]),
        (like("stablelm", qk_layernorm=True), ["qk_layernorm is True"]),
        (like("stablelm", use_parallel_residual=True), ["use_parallel_residual is True"]),
        (like("smollm3", no_rope_layers=[1, 2]), ["no_rope_layers is [1, 2], a list of 32 zeros and ones"]),
        (like("qwen3_moe", mlp_only_layers=[3]), ["mlp_only_layers is [3]"]),
        (like("qwen3_moe", decoder_sparse_step=2), ["decoder_sparse_step is 2"]),
        (like("mixtral", num_local_experts=4, num_experts_per_tok=5), ["num_experts_per_tok 5 is more than"]),
        (like("mixtral", shared_expert_size=7), ["shared_expert_size (7)"]),
        (like("gpt_oss", swiglu_limit=5.0, swiglu_alpha=1.0), ["swiglu_limit is 5.0", "swiglu_alpha is 1.0"]),
        (QWEN2 | {"layer_types": ["linear_attention"] * 32}, ["layer_types has linear_attention"]),
        (QWEN2 | {"layer_types": ["full_attention"]}, ["a list of 32 kinds is needed"]),
        (LLAMA | {"hidden_act": "xielu"}, ["'xielu'", "relu, silu"]),
        (LLAMA | {"hidden_size": None}, ["hidden_size is None"]),
        (LLAMA | {"num_attention_heads": 30}, ["4096", "30 attention heads"]),
        (LLAMA | {"num_key_value_heads": 5}, ["num_key_value_heads 5"]),
        (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, ["quantised (gptq)"]),
        (LLAMA | {"hidden_act": "xielu", "vocab_size": -1, "rms_norm_eps": "no"}, ["xielu", "vocab_size", "rms_norm"]),
        (OPT_350M | {"layer_norm_elementwise_affine": False}, ["layer_norm_elementwise_affine is False"]),
        (PYTHIA | {"rotary_pct": 0.02}, ["0.02 of head dim 64"]),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx is True"]),
    ],
)
def test_every_reason_is_named(config, words):
    with pytest.raises(ModelError) as caught:
        spec_of(config)
    for word in words:
        assert word in str(caught.value)
    assert re.fullmatch(r"This \w+ model cannot run here: .*\.", str(caught.value))


def test_unknown_families_get_a_list_and_a_near_name():
    with pytest.raises(ModelError, match=r"'mistrall' are not supported; supported are .*gpt2, .*nearest is mistral"):
        find_family("mistrall")
    with pytest.raises(ModelError, match="'rwkv'"):
        find_family("rwkv")


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_tensor_has_a_place_in_the_checkpoint(name):
    config = config_of(name)
    family = FAMILIES[config.model_type]
    spec = family.to_spec(config.to_dict())
    for part in layer_shapes(spec):
        assert all("{" not in piece.name for piece in family.layer_pieces(part, 0))
    assert model_shapes(spec).keys() <= family.model_parts.keys()


def test_what_transformers_saves_of_a_gguf_file_means_the_same():
    said = {"quantization_config": {"quant_method": "gguf", "dequantize": False}, "_model_name_or_path": "A name"}
    assert spec_of(LLAMA | said) == spec_of(LLAMA)


# With the fields that published configs have: none may be refused for what has no influence.
PUBLISHED = {
    "SmolLM2-135M-Instruct": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        "transformers_version": "4.42.3",
        "use_cache": True,
        "vocab_size": 49152,
    },
    "gpt2": {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    },
    "Phi-4-mini-instruct": {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "bos_token_id": 199999,
        "embd_pdrop": 0.0,
        "eos_token_id": 199999,
        "full_attn_mod": 1,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "phi3",
        "num_attention_heads": 24,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096,
        "pad_token_id": 199999,
        "partial_rotary_factor": 0.75,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
        "vocab_size": 200064,
    },
    "gemma-3-4b-it": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    },
    "starcoder2-3b": {
        "activation_function": "gelu",
        "attention_dropout": 0.1,
        "attention_softmax_in_fp32": True,
        "embedding_dropout": 0.1,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 3072,
        "initializer_range": 0.018042,
        "intermediate_size": 12288,
        "layer_norm_epsilon": 1e-05,
        "max_position_embeddings": 16384,
        "mlp_type": "default",
        "model_type": "starcoder2",
        "norm_epsilon": 1e-05,
        "norm_type": "layer_norm",
        "num_attention_heads": 24,
        "num_hidden_layers": 30,
        "num_key_value_heads": 2,
        "residual_dropout": 0.1,
        "rope_theta": 999999.4420358813,
        "scale_attention_softmax_in_fp32": True,
        "scale_attn_weights": True,
        "sliding_window": 4096,
        "use_bias": True,
        "vocab_size": 49152,
    },
    "SmolLM3-3B": {
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "layer_types": ["full_attention"] * 36,
        "max_position_embeddings": 65536,
        "max_window_layers": 28,
        "mlp_bias": False,
        "model_type": "smollm3",
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 4,
        "pretraining_tp": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "use_cache": False,
        "use_sliding_window": False,
        "vocab_size": 128256,
    },
}


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("SmolLM2-135M-Instruct", 134.5),
        ("gpt2", 124.3),
        ("Phi-4-mini-instruct", 3836),
        ("gemma-3-4b-it", 3880),
        ("starcoder2-3b", 3029),
        ("SmolLM3-3B", 3075),
    ],
)
def test_published_configs_are_read(name, millions):
    spec = spec_of(PUBLISHED[name])
    assert spec.num_parameters / 1e6 == pytest.approx(millions, rel=0.002)
