"""The engine against transformers and against a plain Algorithm 1, token for token."""

import json
from typing import get_args

import pytest
import torch
from transformers import AutoModelForCausalLM

from alisa import LLM, SamplingParams
from alisa.cache.codec import make_codec
from alisa.config import PolicyName
from alisa.engine import loaded
from alisa.errors import InputError
from alisa.kernels.choose import REFERENCE_BACKEND, choose_backend
from alisa.kernels.native import library
from alisa.kernels.native import prefill as cpu_prefill
from alisa.kernels.native.prefill_engine import NativePrefill
from alisa.kernels.reference.prefill import prefill_attention
from alisa.lab.scoring import ScoredItem, teacher_forced
from alisa.model.loader import load_decoder
from alisa.policy.dense import Dense
from alisa.policy.registry import make_policy, reads_of
from alisa.spec import RowFormat
from tests.caps import device_cap
from tests.combinations import each
from tests.equivalence.plain_swa import teacher_forced_logits
from tests.equivalence.test_hf_logits import TOLERANCE
from tests.shared import stories260k
from tests.tiny_models import TINY_MODELS

NEW_TOKENS = 64
PROMPT_LENGTHS = (3, 41, 17, 60, 33)  # and 64 new tokens stay within the 128 positions of the tiny models


def make_prompts(vocab_size, lengths=PROMPT_LENGTHS, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def greedy(llm, prompts, **params):
    outputs = llm.generate(prompts, SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, **params))
    return [list(output.token_ids) for output in outputs]


def assert_likeliest(logits, prompt, output):
    """No token of `output` is less likely than another by Float32[S, V] logits, up to rounding: two implementations
    sum in different orders, and which of two all but equal tokens wins depends on the processor."""
    scored = logits[len(prompt) - 1 : -1]
    chosen = scored.gather(1, torch.tensor(output)[:, None])[:, 0]
    assert float((scored.amax(dim=-1) - chosen).max()) <= 2 * TOLERANCE


