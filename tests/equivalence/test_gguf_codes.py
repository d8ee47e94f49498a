"""Weights that a GGUF file has in 4 bits are those of the layers, whatever moves or joins their rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("gguf", reason="the gguf package writes the files")
import gguf
from gguf.quants import dequantize

from alisa import LLM, SamplingParams
from alisa.doctor.model import examine
from alisa.errors import ModelError
from alisa.kernels.base import Panels
from alisa.kernels.native import library
from alisa.model.choose_linear import choose_linear, resolve_weight_dtype
from alisa.model.coded import CodedRows
from alisa.model.gguf.block_types import BLOCK_TYPES
from alisa.model.gguf.model import GgufModel
from alisa.model.linear import FrameworkLinears
from alisa.model.linear_int4 import coded_panels, multiply_int4, quantise_spans, unpacked
from alisa.model.linear_int8 import quantise_inputs, rows_of
from alisa.spec import SPAN
from tests.equivalence.test_gguf import MODELS
from tests.equivalence.test_hf_logits import run, some_tokens
from tests.gguf_files import metadata_of, tensors_of, write
from tests.tiny_models import build
from tests.unit.test_gguf_file import random_blocks

CPU = torch.device("cpu")
BY_NAME = {block_type.name: block_type for block_type in BLOCK_TYPES.values()}
CODED = [name for name, block_type in BY_NAME.items() if block_type.spans is not None]


def weight_of(panels: Panels) -> torch.Tensor:
    """What the panels stand for, Float32[out, in]: as the products have it, minimum + scale * level."""
    levels = unpacked(panels).float().view(panels.num_out, -1, SPAN)
    scales, minima = (rows_of(panels, panels.ranges[:, :, which].unsqueeze(3)).float() for which in range(2))
    return (levels * scales.unsqueeze(2) + minima.unsqueeze(2)).flatten(1)[:, : panels.num_in]


def rows_in(kind: str, num_rows: int, num_in: int, seed: int) -> tuple[CodedRows | torch.Tensor, torch.Tensor]:
    """Rows in a format, and their numbers as the gguf package decodes them."""
    stored = np.roll(random_blocks(kind, num_rows, num_in), seed, axis=0)
    numbers = torch.from_numpy(dequantize(stored, gguf.GGMLQuantizationType[kind]))
    block_type = BY_NAME[kind]
    if block_type.spans is None:
        return numbers, numbers
    blocks = torch.from_numpy(stored).view(num_rows, -1, block_type.num_bytes)
    return CodedRows(blocks, block_type.spans, num_in), numbers


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """The numbers that a weight in floats gets."""
    levels, scales, minima = quantise_spans(weight)
    return (levels.float() * scales.float().unsqueeze(2) + minima.float().unsqueeze(2)).flatten(1)


def test_which_formats_are_taken_over():
    assert CODED == ["Q4_0", "Q4_1", "Q4_K"]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_the_numbers_are_those_of_the_gguf_package(kind):
    rows, numbers = rows_in(kind, 130, 512, 0)
    assert torch.equal(weight_of(coded_panels((rows,))), numbers)


def test_levels_of_256_in_a_block_stay_and_their_ranges_are_rounded_to_float16():
    rows, numbers = rows_in("Q4_K", 130, 512, 0)
    found = weight_of(coded_panels((rows,)))
    spans = rows.spans(0, 130)
    # Scale and minimum are off by half a step of float16 each, 2^-11 of them, and the scale counts 15 times at most.
    bound = 2.0**-11 * (15 * spans.scales.float().abs() + spans.minima.float().abs()) + 2.0**-24
    assert ((found - numbers).abs() <= 1.001 * bound.repeat_interleave(SPAN, 1)).all()
    assert (found != numbers).any(), "the ranges of these formats do not fit float16"


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(
        st.tuples(st.sampled_from(["Q4_0", "Q4_1", "Q5_0", "F32"]), st.integers(1, 80)), min_size=1, max_size=3
    ),
    spans=st.integers(1, 5),
    halves=st.booleans(),
    seed=st.integers(0, 99),
)
def test_pieces_join_and_rows_move(pieces, spans, halves, seed):
    """Panels of pieces in several formats, their rows in any order, some left out: the same numbers in that order."""
    generator = torch.Generator().manual_seed(seed)
    weight, expected = [], []
    for kind, num_rows in pieces:
        rows, numbers = rows_in(kind, num_rows, spans * SPAN, seed)
        order = torch.randperm(num_rows, generator=generator)[: max(1, num_rows - seed % 3)]
        weight.append(rows.moved(order) if isinstance(rows, CodedRows) else rows[order])
        expected.append(numbers[order] if isinstance(rows, CodedRows) else rounded(numbers[order]))
    whole = torch.cat(expected)
    parts = 2 if halves and len(whole) % 2 == 0 else 1
    panels = coded_panels(tuple(weight), parts)
    assert panels.parts == parts
    assert torch.equal(weight_of(panels), whole)


def file_in(path: Path, name: str, kind: str) -> GgufModel:
    """A tiny model whose matrices are in a format, as far as their rows are whole blocks."""
    model = build(name)
    tensors = {
        key: (values, kind if values.ndim >= 2 and values.shape[-1] % SPAN == 0 else "F32")
        for key, values in tensors_of(model).items()
    }
    return GgufModel(write(path, metadata_of(model.config), tensors))


class Watched(FrameworkLinears):
    """Keeps the numbers of the layers in the order in which they are made; products are in float32."""

    def __init__(self, coded: bool) -> None:
        super().__init__(CPU)
        self.weights: list[torch.Tensor] = []
        self.num_coded = 0
        self._coded = coded

    @property
    def coded_layer(self):
        return self._from_codes if self._coded else None

    def _from_codes(self, weight, bias, parts):
        self.num_coded += 1
        return self.layer(weight_of(coded_panels(weight, parts)), bias, parts)

    def layer(self, weight, bias, parts=1):
        self.weights.append(weight)
        return super().layer(weight, bias, parts)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_takes_the_codes_of_its_file(name, kind, tmp_path):
    """Rows that converters move, fused and joined matrices, experts: the decoded numbers, at their places."""
    stored = file_in(tmp_path / "x.gguf", name, kind)
    floats, codes = Watched(coded=False), Watched(coded=True)
    tokens = some_tokens()
    expected = run(stored.decoder(torch.float32, CPU, linears=floats), tokens)
    seen: list[tuple[int, int]] = []
    decoder = stored.decoder(torch.float32, CPU, progress=lambda *done: seen.append(done), linears=codes)
    assert codes.num_coded >= 4 * stored.spec.num_layers
    assert floats.num_coded == 0
    assert len(codes.weights) == len(floats.weights)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(codes.weights, floats.weights, strict=True))
    assert torch.equal(run(decoder, tokens), expected)
    assert seen[-1][0] == seen[-1][1], "what is taken over counts as read"


def test_tensors_of_a_layer_may_differ_in_format(tmp_path):
    """As in the files that quantisers write, which keep some tensors in more bits: those are rounded."""
    model = build("llama-gqa-tied")
    kinds = {"attn_q": "Q4_1", "attn_k": "Q4_0", "attn_v": "Q8_0", "ffn_gate": "Q4_0", "ffn_up": "Q4_1"}
    tensors = {
        key: (values, next((kind for part, kind in kinds.items() if part in key), "Q5_0") if values.ndim > 1 else "F32")
        for key, values in tensors_of(model).items()
    }
    stored = GgufModel(write(tmp_path / "x.gguf", metadata_of(model.config), tensors))
    floats, codes = Watched(coded=False), Watched(coded=True)
    for maker in (floats, codes):
        stored.decoder(torch.float32, CPU, linears=maker)
    assert codes.num_coded == 3 * stored.spec.num_layers, "q, k and v, gate and up; all others are given as floats"
    kv_size = stored.spec.kv_size
    for number, (ours, theirs) in enumerate(zip(codes.weights, floats.weights, strict=True)):
        place = number % 5 if number < 5 * stored.spec.num_layers else None
        if place == 1:
            assert torch.equal(ours[:kv_size], theirs[:kv_size])
            assert torch.equal(ours[kv_size:], rounded(theirs[kv_size:]))
        else:
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_products_are_those_with_the_numbers_of_the_file(kind, tmp_path):
    """Native and plain: what the inputs are rounded to, times the file's own numbers."""
    rows, numbers = rows_in(kind, 96, 1024, 0)
    layer = choose_linear("int4", torch.float32, CPU).coded_layer((rows,), None, 1)
    x = torch.randn(5, 1024, generator=torch.Generator().manual_seed(3))
    x_codes, steps = quantise_inputs(x)
    inputs = (x_codes * steps.unsqueeze(2)).flatten(1).double()
    exact = inputs @ numbers.double().T
    # Each span of 32 is added up exactly and rounded a few times in float32.
    bound = 8 * 2.0**-24 * 1024 / SPAN * (inputs.abs() @ numbers.double().abs().T)
    for found in (layer(x), multiply_int4(x, coded_panels((rows,)), None)):
        assert ((found.double() - exact).abs() <= bound).all()


