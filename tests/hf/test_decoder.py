"""Any decoder of transformers behind alisa's own engine and evaluations: `alisa eval --engine hf`."""

import json

import pytest
import torch
import transformers

from alisa import LLM, SamplingParams
from alisa.cli.main import main
from alisa.config import EngineConfig
from alisa.errors import InputError
from alisa.hf.decoder import TransformersDecoder, load_transformers
from tests.hf.families import FAMILIES, Prompts, family, redrawn, small_config
from tests.hf.families import ready as ready_model
from tests.tiny_models import build

PROMPTS = Prompts((20, 13, 5))


@pytest.fixture(scope="session")
def cohere(tmp_path_factory, tiny_model):
    """A directory with a model of a family that is not ours, and a tokenizer."""
    directory = tmp_path_factory.mktemp("cohere")
    redrawn(transformers.AutoModelForCausalLM.from_config(small_config("Cohere"))).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_text((tiny_model("llama-gqa-tied") / name).read_text())
    return directory


def said(llm, prompts=PROMPTS, num_new=20):
    params = SamplingParams(max_tokens=num_new, ignore_eos=True)
    return [list(output.token_ids) for output in llm.generate(prompts.ids, params)]


def test_the_engine_says_what_transformers_says(cohere):
    options = {"model": str(cohere), "policy": "dense", "max_num_seqs": 2, "prefill_chunk": 16}
    config = EngineConfig(**options)
    with LLM(config=config, loaded=load_transformers(config)) as llm:
        found = said(llm)
    model = ready_model(transformers.AutoModelForCausalLM.from_pretrained(cohere))
    expected = model.generate(**PROMPTS.padded, max_new_tokens=20)[:, 20:]
    assert found == expected.tolist()


@pytest.mark.parametrize("policy", ["sketch", "swa"])
def test_a_sparse_policy_says_what_it_says_on_our_decoder(policy, tiny_model):
    prompts, options = Prompts((60, 33, 47)), {"policy": policy, "sparsity": 0.6}
    config = EngineConfig(model=str(tiny_model("gemma3")), **options)
    with LLM(config=config, loaded=load_transformers(config)) as theirs, LLM(config=config) as ours:
        assert said(theirs, prompts, 40) == said(ours, prompts, 40)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "phi3-longrope"])
def test_a_packed_pass_has_the_logits_of_each_text(name):
    texts = [torch.tensor([ids]) for ids in Prompts((9, 14)).ids]
    model = family(name)
    with torch.no_grad():
        expected = torch.cat([model(text).logits for text in texts], dim=1)
    decoder = TransformersDecoder(model)
    try:
        assert torch.equal(*_packed(decoder, texts, expected))
    finally:
        ready_model(model)


def _packed(decoder, texts, expected):
    """Best tokens of both; attention is done here, text by text."""
    lengths = [text.shape[1] for text in texts]
    shape = decoder.spec.attention

    def attend(layer, q, k, v, hidden):
        outs = []
        for q1, k1, v1 in zip(*(tensor[0].split(lengths) for tensor in (q, k, v)), strict=True):
            group = shape.num_heads // shape.num_kv_heads
            scores = torch.einsum("thd,shd->hts", q1, k1.repeat_interleave(group, 1)) * shape.scale
            if shape.softcap:
                scores = shape.softcap * torch.tanh(scores / shape.softcap)
            back = torch.arange(len(q1))[:, None] - torch.arange(len(q1))
            window = shape.window(layer) or len(q1)
            scores = scores.masked_fill((back < 0) | (back >= window), -torch.inf)
            if decoder.sinks is not None:
                sinks = decoder.sinks[layer][:, None, None].expand(-1, len(q1), 1)
                scores = torch.cat((scores, sinks), dim=-1)
            weights = scores.softmax(-1)[..., : len(q1)]
            outs.append(torch.einsum("hts,shd->thd", weights, v1.repeat_interleave(group, 1)))
        return torch.cat(outs)[None]

    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    hidden = decoder.forward(torch.cat(texts, dim=1), positions, attend)
    return decoder.logits(hidden).argmax(-1), expected.argmax(-1)


def test_models_that_look_at_the_batch_are_refused():
    bloom = small_config("Bloom", n_layer=2, n_head=4)
    with pytest.raises(InputError, match="takes no positions"):
        TransformersDecoder(transformers.AutoModelForCausalLM.from_config(bloom).eval())
    with pytest.raises(InputError, match="longest sequence in a batch"):
        TransformersDecoder(ready_model(build("phi3-longrope")))


def test_evaluations_run_on_families_that_we_do_not_have(cohere, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{3 + i * 7 % 110}" for i in range(400)))
    command = ["eval", "ppl", "--text", str(text), "--model", str(cohere), "--engine", "hf", "--context", "64"]
    options = ["--prefill", "16", "--windows", "2", "--policy", "sketch", "--sparsity", "0,0.8", "--json"]
    assert main([*command, *options]) == 0
    cells = json.loads(capsys.readouterr().out.splitlines()[-1])["cells"]
    assert [cell["policy"] for cell in cells] == ["dense", "sketch", "sketch"]
    assert all(cell["model"].endswith("in transformers") for cell in cells)
    assert cells[1]["versus_dense"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "why"), [([], "runs a --model"), (["--model", "DIR", "--weight-dtype", "int8"], "weights as they are")]
)
def test_what_transformers_does_not_load_is_refused(options, why, cohere, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("w3 w4")
    options = [str(cohere) if word == "DIR" else word for word in options]
    assert main(["eval", "ppl", "--text", str(text), "--engine", "hf", *options]) == 2
    assert why in capsys.readouterr().err
