import pytest

from alisa.config import EngineConfig, SamplingParams, format_bytes, parse_bytes
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
