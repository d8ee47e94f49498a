import math
from dataclasses import FrozenInstanceError, dataclass, fields
from pathlib import Path

import numpy as np
import pytest

from alisa.config import EngineConfig, SamplingParams, format_bytes, parse_bytes, per_request, with_options
from alisa.errors import InputError


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("2GiB", 2 << 30),
        ("1.5 mib", 3 << 19),
        ("800MB", 800_000_000),
        ("7k", 7000),
        (4096, 4096),
        ("12B", 12),
        ("1TiB", 1 << 40),
    ],
)
def test_parse_bytes(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "2 gigs", "0", "1e9"])
def test_parse_bytes_refuses(text):
    with pytest.raises(InputError, match="memory size"):
        parse_bytes(text)


def test_format_bytes_uses_the_unit_that_reads_best():
    assert [format_bytes(n) for n in (12, 1536, 3 << 20, 5 << 30, 5 << 41)] == [
        "12 B",
        "1.5 KiB",
        "3.0 MiB",
        "5.0 GiB",
        "10240.0 GiB",
    ]


def test_sampling_params_name_every_wrong_field():
    with pytest.raises(InputError, match=r"max_tokens.*top_p"):
        SamplingParams(max_tokens=0, top_p=0)


def test_engine_config_names_every_wrong_field():
    with pytest.raises(InputError, match=r"policy 'h3o' is unknown.*weight_dtype 'int3' is unknown.*sparsity is 1"):
        EngineConfig(policy="h3o", weight_dtype="int3", sparsity=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 3.0}, "max_tokens is 3.0, a whole number is needed."),
        ({"max_tokens": True}, "max_tokens is True, a whole number is needed."),
        ({"temperature": "0.5"}, "temperature is '0.5', a number is needed."),
        ({"temperature": math.nan}, "temperature is nan, allowed is 0, or 1e-6 to 100."),
        ({"temperature": 1e-320}, "temperature is 1e-320, allowed is 0, or 1e-6 to 100."),
        ({"repetition_penalty": 5e-324}, "repetition_penalty is 5e-324, allowed is 0.01 to 100 (1 is off)."),
        ({"presence_penalty": 3}, "presence_penalty is 3.0, allowed is -2 to 2."),
        ({"frequency_penalty": -2.5}, "frequency_penalty is -2.5, allowed is -2 to 2."),
        ({"logit_bias": {"x": 1}}, "logit_bias is [('x', 1)], a mapping of token ids to numbers is needed."),
        ({"logit_bias": [(1, 2, 3)]}, "logit_bias is [(1, 2, 3)], a mapping of token ids to numbers is needed."),
        ({"logit_bias": {5: 101}}, "logit_bias is for token ids from 0 on, and allowed is -100 to 100."),
        ({"min_tokens": 200}, "min_tokens is 200, allowed is 0 to max_tokens, which is 128."),
        ({"logprobs": 21}, "logprobs is 21, allowed is 0 to 20."),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1, allowed is 0 to 20."),
        (
            {"regex": "a", "json_schema": "{}"},
            "json_schema and regex were both given; a text follows one of them.",
        ),
        (
            {"regex": "a", "min_tokens": 2},
            "ignore_eos and min_tokens do not go with json_schema and regex, which say where the text ends.",
        ),
        ({"top_p": math.inf}, "top_p is inf, allowed is above 0 up to 1."),
        ({"top_k": -2}, "top_k is -2, allowed is 0 or -1 (off) or more."),
        ({"stop": b"x"}, "stop is b'x', a string or a list of strings is needed."),
        ({"stop": ["a", 1]}, "stop is ['a', 1], a string or a list of strings is needed."),
        ({"stop": ["a", ""]}, "an empty stop string would end every text at once."),
        ({"stop_ids": [1.0]}, "stop_ids is [1.0], a list of whole numbers is needed."),
        ({"ignore_eos": 1}, "ignore_eos is 1, True or False is needed."),
        ({"seed": 2**64}, "seed is 18446744073709551616, allowed is 0 up to but not 2**64."),
        ({"seed": -1}, "seed is -1, allowed is 0 up to but not 2**64."),
        (
            {"seed": "x", "max_tokens": 0},
            "seed is 'x', a whole number is needed; max_tokens is 0, at least 1 is needed.",
        ),
    ],
)
def test_sampling_params_of_another_type_or_range_are_one_sentence(options, message):
    with pytest.raises(InputError) as caught:
        SamplingParams(**options)
    assert str(caught.value) == message


def test_none_and_minus_one_mean_off():
    names = [field.name for field in fields(SamplingParams) if field.name != "seed"]
    assert SamplingParams(**dict.fromkeys(names)) == SamplingParams()
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)