class Exact:
    """A layer in float64 whose inputs are rounded as the products round them."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight.double(), bias
        self.nbytes = weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x_codes, steps = quantise_inputs(x.reshape(-1, x.shape[-1]))
        inputs = (x_codes * steps.unsqueeze(2)).flatten(1)[:, : x.shape[-1]].double()
        out = inputs @ self._weight.T
        return (out if self._bias is None else out + self._bias).to(x.dtype).view(*x.shape[:-1], -1)


class ExactLinears(FrameworkLinears):
    """Layers of the numbers that they are given; the head in 8 bits, as beside layers in 4."""

    def layer(self, weight, bias, parts=1):
        return Exact(weight, bias)

    def head(self, weight):
        return choose_linear("int4", torch.float32, CPU).head(weight)


@pytest.mark.parametrize("name", ["llama-gqa-tied", "phi3", "gpt2"])
def test_logits_are_those_of_the_numbers_of_the_file(name, tmp_path):
    stored = file_in(tmp_path / "x.gguf", name, "Q4_0")
    tokens = some_tokens()
    expected = run(stored.decoder(torch.float32, CPU, linears=ExactLinears(CPU)), tokens)
    taken = run(stored.decoder(torch.float32, CPU, linears=choose_linear("int4", torch.float32, CPU)), tokens)
    # An input in a hundred thousand lies so near the middle between two codes that the last bit of a sum decides where
    # it goes, and moves the logits of its text by hundredths; to round the weights again moved all, by 0.15 to 0.33.
    assert (taken - expected).abs().mean() < 0.03


@pytest.mark.parametrize("name", ["float", "int4"])
@pytest.mark.parametrize(("part", "rows"), [("attn_v", 64), ("ffn_down", 32), ("attn_q", 32)])
def test_matrices_of_another_shape_are_refused_either_way(name, part, rows, tmp_path):
    model = build("llama-gqa-tied")
    tensors = {key: (values, "Q4_1" if values.ndim > 1 else "F32") for key, values in tensors_of(model).items()}
    key = f"blk.1.{part}.weight"
    tensors[key] = (np.zeros((rows, tensors[key][0].shape[1]), np.float32), "Q4_1")
    stored = GgufModel(write(tmp_path / "x.gguf", metadata_of(model.config), tensors))
    with pytest.raises(ModelError, match=rf"x\.gguf: .*\[{rows}, .*cannot make up layers\.1\."):
        stored.decoder(torch.float32, CPU, linears=choose_linear(name, torch.float32, CPU))


def auto_is(stored: str) -> str:
    """What `--weight-dtype auto` makes of a file here."""
    return stored if library.available() else "float"


@pytest.mark.parametrize(("kind", "format"), [("Q4_0", "int4"), ("Q4_1", "int4"), ("Q8_0", "float"), ("F16", "float")])
def test_the_doctor_says_which_files_stay_in_4_bits(kind, format, tmp_path):
    assert file_in(tmp_path / "x.gguf", "llama-gqa-tied", kind).weight_format == format
    finding = examine(str(tmp_path / "x.gguf"))
    assert finding.status == "ok"
    said = "of weights in int4 as its file has them (--weight-dtype float: " in finding.text
    assert said == (auto_is(format) == "int4")


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "F32"])
def test_one_matrix_in_more_bits_keeps_all_in_floats(kind, tmp_path):
    """To round it to 4 bits would cost more than it saves; norms, tables and routers are never rounded."""
    for name, part in (("llama-gqa-tied", "ffn_down"), ("mixtral", "attn_v"), ("mixtral", "ffn_gate_inp")):
        model = build(name)
        tensors = {
            key: (values, "F32" if values.ndim < 2 or "blk" not in key else kind if part in key else "Q4_0")
            for key, values in tensors_of(model).items()
        }
        stored = GgufModel(write(tmp_path / "x.gguf", metadata_of(model.config), tensors))
        assert stored.weight_format == ("int4" if part == "ffn_gate_inp" else "float")


def test_auto_keeps_the_4_bits_of_a_file_and_says_so(tmp_path):
    file_in(tmp_path / "x.gguf", "llama-gqa-tied", "Q4_1")
    prompt, params = list(range(20, 40)), SamplingParams(max_tokens=12, ignore_eos=True)
    found = {}
    for asked in ("auto", "float", "int8", "int4"):
        with LLM(str(tmp_path / "x.gguf"), policy="dense", dtype="float32", weight_dtype=asked) as llm:
            outputs = llm.generate([prompt], params)
            found[asked] = (outputs[0].token_ids, llm.decoder.weight_bytes)
            named = llm.weight_dtype, llm.describe()["weight_dtype"], outputs.report.setup.weight_format
        resolved = auto_is("int4") if asked == "auto" else asked
        assert named == (*["float32" if resolved == "float" else resolved] * 2, resolved)
    assert found["auto"] == found[auto_is("int4")]
    assert found["int4"][1] < found["int8"][1] < found["float"][1]


def test_what_auto_is_elsewhere():
    assert resolve_weight_dtype("auto", "int4", torch.device("meta")) == "float", "products in 4 bits are for CPUs"
    assert resolve_weight_dtype("auto", "float", CPU) == "float"
    assert resolve_weight_dtype("int8", "int4", CPU) == "int8"
