"""Long prompts that are read sparsely get the same bits in any pieces, company and place, and from a prefix cache."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alisa import LLM, SamplingParams
from alisa.budget import DENSE_TOKENS
from alisa.engine.builder import check_sparse_prompts
from alisa.errors import InputError
from alisa.kernels.native import prefill as cpu_prefill
from alisa.lab.verify import verify_outputs
from alisa.policy.registry import POLICIES, observes_prompts
from tests.caps import device_cap
from tests.equivalence.test_company import run
from tests.equivalence.test_prefix_cache import cached, ids

SIZES = {"max_num_seqs": 3, "max_model_len": DENSE_TOKENS + 700, "policy": "sketch", "sparsity": 0.5}
NEW_TOKENS = 3
PREFIX_BYTES = 1 << 20
ALPHA = 0.9
"""Far above what is of use, so that a random model's prompts are read sparsely."""


@pytest.fixture(scope="module")
def directory(tiny_model, tmp_path_factory):
    """A tiny model with positions enough."""
    found = tmp_path_factory.mktemp("long") / "model"
    shutil.copytree(tiny_model("llama-gqa-tied"), found)
    fields = json.loads((found / "config.json").read_text())
    (found / "config.json").write_text(json.dumps(fields | {"max_position_embeddings": 4096}))
    return found


def prompts_of(llm, lengths):
    """Prompts that begin alike, for different lengths."""
    first = ids(llm, DENSE_TOKENS + 600, 1)
    return [first[:-100][: length - 30] + ids(llm, 30, 2 + length) for length in lengths]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_comes_late_is_read_sparsely(directory, dtype):
    dense, sparse = (LLM(directory, dtype=dtype, sparse_prompts=alpha, **SIZES) for alpha in (None, ALPHA))
    early, late = prompts_of(dense, [DENSE_TOKENS, DENSE_TOKENS + 320])
    assert run(sparse, [early], new_tokens=1) == run(dense, [early], new_tokens=1)
    assert run(sparse, [late], new_tokens=1).logits != run(dense, [late], new_tokens=1).logits


@pytest.mark.skipif(
    not cpu_prefill.available(), reason="plain torch copies what it reads, and adds up in another order"
)
def test_all_blocks_are_dense_attention(directory):
    dense, sparse = (LLM(directory, dtype="bfloat16", sparse_prompts=alpha, **SIZES) for alpha in (None, 0.0))
    prompts = prompts_of(dense, [DENSE_TOKENS + 300])
    assert run(sparse, prompts, new_tokens=NEW_TOKENS) == run(dense, prompts, new_tokens=NEW_TOKENS)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("bfloat16", {"prefill_chunk": 100}),
        ("bfloat16", {"prefill_chunk": 700, "prefix_cache": True, "policy": "dense"}),
        ("bfloat16", {"max_step_tokens": 200, "kv_dtype": "int8", "prefix_cache": True}),
        ("bfloat16", {"max_step_tokens": 100, "policy": "streaming"}),
        ("float32", {"prefill_chunk": 330, "prefix_cache": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_pieces_company_threads_and_hits_change_nothing(directory, dtype, options):
    options = {"dtype": dtype, "sparse_prompts": ALPHA, **SIZES} | options
    plain = LLM(directory, **options | {"prefix_cache": False, "prefill_chunk": 1024, "max_step_tokens": None})
    pieces = LLM(directory, **options)
    prompts = prompts_of(plain, [DENSE_TOKENS + 250, DENSE_TOKENS + 430, 50, DENSE_TOKENS + 500])
    alone = [run(plain, [prompt], new_tokens=NEW_TOKENS) for prompt in prompts]
    expected = alone[0] + alone[1] + alone[2] + alone[3]
    assert run(pieces, prompts, new_tokens=NEW_TOKENS) == expected
    assert run(pieces, prompts[::-1], num_threads=2, new_tokens=NEW_TOKENS).logits == expected.logits


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(DENSE_TOKENS - 100, DENSE_TOKENS + 600), min_size=2, max_size=3),
    chunk=st.integers(60, 1100),
    share=st.sampled_from([None, 0.3, 0.6]),
    keeps=st.booleans(),
    has_disk=st.booleans(),
)
def test_no_placement_changes_a_token(directory, lengths, chunk, share, keeps, has_disk):
    """Without a disk, and with room for one of the prompts, the others are read again."""
    options = {"dtype": "bfloat16", "sparse_prompts": ALPHA, **SIZES}
    plain = LLM(directory, **options)
    prompts = prompts_of(plain, lengths)
    cap = None if share is None else device_cap(plain, int(sum(lengths) * share)) + keeps * PREFIX_BYTES
    placed = LLM(
        directory,
        **options,
        kv_device_memory=cap,
        kv_disk_memory=0 if share == 0.6 and not has_disk else None,
        prefill_chunk=chunk,
        prefix_cache=keeps,
        prefix_cache_memory=PREFIX_BYTES if keeps else None,
    )
    expected = [run(plain, [prompt], new_tokens=NEW_TOKENS).tokens[0] for prompt in prompts]
    for _ in range(2 if keeps else 1):
        assert run(placed, prompts, new_tokens=NEW_TOKENS).tokens == expected