def test_no_seed_is_a_seed_that_is_drawn_once():
    seeds = {SamplingParams(seed=None).seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_a_single_stop_string_is_one():
    assert SamplingParams(stop="queen").stop == ("queen",)
    assert SamplingParams(stop=["a", "b"], stop_ids=[1, np.int64(2)]) == SamplingParams(
        stop=("a", "b"), stop_ids=(1, 2)
    )
    assert type(SamplingParams(max_tokens=np.int64(3)).max_tokens) is int
    assert SamplingParams(temperature=1, top_p=np.float32(0.5)) == SamplingParams(temperature=1.0, top_p=0.5)


def test_requests_that_share_parameters_have_seeds_of_their_own():
    shared = SamplingParams(seed=2**64 - 2, temperature=0.5)
    assert [per_request(shared, index).seed for index in range(4)] == [2**64 - 2, 2**64 - 1, 0, 1]
    assert per_request(shared, 0) == shared
    assert per_request(shared, 3).temperature == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float64"}, "dtype 'float64' is unknown, there is auto, float32, bfloat16, float16."),
        (
            {"kv_dtype": "int2"},
            "kv_dtype 'int2' is unknown, there is auto, float32, bfloat16, float16, int8, int4, k8v4.",
        ),
        ({"policy": "dens"}, "policy 'dens' is unknown, there is dense, "),
        ({"sparsity": "half"}, "sparsity is 'half', a number is needed."),
        ({"coverage": 0.0}, "coverage is 0.0, allowed is above 0 up to 1"),
        ({"coverage": 0.9, "policy": "swa"}, "swa does not know the weight of what it does not read"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0, at least 1 is needed."),
        ({"max_model_len": 1}, "max_model_len is 1, at least 2 are needed, one for the prompt and one new."),
        ({"kv_device_memory": 0}, "kv_device_memory: A memory size of 0 leaves no room at all"),
        ({"kv_disk_memory": "many"}, "kv_disk_memory: 'many' is not a memory size"),
        ({"kv_device_memory": 1.5}, "kv_device_memory is 1.5, a string or a whole number is needed."),
        ({"kv_disk_path": 3}, "kv_disk_path is 3, a path is needed."),
    ],
)
def test_engine_options_of_another_type_or_range_are_one_sentence(options, message):
    with pytest.raises(InputError) as caught:
        EngineConfig(**options)
    assert str(caught.value).startswith(message)


def test_memory_stays_as_it_was_typed_and_paths_become_paths():
    config = EngineConfig(kv_device_memory="2GiB", kv_host_memory=0, kv_disk_path="a/b")
    assert (config.kv_device_memory, config.kv_host_memory, config.kv_disk_path) == ("2GiB", 0, Path("a/b"))
    with pytest.raises(FrozenInstanceError):
        config.policy = "swa"


def test_options_by_name_are_those_of_the_config():
    assert with_options(None, {}) == EngineConfig()
    base = EngineConfig(policy="swa", sparsity=0.5)
    assert with_options(base, {"sparsity": 0.9}) == EngineConfig(policy="swa", sparsity=0.9)
    for name, message in (("sparsty", "did you mean sparsity?"), ("zzz", "there is model, quality, policy, ")):
        with pytest.raises(InputError, match=f"There is no option '{name}'; {message}".replace("?", r"\?")):
            with_options(None, {name: 1})


def test_the_old_name_of_an_option_works_with_one_line_of_warning():
    with pytest.warns(FutureWarning, match=r"^max_batch is called max_num_seqs now; .*0\.3\.$"):
        assert with_options(None, {"max_batch": 3}) == EngineConfig(max_num_seqs=3)
    with (
        pytest.warns(FutureWarning, match="max_num_seqs"),
        pytest.raises(InputError, match="max_num_seqs was given twice, once under its old name"),
    ):
        with_options(None, {"max_num_seqs": 3, "max_batch": 3})


def test_a_new_option_takes_one_line():
    @dataclass(frozen=True, slots=True, kw_only=True)
    class More(EngineConfig):
        depth: int = 3

    assert More(depth=4).describe() == EngineConfig().describe() | {"depth": 4}
    with pytest.raises(InputError, match="depth is 'x', a whole number is needed"):
        More(depth="x")


def test_every_option_is_in_the_description_as_a_plain_value():
    described = EngineConfig(kv_disk_path="a", schedule="b").describe()
    assert list(described) == [field.name for field in fields(EngineConfig)]
    assert all(value is None or isinstance(value, str | int | float) for value in described.values())


def test_biases_and_schemas_may_be_mappings():
    params = SamplingParams(logit_bias={"5": -3, 7: 1.5}, json_schema={"type": "object"})
    assert params.logit_bias == ((5, -3.0), (7, 1.5))
    assert params.json_schema == '{"type": "object"}'
    assert params.is_guided
    assert params.changes_logits
    assert not SamplingParams(temperature=1, top_p=0.5, logprobs=3).changes_logits
