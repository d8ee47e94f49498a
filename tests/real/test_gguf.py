"""Real GGUF files: tokens, logits and continuations are those of transformers reading the same file."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
import transformers

pytest.importorskip("accelerate", reason="transformers needs it to read GGUF files")

from gguf.quants import dequantize

from alisa import LLM, SamplingParams
from alisa.model.coded import CodedRows
from alisa.model.families import find_family
from alisa.model.gguf.file import GgufFile
from alisa.model.linear_int4 import coded_panels
from alisa.model.stored import open_model
from alisa.model.tokenizer import Tokenizer
from tests.equivalence.test_gguf_codes import weight_of
from tests.equivalence.test_hf_logits import causal_of, run
from tests.real.conftest import Reference
from tests.real.texts import PROMPTS, varied_lines

pytestmark = [
    pytest.mark.real,
    # transformers holds the file open until it is collected.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
NUM_NEW = 16
TOLERANCE = 2e-3
"""float32: logits reach 40, and two libraries add up 18 to 30 layers of products in other orders; 1e-4 was seen."""


def chat(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def reference_prompt(reference: Reference, prompt: str) -> list[int]:
    """Through the chat template where the file has one."""
    tokenizer = reference.tokenizer
    if tokenizer.chat_template is None:
        return tokenizer(prompt).input_ids
    return tokenizer.apply_chat_template(chat(prompt), add_generation_prompt=True, return_dict=False)


def our_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    return tokenizer.encode_chat(chat(prompt)) if tokenizer.has_chat_template else tokenizer.encode(prompt)


def test_continuations_are_those_of_transformers(reference: Reference) -> None:
    """Each token that dense attention chooses is the best one for transformers too, given the ones before it."""
    with LLM(str(reference.path), policy="dense", dtype="float32", weight_dtype="float") as llm:
        prompts = [our_prompt(llm.tokenizer, prompt) for prompt in PROMPTS]
        outputs = llm.generate(prompts, SamplingParams(max_tokens=NUM_NEW))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = reference_prompt(reference, prompt)
        assert output.prompt_ids == tuple(ids)
        with torch.no_grad():
            logits = reference.model(torch.tensor([[*ids, *output.token_ids]])).logits[0, len(ids) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(output.token_ids)[:, None]).squeeze(1)
        assert (logits.amax(1) - chosen).max() < TOLERANCE, prompt
    assert sum(len(output.token_ids) for output in outputs) > 10 * len(PROMPTS)
    assert any("Paris" in output.text for output in outputs)


def test_logits_are_those_of_transformers(reference: Reference) -> None:
    decoder = open_model(reference.path).decoder(torch.float32, torch.device("cpu"))
    for prompt in PROMPTS[::3]:
        ids = torch.tensor([reference_prompt(reference, prompt)])
        with torch.no_grad():
            expected = reference.model(ids).logits
        torch.testing.assert_close(run(decoder, ids), expected, atol=TOLERANCE, rtol=0)


def test_logits_beyond_the_window_are_those_of_transformers(reference: Reference) -> None:
    """700 tokens of prose; the layers of Gemma that have a window see 512."""
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    ids = torch.tensor([reference.tokenizer(text).input_ids[:700]])
    decoder = open_model(reference.path).decoder(torch.float32, torch.device("cpu"))
    positions = torch.arange(ids.shape[1])[None]
    hidden = decoder.forward(ids, positions, causal_of(decoder), torch.full_like(ids, ids.shape[1]))
    with torch.no_grad():
        expected = reference.model(ids, logits_to_keep=40).logits[0]
    torch.testing.assert_close(decoder.logits(hidden[0, -40:]), expected, atol=TOLERANCE, rtol=0)


def test_ids_and_text_of_varied_lines_are_those_of_transformers(
    model_path: Path, their_tokenizer: transformers.PreTrainedTokenizerBase
) -> None:
    ours, theirs = open_model(model_path).tokenizer(), their_tokenizer
    differing = []
    for line in varied_lines(1000):
        ids = ours.encode(line)
        expected = theirs(line).input_ids
        if ids != expected or ours.decode(ids) != theirs.decode(expected, skip_special_tokens=True):
            differing.append(line)
    assert not differing, f"{len(differing)} lines differ, such as {differing[0]!r}"


def test_a_file_that_transformers_has_saved_again_means_the_same(reference: Reference, tmp_path: Path) -> None:
    reference.model.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "_model_name_or_path" in config, "what transformers adds to the config of a GGUF file"
    assert find_family(config["model_type"]).to_spec(config) == open_model(reference.path).spec


def test_every_line_comes_back(model_path: Path) -> None:
    tokenizer = open_model(model_path).tokenizer()
    for line in varied_lines(1000):
        if "<" not in line and "▁" not in line:  # control tokens that are spelled out do not come out
            assert tokenizer.decode(tokenizer.encode(line)) == line


def test_weights_in_4_bits_are_those_of_the_file(model_path: Path) -> None:
    """Every matrix whose blocks are taken over stands for the numbers that the gguf package makes of it."""
    file, checked = GgufFile(model_path), 0
    for tensor in gguf.GGUFReader(model_path).tensors:
        block_type = file.tensors[tensor.name].block_type
        if block_type.spans is None:
            continue
        rows = CodedRows(file.read_blocks(tensor.name), block_type.spans, int(tensor.shape[0]))
        expected = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
        # The ranges of Q4_K are rounded to float16: half a step of it for the minimum, and 15 times that of the scale.
        tolerance = 0.0 if block_type.name != "Q4_K" else 2.0**-10 * float(expected.abs().max())
        torch.testing.assert_close(weight_of(coded_panels((rows,))), expected, atol=tolerance, rtol=0)
        checked += 1
    assert checked >= 27


def test_weights_of_4_bits_stay_so_where_all_have_them(model_path: Path) -> None:
    """Most matrices of Gemma's file have 5 to 8 bits, and to round them to 4 costs it 29 % of perplexity."""
    assert open_model(model_path).weight_format == ("int4" if "SmolLM2" in model_path.name else "float")
