"""The cache as transformers and its users handle it."""

import copy
import gc

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch.utils._python_dispatch import TorchDispatchMode

import alisa.hf
from tests.hf.families import Prompts, family


@pytest.fixture
def model():
    return family("llama-gqa-tied")


def test_everything_is_undone(model):
    config, before = model.config.to_dict(), dict(vars(model))
    implementation = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), alisa.hf.attach(model):
        assert 1 / (model.config._attn_implementation != "alisa")
    assert model.config._attn_implementation == implementation
    assert model.config.to_dict() == config
    assert vars(model) == before
    assert not model._forward_pre_hooks


def test_a_cache_says_what_it_holds(model):
    inputs = Prompts((12, 7)).padded
    with alisa.hf.attach(model, policy="sketch") as cache_factory, torch.no_grad():
        cache = cache_factory()
        assert (cache.batch_size, cache.is_initialized, cache.get_seq_length()) == (-1, False, 0)
        model(**inputs, past_key_values=cache)
        assert (cache.batch_size, cache.is_initialized, cache.get_seq_length()) == (2, True, 12)
        assert len(cache) == 3
        assert repr(cache) == "AlisaCache(2 sequences of 12 tokens, KeySketch)"
        assert cache.get_mask_sizes(1, 0) == (13, 0)
        assert cache.batch.token_ids.equal(inputs["input_ids"])
        cache.reset()
        assert cache.get_seq_length() == 0
        model(**inputs, past_key_values=cache)
        assert cache.get_seq_length() == 12


def test_rows_take_their_bytes_and_padding_takes_none(model):
    row = 2 * 2 * 16 * 4
    with alisa.hf.attach(model, policy="dense") as cache_factory, torch.no_grad():
        cache = cache_factory()
        model(**Prompts((12, 7)).padded, past_key_values=cache)
        assert cache_factory.kv_bytes() == (12 + 7) * 3 * row


def test_rows_are_free_when_their_cache_is_gone(model):
    with alisa.hf.attach(model, policy="sketch", max_num_seqs=2) as cache_factory:
        for seed in range(5):
            model.generate(**Prompts((12, 7), seed).padded, max_new_tokens=3)
        gc.collect()
        kept = model.generate(**Prompts((9,)).padded, max_new_tokens=3, return_dict_in_generate=True)
        assert kept.past_key_values.get_seq_length() == 11
        assert cache_factory.kv_bytes() > 0


