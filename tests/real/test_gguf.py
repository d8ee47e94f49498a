"""Real GGUF files: tokens, logits and continuations are those of transformers reading the same file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="transformers needs it to read GGUF files")

from alisa import LLM, SamplingParams
from alisa.model.gguf.file import GgufFile
from alisa.model.gguf.tokenizer import build_tokenizer
from alisa.model.stored import open_model
from alisa.model.tokenizer import Tokenizer
from tests.equivalence.test_hf_logits import run
from tests.real.conftest import Reference, path_of, reference_tokenizer
from tests.real.texts import PROMPTS, varied_lines

pytestmark = [
    pytest.mark.real,
    # transformers holds the file open until it is collected.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
NUM_NEW = 24


def chat(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def reference_chat(reference: Reference, prompt: str) -> list[int]:
    return reference.tokenizer.apply_chat_template(chat(prompt), add_generation_prompt=True, return_dict=False)


def test_smollm2_answers_as_in_transformers(smollm2: Path, smollm2_reference: Reference) -> None:
    """Each token that dense attention chooses is the best one for transformers too, given the ones before it."""
    with LLM(str(smollm2), policy="dense", dtype="float32") as llm:
        prompts = [llm.chat_prompt(chat(prompt)) for prompt in PROMPTS]
        outputs = llm.generate(prompts, SamplingParams(max_tokens=NUM_NEW))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = reference_chat(smollm2_reference, prompt)
        assert output.prompt_ids == tuple(ids)
        with torch.no_grad():
            logits = smollm2_reference.model(torch.tensor([[*ids, *output.token_ids]])).logits[0, len(ids) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(output.token_ids)[:, None]).squeeze(1)
        # Two sums of 1536 float32 products in another order, 30 layers: 1e-4 was seen; a wrong choice misses by more.
        assert (logits.amax(1) - chosen).max() < 2e-3, prompt
    assert any("Paris" in output.text for output in outputs)


def test_smollm2_logits_are_those_of_transformers(smollm2: Path, smollm2_reference: Reference) -> None:
    decoder = open_model(smollm2).decoder(torch.float32, torch.device("cpu"))
    for prompt in PROMPTS[::3]:
        ids = torch.tensor([reference_chat(smollm2_reference, prompt)])
        with torch.no_grad():
            expected = smollm2_reference.model(ids).logits
        torch.testing.assert_close(run(decoder, ids), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", ["SMOLLM2", "GEMMA3"])
def test_ids_and_text_of_varied_lines_are_those_of_transformers(name: str) -> None:
    import real_models

    path = path_of(getattr(real_models, name))
    ours, theirs = build_tokenizer(GgufFile(path).metadata, path.name), reference_tokenizer(path)
    differing = []
    for line in varied_lines(1000):
        ids = ours.encode(line)
        expected = theirs(line).input_ids
        if ids != expected or ours.decode(ids) != theirs.decode(expected, skip_special_tokens=True):
            differing.append(line)
    assert not differing, f"{len(differing)} lines differ, such as {differing[0]!r}"


def test_every_line_comes_back(smollm2: Path) -> None:
    tokenizer: Tokenizer = open_model(smollm2).tokenizer()
    for line in varied_lines(1000):
        if "<|" not in line:  # control tokens that are spelled out do not come out
            assert tokenizer.decode(tokenizer.encode(line)) == line