def test_a_last_block_that_is_not_whole_is_kept_for_nobody(directory):
    options = {"dtype": "bfloat16", "sparse_prompts": ALPHA, **SIZES}
    plain, keeps = LLM(directory, **options), LLM(directory, **options, prefix_cache=True)
    first = ids(plain, DENSE_TOKENS + 500, 1)
    prompts = [first[:end] for end in (DENSE_TOKENS + 120, DENSE_TOKENS + 310, DENSE_TOKENS + 320, DENSE_TOKENS + 400)]
    hits = [0, 64, 256, 320]  # the last token of a prompt is always read
    for prompt, hit in zip(prompts, hits, strict=True):
        expected = run(plain, [prompt], new_tokens=NEW_TOKENS)
        [output] = keeps.generate([prompt], SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True))
        assert output.token_ids == expected.tokens[0]
        assert cached([output]) == [DENSE_TOKENS + hit if hit else 0]
        assert run(keeps, [prompt], new_tokens=NEW_TOKENS) == expected


def test_answers_are_read_as_prompts_are(directory):
    options = {"dtype": "bfloat16", "sparse_prompts": ALPHA, **SIZES}
    plain, keeps = LLM(directory, **options), LLM(directory, **options, prefix_cache=True)
    prompt = ids(plain, DENSE_TOKENS + 100, 3)
    params = SamplingParams(max_tokens=80, ignore_eos=True)
    [said] = keeps.generate([prompt], params)
    following = [*prompt, *said.token_ids, *ids(plain, 40, 4)]
    assert run(keeps, [following], new_tokens=NEW_TOKENS) == run(plain, [following], new_tokens=NEW_TOKENS)


def test_files_are_those_of_one_alpha(directory, tmp_path):
    options = {"dtype": "bfloat16", **SIZES, "prefix_cache": True, "prefix_cache_disk": tmp_path}
    prompt = ids(LLM(directory, **SIZES), DENSE_TOKENS + 200, 1)
    hits = []
    for alpha in (None, ALPHA, ALPHA, 0.4, None):
        with LLM(directory, **options, sparse_prompts=alpha) as llm:
            hits += cached(llm.generate([prompt], SamplingParams(max_tokens=1)))
    assert hits == [0, 0, DENSE_TOKENS + 192, 0, DENSE_TOKENS + 192]


def test_verify_tells_what_sparse_prompts_change(directory):
    options = {"dtype": "bfloat16", **SIZES, "policy": "dense"}
    dense, sparse = LLM(directory, **options), LLM(directory, **options, sparse_prompts=0.9, prefill_chunk=100)
    prompts = prompts_of(dense, [DENSE_TOKENS + 300])
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    assert verify_outputs(dense, dense.generate(prompts, params)).mean_kl == 0
    assert verify_outputs(sparse, sparse.generate(prompts, params)).mean_kl > 1e-4


def test_policies_that_look_at_prompts_are_refused():
    refused = {"h2o", "swa", "swa-head"}
    assert {name for name in POLICIES if observes_prompts(name)} == refused
    for name in refused:
        with pytest.raises(InputError, match=f"{name} looks at the whole attention of a prompt.*choose dense, local"):
            LLM(policy=name, sparse_prompts=0.03)
    with pytest.raises(InputError, match="exact gives the tokens of dense attention"):
        LLM(exact=True, sparse_prompts=0.03)
    for alpha in (-0.1, 1.0):
        with pytest.raises(InputError, match=r"sparse_prompts is .*, allowed is 0"):
            LLM(sparse_prompts=alpha)


def test_a_gpu_refuses_it():
    with pytest.raises(InputError, match="--sparse-prompts runs on a CPU only"):
        check_sparse_prompts(torch.device("cuda"), torch.bfloat16)


def test_where_it_saves_nothing_a_warning_says_so(directory, caplog):
    with LLM(directory, dtype="float32", **SIZES, sparse_prompts=0.03) as llm:
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=1))
    assert "--sparse-prompts saves time where the native prefill kernels run" in caplog.text