class _Largest(TorchDispatchMode):
    """The largest tensor that an operation makes; a view is none."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {_memory(tensor) for tensor in args if isinstance(tensor, torch.Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and _memory(tensor) not in given:
                self.numel = max(self.numel, tensor.numel())
        return out


def _memory(tensor):
    return tensor.untyped_storage().data_ptr()


def test_a_decode_step_makes_no_keys_and_values_of_earlier_tokens(model):
    prompt = Prompts((90,) * 4).padded["input_ids"]
    with alisa.hf.attach(model, policy="sketch", sparsity=0.8) as cache_factory, torch.no_grad():
        cache = cache_factory()
        model(prompt, past_key_values=cache)
        with _Largest() as largest:
            model(prompt[:, :1], past_key_values=cache)
    keys_of_a_layer = 4 * 90 * 2 * 16
    assert largest.numel < keys_of_a_layer / 2


def test_the_same_order_copies_nothing(model):
    with alisa.hf.attach(model, policy="dense", max_num_seqs=2) as cache_factory, torch.no_grad():
        cache = cache_factory()
        model(**Prompts((12, 7)).padded, past_key_values=cache)
        cache.reorder_cache(torch.tensor([0, 1]))
        cache.reorder_cache(torch.tensor([1, 0]))  # there would be no room for a copy
        assert cache_factory.kv_bytes() == (12 + 7) * 3 * 256


@pytest.mark.parametrize("policy", ["dense", "sketch", "swa", "h2o"])
@pytest.mark.parametrize("kv_disk_memory", [None, 0])
def test_copies_hold_what_they_have_in_common_once(model, policy, kv_disk_memory):
    row = 3 * 256
    prompt, new = Prompts((40,)).padded["input_ids"], torch.tensor([[5], [6], [7]])
    with (
        alisa.hf.attach(model, policy=policy, kv_disk_memory=kv_disk_memory, max_num_seqs=8) as cache_factory,
        torch.no_grad(),
    ):
        cache = cache_factory()
        model(prompt, past_key_values=cache)
        twins = copy.deepcopy(cache)
        twins.batch_repeat_interleave(3)
        assert cache_factory.kv_bytes() == 40 * row
        together = model(new, past_key_values=twins).logits
        assert cache_factory.kv_bytes() == (40 + 3) * row
        alone = [copy.deepcopy(cache) for _ in new]
        for token, own, found in zip(new, alone, together, strict=True):
            logits = model(token[None], past_key_values=own).logits[0]
            torch.testing.assert_close(logits, found, rtol=1e-3, atol=1e-3)
        del own, alone, cache
        gc.collect()
        model(new, past_key_values=twins)
        assert cache_factory.kv_bytes() == (40 + 3 + 3) * row, "who has gone had no rows that others need"


def test_beams_hold_their_prompt_once(model):
    prompt = Prompts((40,)).padded
    options = {"max_new_tokens": 8, "num_beams": 4, "num_return_sequences": 4, "return_dict_in_generate": True}
    expected = copy.deepcopy(model).generate(**prompt, **options).sequences
    # Room for 85 rows: those of the prompt, and of what each beam says; 48 for each of them would be 192.
    sizes = {"kv_device_memory": "72KiB", "kv_disk_memory": 0, "max_num_seqs": 8, "max_model_len": 64}
    with alisa.hf.attach(model, policy="dense", **sizes) as cache_factory:
        kept = model.generate(**prompt, **options)
        assert kept.sequences.equal(expected)
        assert kept.past_key_values.batch_size == 4
        assert 40 * 3 * 256 < cache_factory.kv_bytes() <= (40 + 4 * 8) * 3 * 256


@pytest.mark.parametrize("policy", ["dense", "sketch", "swa"])
def test_equal_prompts_of_a_batch_are_read_once(model, policy):
    first, other = Prompts((30, 12)).ids
    ids = torch.tensor([first, [0] * 18 + other, first, [0] * 18 + other])
    mask = (ids != 0).long()
    options = {"max_new_tokens": 6}
    with alisa.hf.attach(model, policy=policy) as cache_factory, torch.no_grad():
        expected = [model.generate(torch.tensor([prompt]), **options)[0, -6:] for prompt in (first, other)]
        gc.collect()
        cache = cache_factory()
        model(ids, attention_mask=mask, past_key_values=cache)
        assert cache_factory.kv_bytes() == (30 + 12) * 3 * 256
        found = model.generate(ids, attention_mask=mask, **options)[:, -6:]
        assert found.equal(torch.stack(expected * 2))


def test_what_is_read_at_other_positions_is_not_the_same(model):
    prompt = Prompts((30,)).padded["input_ids"].repeat(2, 1)
    positions = torch.stack((torch.arange(30), torch.arange(3, 33)))
    with alisa.hf.attach(model, policy="dense") as cache_factory, torch.no_grad():
        model(prompt, position_ids=positions, past_key_values=(cache := cache_factory()))
        assert cache.batch.size == 2
        assert cache_factory.kv_bytes() == 2 * 30 * 3 * 256


def test_copies_of_a_model_have_the_caches_of_their_original(model):
    prompt = Prompts((12,)).padded
    with alisa.hf.attach(model, policy="dense"):
        expected, twin = model.generate(**prompt, max_new_tokens=5), copy.deepcopy(model)
        assert twin.generate(**prompt, max_new_tokens=5).equal(expected)


class Handled(RuleBasedStateMachine):
    """A cache is stepped, reordered, repeated, cut and copied; its logits are those of eager attention."""

    @initialize(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3), seed=st.integers(0, 5))
    def read(self, lengths, seed):
        self.model = family("llama-gqa-tied")
        self.eager = copy.deepcopy(self.model)
        self.context = alisa.hf.attach(self.model, policy="dense", max_num_seqs=24)
        cache_factory = self.context.__enter__()
        self.cache = cache_factory()
        self.generator = torch.Generator().manual_seed(seed)
        inputs = Prompts(tuple(lengths), seed).padded
        self.ids, self.mask = inputs["input_ids"], inputs["attention_mask"]
        self.feed(self.ids)

    @torch.no_grad()
    def feed(self, new):
        self.logits = self.model(new, attention_mask=self.mask, past_key_values=self.cache).logits[:, -1]

    @precondition(lambda self: self.ids.shape[1] < 60)
    @rule(count=st.integers(1, 5))
    def step(self, count):
        new = torch.randint(3, 120, (len(self.ids), count), generator=self.generator)
        self.ids = torch.cat((self.ids, new), dim=1)
        self.mask = torch.cat((self.mask, torch.ones_like(new)), dim=1)
        self.feed(new)

    @rule(data=st.data())
    def reorder(self, data):
        some = st.lists(st.integers(0, len(self.ids) - 1), min_size=1, max_size=5)
        indices = torch.tensor(data.draw(some))
        self.cache.batch_select_indices(indices)
        self.ids, self.mask, self.logits = self.ids[indices], self.mask[indices], self.logits[indices]

    @precondition(lambda self: len(self.ids) < 4)
    @rule()
    def repeat(self):
        self.cache.batch_repeat_interleave(2)
        self.ids, self.mask, self.logits = (x.repeat_interleave(2, 0) for x in (self.ids, self.mask, self.logits))

    @rule()
    def copied(self):
        self.cache = copy.deepcopy(self.cache)

    @rule(count=st.integers(1, 4))
    def cut_and_go_on(self, count):
        keep = self.ids.shape[1] - count
        if keep < 1 or not self.mask[:, :keep].any(dim=1).all():
            return
        self.cache.crop(-count)
        self.ids, self.mask = self.ids[:, :keep], self.mask[:, :keep]
        self.step(1)

    @invariant()
    def logits_are_right(self):
        if not hasattr(self, "ids"):
            return
        with torch.no_grad():
            expected = self.eager(self.ids, attention_mask=self.mask).logits[:, -1]
        torch.testing.assert_close(self.logits, expected, rtol=1e-3, atol=1e-3)
        assert self.cache.get_seq_length() == self.ids.shape[1]
        assert self.cache.batch.token_ids.equal(self.ids)

    def teardown(self):
        if hasattr(self, "context"):
            self.context.__exit__(None, None, None)


Handled.TestCase.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)
test_a_cache_that_is_handled = Handled.TestCase