def assert_transformers_agrees(directory, prompts, outputs):
    """Every token is the one transformers finds likeliest after all before it: by induction, its greedy
    continuation."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    # The shortest first: a dynamic rope in transformers keeps the angles of the longest sequence that it has seen.
    for prompt, output in sorted(zip(prompts, outputs, strict=True), key=lambda pair: len(pair[0])):
        assert len(output) == NEW_TOKENS
        with torch.no_grad():
            # Without the last token, which the engine never feeds: ropes that look at the length would see another.
            logits = model(input_ids=torch.tensor([prompt + output[:-1]]), use_cache=False).logits[0]
        assert_likeliest(torch.cat((logits, logits[-1:])), prompt, output)


@pytest.mark.parametrize("family", TINY_MODELS)
def test_dense_greedy_equals_transformers_in_a_ragged_batch(family, tiny_model):
    directory = tiny_model(family)
    llm = LLM(directory, policy="dense", dtype="float32", max_num_seqs=4, prefill_chunk=50)
    prompts = make_prompts(llm.spec.vocab_size)
    assert_transformers_agrees(directory, prompts, greedy(llm, prompts))


@pytest.mark.parametrize("policy", ["swa", "h2o", "sketch", "sketch-head", "streaming", "dense"])
def test_a_policy_chooses_in_layers_without_a_window_and_the_others_read_theirs(policy, tiny_model):
    llm = LLM(tiny_model("gemma3"), policy=policy, sparsity=0.5, dtype="float32")
    assert llm.spec.windows == (11, 11, None)
    prompts = make_prompts(llm.spec.vocab_size)
    with llm.stream(prompts, SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)) as stream:
        list(stream)
    summary = stream.report().summary
    reads = reads_of(policy, 0.5)
    attended = dense = 0
    for prompt in prompts:
        for length in range(len(prompt) + 1, len(prompt) + NEW_TOKENS):
            attended += 2 * min(length, 11) + sum(reads(length - 1)) + 1
            dense += 2 * min(length, 11) + length
    assert summary.tokens_attended == attended
    assert summary.tokens_dense == dense
    full = LLM(tiny_model("mistral"), policy=policy, sparsity=0.5, dtype="float32")
    shapes = [model.spec.attention.full_layers().num_layers for model in (llm, full)]
    assert shapes == [1, 3]


def test_a_model_with_nothing_to_choose_says_so(tiny_model, caplog):
    LLM(tiny_model("mistral-window"), policy="sketch").generate([[5, 6]], SamplingParams(max_tokens=2))
    assert "every layer of this model has a sliding window of 9 tokens" in caplog.text
    caplog.clear()
    LLM(tiny_model("mistral-window"), policy="dense").generate([[5, 6]], SamplingParams(max_tokens=2))
    LLM(tiny_model("gemma3"), policy="sketch").generate([[5, 6]], SamplingParams(max_tokens=2))
    assert "sliding window" not in caplog.text


def test_a_schedule_that_deletes_is_refused_where_keys_cannot_be_rebuilt(tiny_model, tmp_path):
    schedule = tmp_path / "schedule.json"
    phases = {"offload_from": 3, "recompute_from": 8, "offload_ratio": 0.7, "recompute_ratio": 0.6}
    schedule.write_text(json.dumps({"schedule": "three-phase"} | phases))
    llm = LLM(tiny_model("phi3-longrope"), schedule=schedule, kv_device_memory="64KiB", max_model_len=60)
    with pytest.raises(InputError, match="rotated by the length of the sequence"):
        llm.generate([[5, 6]], SamplingParams(max_tokens=2))


def test_stories260k_equals_transformers():
    directory = stories260k()
    llm = LLM(directory, policy="dense", dtype="float32")
    texts = ["Once upon a time", "Lily and Tom went to the park.", "The little dog", "One day, a big", "He"]
    prompts = [llm.tokenizer.encode(text) for text in texts]
    assert_transformers_agrees(directory, prompts, greedy(llm, prompts))


@pytest.mark.parametrize("family", [pytest.param("opt", marks=pytest.mark.slow), "llama-gqa-tied"])
def test_sparsity_zero_equals_dense_for_every_policy(family, tiny_model):
    directory = tiny_model(family)
    prompts = make_prompts(LLM(directory).spec.vocab_size)
    dense = greedy(LLM(directory, policy="dense", dtype="float32"), prompts)
    for policy in get_args(PolicyName):
        assert greedy(LLM(directory, policy=policy, sparsity=0.0, dtype="float32"), prompts) == dense, policy


@each(family=["opt", "llama"], sparsity=[0.5, 0.8])
def test_swa_equals_a_plain_algorithm_1(family, sparsity, tiny_model):
    directory = tiny_model(family)
    llm = LLM(directory, policy="swa", sparsity=sparsity, dtype="float32", max_num_seqs=3)
    prompts = make_prompts(llm.spec.vocab_size)
    outputs = greedy(llm, prompts)
    for prompt, output in zip(prompts, outputs, strict=True):
        logits = teacher_forced_logits(directory, prompt + output, len(prompt), sparsity)
        assert_likeliest(logits, prompt, output)
    # the reference is no tautology: with another sparsity it disagrees somewhere
    other = [teacher_forced_logits(directory, p + o, len(p), 0.95) for p, o in zip(prompts, outputs, strict=True)]
    assert any(other[i][len(prompt) - 1 : -1].argmax(dim=-1).tolist() != outputs[i] for i, prompt in enumerate(prompts))


@pytest.mark.parametrize("policy", get_args(PolicyName))
def test_a_batch_gives_what_each_request_gives_alone(policy, tiny_model):
    directory = tiny_model("llama-gqa-tied")
    llm = LLM(directory, policy=policy, dtype="float32", max_num_seqs=3, prefill_chunk=32)
    prompts = make_prompts(llm.spec.vocab_size)
    params = [
        SamplingParams(max_tokens=20 + 7 * i, temperature=0.9 * (i % 2), top_p=0.9, seed=i, ignore_eos=True)
        for i in range(len(prompts))
    ]
    together = [output.token_ids for output in llm.generate(prompts, params)]
    alone = [llm.generate([prompt], [rules])[0].token_ids for prompt, rules in zip(prompts, params, strict=True)]
    assert together == alone


@pytest.mark.parametrize(
    ("policy", "kv_dtype"), [*((name, "float32") for name in get_args(PolicyName)), ("swa", "int8"), ("swa", "k8v4")]
)
def test_native_kernels_give_the_tokens_of_the_torch_twin(policy, kv_dtype, tiny_model, monkeypatch):
    if not library.available():
        pytest.skip(library.unavailable_reason())
    directory = tiny_model("llama-gqa-tied")
    native = LLM(directory, policy=policy, dtype="float32", kv_dtype=kv_dtype)
    # The same linear layers: other sums would give other tokens, sooner or later.
    monkeypatch.setattr(loaded, "choose_backend", lambda _: REFERENCE_BACKEND)
    reference = LLM(directory, policy=policy, dtype="float32", kv_dtype=kv_dtype)
    assert (native.describe()["attention"], reference.describe()["attention"]) == (library.isa_names()[0], "torch")
    prompts = make_prompts(native.spec.vocab_size, seed=8)
    rules = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=2)
    pairs = list(zip(native.generate(prompts, rules), reference.generate(prompts, rules), strict=True))
    # Where they part, the tokens are all but equally likely: the last bits of sums differ from processor to processor,
    # and where a value lies between two codes of a row, that row differs by a step of its range.
    gap = {"float32": 2 * TOLERANCE, "int8": 1 / 255, "k8v4": 1 / 15}[kv_dtype]
    for found, expected in pairs:
        for one, other in zip(found.logprobs, expected.logprobs, strict=True):
            if one.token_id != other.token_id:
                (_, likeliest), (token_id, next_to_it) = other.top
                assert token_id == one.token_id
                assert likeliest - next_to_it < gap
                break
    assert sum(found.token_ids == expected.token_ids for found, expected in pairs) > len(pairs) / 2


@pytest.mark.parametrize("policy", ["sketch", "sketch-head", "sketch-mean"])
def test_a_coverage_reads_less_and_says_what_it_covers(policy):
    """Of the trained model: a random one spreads its attention evenly, and nothing less covers anything."""
    prompt = "It was a dark night, and the ship had been at sea for three weeks when the captain called all men. " * 8
    settings = SamplingParams(max_tokens=16, ignore_eos=True)

    def summary(**options):
        with LLM(policy=policy, sparsity=0.5, dtype="float32", **options) as llm:
            return llm.generate([prompt, prompt[:300]], settings).report.summary

    fixed, half, most = summary(), summary(coverage=0.5), summary(coverage=0.95)
    assert fixed.covered is None
    assert half.tokens_attended < most.tokens_attended <= fixed.tokens_attended
    assert 0.5 <= half.covered < most.covered <= 1


@pytest.mark.parametrize(("kv_dtype", "most_kl"), [("int8", 1e-3), ("k8v4", 0.02), ("int4", 0.2)])
def test_quantised_rows_hardly_change_the_distributions(kv_dtype, most_kl):
    """Measured: 2.4e-4 and 0.12 nats per token on this model of 8 values a head; a wrong scale gives several nats."""
    llm = LLM(stories260k(), policy="dense")
    outputs = llm.generate(["Once upon a time", "Tom had a red ball."], SamplingParams(max_tokens=NEW_TOKENS))
    items = [ScoredItem(output.prompt_ids, output.token_ids) for output in outputs]
    decoder = load_decoder(stories260k(), torch.float32, torch.device("cpu"))
    exact, packed = (
        teacher_forced(
            decoder,
            Dense(),
            make_codec(RowFormat(dtype, decoder.spec.num_kv_heads, decoder.spec.head_dim)),
            choose_backend(decoder.device),
            items,
            prefill_chunk=64,
        )
        for dtype in ("float32", kv_dtype)
    )
    divergences = [
        (expected.logits.softmax(-1) * (expected.logits.log_softmax(-1) - actual.logits.log_softmax(-1))).sum(-1)
        for expected, actual in zip(exact, packed, strict=True)
    ]
    mean = float(torch.cat(divergences).mean())
    assert 0 < mean < most_kl


@pytest.mark.parametrize("policy", [Dense(), make_policy("sketch", 0.5)], ids=["dense", "sketch"])
@pytest.mark.parametrize("kv_dtype", ["int4", "k8v4"])
def test_heads_in_several_parts_are_read_as_the_torch_twin_reads_them(kv_dtype, policy, tiny_model):
    """Up to codes that fall to the other side of a half; against what 4 bits lose that is next to nothing."""
    decoder = load_decoder(tiny_model("llama-long-heads"), torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(3, decoder.spec.vocab_size, (2, 60), generator=generator).tolist()
    items = [ScoredItem(tuple(prompt), tuple(prompt[:NEW_TOKENS])) for prompt in prompts]

    def logits(kv_dtype, backend):
        codec = make_codec(RowFormat(kv_dtype, decoder.spec.num_kv_heads, decoder.spec.head_dim))
        steps = teacher_forced(decoder, policy, codec, backend, items, prefill_chunk=16)
        return torch.cat([step.logits for step in steps])

    native = choose_backend(decoder.device)
    exact, found, expected = logits("float32", native), logits(kv_dtype, native), logits(kv_dtype, REFERENCE_BACKEND)
    assert (found - expected).square().mean() < 0.02 * (expected - exact).square().mean()


@pytest.mark.parametrize(("kv_dtype", "prefill_chunk"), [("bfloat16", 1024), ("bfloat16", 16), ("int8", 16)])
def test_the_prefill_kernel_is_as_near_to_float32_as_torch_is(kv_dtype, prefill_chunk):
    if not cpu_prefill.available():
        pytest.skip("this CPU or build has no prefill kernels")
    wide, decoder = (
        load_decoder(stories260k(), dtype, torch.device("cpu")) for dtype in (torch.float32, torch.bfloat16)
    )
    generator = torch.Generator().manual_seed(5)
    prompts = torch.randint(10, decoder.spec.vocab_size, (3, 90), generator=generator).tolist()
    items = [ScoredItem(tuple(prompt), tuple(prompt[:NEW_TOKENS])) for prompt in prompts]
    kernels = choose_backend(decoder.device)
    assert isinstance(kernels.prefill, NativePrefill)
    torch_kernels = kernels._replace(prefill=prefill_attention)

    def logits(decoder, kernels, kv_dtype):
        codec = make_codec(RowFormat(kv_dtype, decoder.spec.num_kv_heads, decoder.spec.head_dim))
        policy = make_policy("swa", 0.3)  # has an observation window
        steps = teacher_forced(decoder, policy, codec, kernels, items, prefill_chunk=prefill_chunk)
        return torch.cat([step.logits for step in steps]).log_softmax(-1)

    exact = logits(wide, torch_kernels, "float32")
    native, reference = (
        float((exact.exp() * (exact - logits(decoder, chosen, kv_dtype))).sum(-1).mean())
        for chosen in (kernels, torch_kernels)
    )
    # Both err by the rounding of bfloat16, each in its own way; a wrong scale or mask costs a hundred times as much.
    assert 0 < native < 1.5 * reference, (native, reference)


def test_long_prompts_in_pieces_equal_one_pass(tiny_model):
    directory = tiny_model("llama")
    prompts = make_prompts(LLM(directory).spec.vocab_size, (64, 51))
    for policy in ("dense", "swa"):
        whole, pieces = (
            greedy(LLM(directory, policy=policy, dtype="float32", prefill_chunk=chunk), prompts) for chunk in (1024, 13)
        )
        assert whole == pieces


def test_a_tight_cap_makes_requests_wait_and_changes_no_token(tiny_model):
    directory = tiny_model("llama")
    most = max(PROMPT_LENGTHS) + NEW_TOKENS
    options = {"dtype": "float32", "max_num_seqs": len(PROMPT_LENGTHS), "max_model_len": most, "kv_disk_memory": 0}
    free = LLM(directory, **options)
    prompts = make_prompts(free.spec.vocab_size)
    tight = LLM(directory, **options, kv_device_memory=device_cap(free, most - 1))
    outputs = tight.generate(prompts, SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True))
    assert [list(output.token_ids) for output in outputs] == greedy(free, prompts)
    records = outputs.report.records
    assert max(record.kv_bytes + record.state_bytes for record in records) <= tight.config.kv_device_memory
    assert max(record.num_sequences for record in records) < len(prompts)


def test_a_window_that_no_sequence_outgrows_is_none(tiny_model, caplog):
    short = LLM(tiny_model("mistral-window"), policy="streaming", sparsity=0.5, dtype="float32", max_model_len=9)
    outputs = short.generate([[5, 6, 7]], SamplingParams(max_tokens=6, ignore_eos=True))
    assert "sliding window" not in caplog.text
    reads = reads_of("streaming", 0.5)
    assert outputs.report.summary.tokens_attended == 3 * sum(sum(reads(length - 1)) + 1 for length in range(4, 9))
    dense, windowed = (
        LLM(tiny_model("mistral-window"), policy="dense", dtype="float32", max_model_len=n) for n in (9, 60)
    )
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    assert dense.generate([[5, 6, 7]], params)[0].token_ids == windowed.generate([[5, 6, 7]], params)[0].token_ids
