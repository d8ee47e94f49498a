"""GGUF files as such: every number format, every kind of metadata, and what is wrong with files."""

from __future__ import annotations

import re
import struct

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="the gguf package writes the files")
import gguf
from gguf.quants import dequantize

from alisa.errors import ModelError
from alisa.model.gguf.block_types import BLOCK_TYPES, OTHER_TYPES
from alisa.model.gguf.file import GgufFile
from tests.gguf_files import write

NAMES = [block_type.name for block_type in BLOCK_TYPES.values()]
BASE = {"general.architecture": "llama"}


def random_blocks(kind: str, num_rows: int, num_values: int) -> np.ndarray:
    """Rows of random bytes, whose float16 numbers (scales and values) are finite and of a usual size."""
    number = gguf.GGMLQuantizationType[kind]
    block_size, type_size = gguf.GGML_QUANT_SIZES[number]
    rng = np.random.default_rng(list(kind.encode()))
    if kind in ("F32", "F16"):
        return rng.standard_normal((num_rows, num_values)).astype(np.float32 if kind == "F32" else np.float16)
    blocks = rng.integers(0, 256, (num_rows, num_values // block_size, type_size), dtype=np.uint8)
    scales = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0]}
    scales |= {"Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "BF16": [], "MXFP4": []}
    for place in scales[kind]:
        values = rng.standard_normal(blocks.shape[:2]).astype(np.float16)
        blocks[:, :, place : place + 2] = values[:, :, None].view(np.uint8).reshape(*blocks.shape[:2], 2)
    if kind == "BF16":
        blocks[:, :, 1] = 0x3F  # between 0.5 and 2
    if kind == "MXFP4":
        blocks[:, :, 0] = 120 + blocks[:, :, 0] % 12  # between 2^-8 and 2^3
    return blocks.reshape(num_rows, -1)


def write_blocks(path, kind: str, stored: np.ndarray):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("some.weight", stored, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


@pytest.mark.parametrize("kind", NAMES)
def test_the_values_of_every_format_are_those_of_the_gguf_package(kind, tmp_path):
    """512 values in each of 200 rows: more than is decoded at once, and several blocks in a row."""
    stored = random_blocks(kind, 200, 512)
    file = write_blocks(tmp_path / "x.gguf", kind, stored)
    tensor = file.tensors["some.weight"]
    assert (tensor.shape, tensor.block_type.name) == ((200, 512), kind)
    expected = torch.from_numpy(dequantize(stored, gguf.GGMLQuantizationType[kind]))
    assert expected.std() > 0.1
    # Products and sums of two numbers, each rounded once: the same in any library.
    torch.testing.assert_close(file.read("some.weight", torch.float32), expected, rtol=1e-6, atol=1e-6)
    half = file.read("some.weight", torch.bfloat16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=2**-8, atol=1e-6)


def test_every_power_of_two_of_mxfp4():
    """The least two are no normal numbers; the largest times 6 is none that float32 has."""
    blocks = torch.full((254, 17), 0x21, dtype=torch.uint8)  # 1/2, then 1
    blocks[:, 0] = torch.arange(254)
    expected = torch.from_numpy(dequantize(blocks.numpy(), gguf.GGMLQuantizationType.MXFP4))
    decoded = BLOCK_TYPES[39].decode(blocks)
    assert torch.equal(decoded, expected)
    assert decoded[127].tolist() == [0.5] * 16 + [1.0] * 16
    assert (decoded > 0).all()


def test_every_format_is_known_or_refused_by_its_name():
    numbers = {item.value: item.name for item in gguf.GGMLQuantizationType}
    assert {number: block_type.name for number, block_type in BLOCK_TYPES.items()}.items() <= numbers.items()
    assert OTHER_TYPES.items() <= numbers.items()
    for number, block_type in BLOCK_TYPES.items():
        sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)]
        assert (block_type.num_values, block_type.num_bytes) == sizes


def test_metadata_of_every_kind(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    kinds = gguf.GGUFValueType
    numbers = {
        kinds.UINT8: 200, kinds.INT8: -3, kinds.UINT16: 60000, kinds.INT16: -300, kinds.UINT32: 4_000_000_000,
        kinds.INT32: -70000, kinds.UINT64: 2**63, kinds.INT64: -(2**40), kinds.FLOAT32: 0.5, kinds.FLOAT64: 0.1,
        kinds.BOOL: True,
    }  # fmt: skip
    for kind, value in numbers.items():
        writer.add_key_value(f"a.{kind.name}", value, kind)
    writer.add_string("a.text", "žluť ▁ 漢")
    writer.add_array("a.texts", ["", "b", "▁c"])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.floats", [0.5, -2.0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = GgufFile(tmp_path / "x.gguf").metadata
    assert {kind: metadata[f"a.{kind.name}"] for kind in numbers} == numbers
    assert metadata["a.text"] == "žluť ▁ 漢"
    assert metadata["a.texts"] == ["", "b", "▁c"]
    assert metadata["a.numbers"].tolist() == [1, 2, 3]
    assert metadata["a.floats"].tolist() == [0.5, -2.0]


def test_other_alignments(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_custom_alignment(256)
    for name in ("a", "b"):
        writer.add_tensor(name, np.full((3, 5), ord(name), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "x.gguf")
    for name in ("a", "b"):
        assert file.read(name, torch.float32).equal(torch.full((3, 5), float(ord(name))))


@pytest.mark.parametrize("alignment", [0, 3])
def test_what_is_not_aligned_is_damaged(alignment, tmp_path):
    with pytest.raises(ModelError, match="not aligned"):
        GgufFile(write(tmp_path / "x.gguf", BASE | {"general.alignment": alignment}, {}))


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (["F32", "F32", "F16"], "float32"),
        (["F16", "F16", "F32"], "float16"),
        (["BF16"], "bfloat16"),
        (["Q8_0"], None),
    ],
)
def test_the_dtype_of_a_file_is_that_of_most_values(kinds, expected, tmp_path):
    values = np.ones((2, 32), dtype=np.float32)
    tensors = {f"t{index}": (values, kind) for index, kind in enumerate(kinds)}
    assert GgufFile(write(tmp_path / "x.gguf", BASE, tensors)).dtype_name == expected


def test_a_file_that_is_cut_short_is_refused_wherever_it_ends(tmp_path):
    metadata = BASE | {"a.texts": ["one", "two"], "a.numbers": [1, 2, 3], "a.flag": True}
    whole = write(tmp_path / "x.gguf", metadata, {"t": (np.ones((4, 32), dtype=np.float32), "Q8_0")}).read_bytes()
    path = tmp_path / "cut.gguf"
    for length in range(8, len(whole) - 24):  # the end is padding
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"cut\.gguf is (cut short|damaged)"):
            GgufFile(path)


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"", "is not a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"PK\x03\x04 and so on", "is not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(16), "has version 1 of the format"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), "in big-endian order"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**62, 2**62) + bytes(16), "is damaged"),
    ],
)
def test_what_is_no_gguf_file_is_said_in_a_sentence(start, words, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(start)
    with pytest.raises(ModelError, match=words) as caught:
        GgufFile(path)
    assert "\n" not in str(caught.value)


def test_a_format_that_is_not_read_is_refused_by_its_name(tmp_path):
    number = gguf.GGMLQuantizationType.Q2_K
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for name in ("a", "b"):
        writer.add_tensor(name, np.zeros((1, gguf.GGML_QUANT_SIZES[number][1]), dtype=np.uint8), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=re.escape("holds 2 tensors as Q2_K (a first); F32, F16, Q4_0")):
        GgufFile(tmp_path / "x.gguf")
