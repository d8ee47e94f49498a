"""What an attached model does not do is refused by name, before a wrong token comes out."""

import copy
import gc
import pickle
import threading

import pytest
import torch
import transformers
from transformers import DynamicCache

import alisa.hf
from alisa.errors import AlisaError, CapacityError, InputError
from tests.hf.families import Prompts, family, redrawn, small_config

IDS = torch.tensor(Prompts((12,)).ids)


@pytest.fixture
def model():
    return family("llama-gqa-tied")


def of_class(name, **fields):
    return redrawn(transformers.AutoModelForCausalLM.from_config(small_config(name, **fields)))


OUTSIDERS = {
    "Bloom": ({"n_layer": 2, "n_head": 4}, "outside transformers' attention interface"),
    "Mpt": ({"d_model": 64, "n_layers": 2, "n_heads": 4}, "outside transformers' attention interface"),
    "XGLM": ({"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 96}, "attention interface"),
    "Llama4Text": ({"attention_chunk_size": 8}, "in chunks"),
    "DiffLlama": ({}, "not those that alisa's cache was given"),
    "JetMoe": ({}, "not those that alisa's cache was given"),
    "Doge": ({}, "not plainly causal"),
    "Mamba": ({}, "no K and V"),
    "FalconH1": ({}, "linear attention"),
    "MiniMax": ({}, "cache of its own"),
    "Gemma4Text": ({}, "other heads"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "Gemma4Text" else ()) for name in OUTSIDERS]
)
def test_a_model_that_attends_otherwise_is_not_attached(name):
    fields, why = OUTSIDERS[name]
    model = of_class(name, **fields)
    before = model.config._attn_implementation
    with pytest.raises(InputError, match=why) as caught, alisa.hf.attach(model):
        pass
    assert str(caught.value).count("\n") == 0
    assert model.config._attn_implementation == before
    assert "generate" not in vars(model)


_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}
_DEEPSEEK = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 96}
_DEEPSEEK |= {"moe_intermediate_size": 32, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "v_head_dim": 16}
_DEEPSEEK |= {"kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
_QWEN_NEXT = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
_QWEN_NEXT |= {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "num_experts": 4}
_QWEN_NEXT |= {"linear_value_head_dim": 16, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
OLD_OUTSIDERS = {
    "Falcon": ({"num_hidden_layers": 2, "num_attention_heads": 4}, "outside transformers' attention interface"),
    "GPTJ": (_GPT, "outside transformers' attention interface"),
    "CodeGen": (_GPT, "outside transformers' attention interface"),
    "DeepseekV3": (_DEEPSEEK | {"num_experts_per_tok": 2}, "not those that alisa's cache was given"),
    "Qwen3Next": (_QWEN_NEXT, "linear attention"),
    "Lfm2": ({"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}, "convolution"),
    "RecurrentGemma": ({"num_hidden_layers": 3, "num_attention_heads": 4, "lru_width": 64}, "of some layers only"),
}
"""Whose configs do not take the names of ours."""


@pytest.mark.parametrize("name", OLD_OUTSIDERS)
def test_a_model_with_names_of_its_own_is_not_attached(name):
    fields, why = OLD_OUTSIDERS[name]
    config = getattr(transformers, f"{name}Config")(vocab_size=120, pad_token_id=0, **({"hidden_size": 64} | fields))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(InputError, match=why), alisa.hf.attach(model):
        pass


def test_an_encoder_is_not_attached():
    config = transformers.T5Config(vocab_size=120, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    model = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(InputError, match="has an encoder"), alisa.hf.attach(model):
        pass


def test_a_model_without_words_is_not_attached(model):
    with pytest.raises(InputError, match="does not generate text"), alisa.hf.attach(model.model):
        pass


def test_a_model_is_attached_once(model):
    with alisa.hf.attach(model), pytest.raises(InputError, match="attached to alisa already"), alisa.hf.attach(model):
        pass


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"policy": "best"}, "policy 'best' is unknown"),
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"kv_device_memory": "many"}, "not a memory size"),
        ({"kv_dtype": "int3"}, "'int3' is unknown"),
    ],
)
def test_options_are_checked(model, options, why):
    with pytest.raises(InputError, match=why), alisa.hf.attach(model, **options):
        pass


def test_a_cap_without_room_is_refused(model):
    with pytest.raises(CapacityError, match="not even one token"), alisa.hf.attach(model, kv_device_memory="1KiB"):
        pass


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"attention_mask": torch.ones(1, 1, 12, 12)}, "one number for each token"),
        ({"attention_mask": torch.tensor([[1] * 9 + [0] * 3])}, "pad on the left"),
        ({"attention_mask": torch.tensor([[1] * 5 + [0] * 2 + [1] * 5])}, "pad on the left"),
        ({"attention_mask": torch.ones(1, 11, dtype=torch.int64)}, r"\(1, 12\)"),
        ({"output_attentions": True}, "no attention weights"),
        ({"past_key_values": DynamicCache()}, "not those that alisa's cache was given"),
        ({"use_cache": False}, "use_cache=False asks for none"),
    ],
)
def test_calls_are_refused(model, options, why):
    with alisa.hf.attach(model), torch.no_grad(), pytest.raises(InputError, match=why):
        model(IDS, **options)


def test_gradients_are_refused(model):
    with alisa.hf.attach(model), pytest.raises(InputError, match="no gradients"):
        model(IDS)


def test_training_is_refused(model):
    model.train()
    try:
        with alisa.hf.attach(model), pytest.raises(InputError, match=r"model.eval\(\)"):
            model(IDS)
    finally:
        model.eval()


def test_attention_weights_are_refused_in_generate(model):
    options = {"output_attentions": True, "return_dict_in_generate": True}
    with alisa.hf.attach(model), pytest.raises(InputError, match="no attention weights"):
        model.generate(IDS, max_new_tokens=2, **options)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"use_cache": False}, "use_cache=False"),
        ({"generation_config": transformers.GenerationConfig(use_cache=False)}, "use_cache=False"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"generation_config": transformers.GenerationConfig(cache_implementation="dynamic")}, "'dynamic'"),
        ({"attention_mask": torch.ones(1, 1, 12, 12)}, "must be 2D"),
        ({"attention_mask": torch.tensor([[1] * 9 + [0] * 3])}, "pad on the left"),
    ],
)
def test_calls_of_generate_are_refused(model, options, why):
    with alisa.hf.attach(model), pytest.raises(ValueError if why == "must be 2D" else InputError, match=why):
        model.generate(IDS, max_new_tokens=3, **options)


def test_embeddings_do_not_go_on_with_tokens(model):
    with alisa.hf.attach(model) as cache_factory:
        cache = cache_factory()
        model.generate(IDS, past_key_values=cache, max_new_tokens=4)
        embeds = model.get_input_embeddings()(IDS).detach()
        with pytest.raises(InputError, match="pass input_ids"):
            model.generate(inputs_embeds=embeds, past_key_values=cache, max_new_tokens=4)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": family("Arcee")}])
def test_assistants_of_a_sparse_policy_are_refused(model, options):
    with alisa.hf.attach(model, policy="sketch"), pytest.raises(InputError, match="policy='dense'"):
        model.generate(IDS, max_new_tokens=5, **options)


def test_a_cache_of_another_text_is_refused(model):
    with alisa.hf.attach(model) as cache_factory:
        cache = cache_factory()
        said = model.generate(IDS, past_key_values=cache, max_new_tokens=4)
        other = torch.tensor(Prompts((25,), 9).ids)
        for ids in (other, other[:, :7], said[:, :-1], said.repeat(2, 1)):
            with pytest.raises(InputError, match="make a new cache"):
                model.generate(ids, past_key_values=cache, max_new_tokens=4)


def test_a_pipeline_with_one_cache_for_all_prompts_is_refused(model):
    with alisa.hf.attach(model) as cache_factory:
        cache = cache_factory()
        model.generate(IDS, past_key_values=cache, max_new_tokens=4)
        with pytest.raises(InputError, match="of another text"):
            model.generate(torch.tensor(Prompts((40,), 4).ids), past_key_values=cache, max_new_tokens=4)


@pytest.mark.parametrize("policy", ["swa", "h2o"])
def test_a_prompt_after_a_text_is_refused_where_prompts_are_watched(model, policy):
    with alisa.hf.attach(model, policy=policy) as cache_factory:
        cache = cache_factory()
        said = model.generate(IDS, past_key_values=cache, max_new_tokens=4)
        with pytest.raises(InputError, match="policy='sketch'"):
            model.generate(torch.cat((said, IDS), dim=1), past_key_values=cache, max_new_tokens=4)


def test_another_number_of_sequences_is_refused(model):
    with alisa.hf.attach(model) as cache_factory, torch.no_grad():
        cache = cache_factory()
        model(IDS, past_key_values=cache)
        with pytest.raises(InputError, match="holds 1 sequences and the model was called with 2"):
            model(IDS[:, :1].repeat(2, 1), past_key_values=cache)


def test_a_mask_that_forgets_padding_is_refused(model):
    inputs = Prompts((12, 7)).padded
    with alisa.hf.attach(model) as cache_factory, torch.no_grad():
        cache = cache_factory()
        model(**inputs, past_key_values=cache)
        with pytest.raises(InputError, match="pass the mask of all tokens so far"):
            model(IDS[:, :1].repeat(2, 1), attention_mask=torch.ones(2, 13), past_key_values=cache)


def test_too_many_sequences_are_refused(model):
    with alisa.hf.attach(model, max_num_seqs=2), pytest.raises(CapacityError, match="raise max_num_seqs"):
        model.generate(IDS.repeat(3, 1), max_new_tokens=2)


def test_what_found_no_room_leaves_none_behind(model):
    with alisa.hf.attach(model, max_num_seqs=3) as cache_factory, torch.no_grad():
        for options in ({"num_beams": 4}, {"num_return_sequences": 4, "do_sample": True}):
            with pytest.raises(CapacityError, match="raise max_num_seqs"):
                model.generate(IDS, max_new_tokens=5, **options)
            gc.collect()
        cache = cache_factory()
        model(IDS.repeat(2, 1), past_key_values=cache)
        with pytest.raises(CapacityError, match="raise max_num_seqs"):
            copy.deepcopy(cache)
        with pytest.raises(CapacityError, match="raise max_num_seqs"):
            cache.batch_repeat_interleave(2)
        del cache
        gc.collect()
        assert model.generate(IDS.repeat(3, 1), max_new_tokens=3).shape == (3, 15)


def test_a_text_longer_than_provided_for_is_refused(model):
    with alisa.hf.attach(model, max_model_len=15), pytest.raises(CapacityError, match="raise its max_model_len"):
        model.generate(IDS, max_new_tokens=9)


@pytest.mark.parametrize("policy", ["dense", "sketch"])
def test_more_tokens_than_the_cap_are_refused_and_the_rest_goes_on(model, policy):
    sizes = {"kv_device_memory": "128KiB", "kv_disk_memory": 0, "max_num_seqs": 4, "max_model_len": 60}
    with alisa.hf.attach(model, policy=policy, **sizes):
        expected = model.generate(IDS, max_new_tokens=9)
        with pytest.raises(CapacityError, match="raise kv_device_memory"):
            model.generate(**Prompts((55,) * 4).padded, max_new_tokens=5)
        assert model.generate(IDS, max_new_tokens=9).equal(expected)


def test_a_cache_is_over_with_its_context(model):
    with alisa.hf.attach(model) as cache_factory:
        cache = cache_factory()
        model.generate(IDS, past_key_values=cache, max_new_tokens=4)
    with alisa.hf.attach(model), torch.no_grad(), pytest.raises(InputError, match="is over"):
        model(IDS[:, :1], past_key_values=cache)
    with torch.no_grad(), pytest.raises(InputError, match="is over"):
        copy.deepcopy(cache)


def test_a_pass_that_broke_off_is_not_gone_on_with(model):
    def breaks(module, args):
        raise KeyboardInterrupt

    with alisa.hf.attach(model) as cache_factory, torch.no_grad():
        cache = cache_factory()
        model(IDS, past_key_values=cache)
        hook = model.model.layers[1].register_forward_pre_hook(breaks)
        with pytest.raises(KeyboardInterrupt):
            model(IDS[:, :1], past_key_values=cache)
        hook.remove()
        with pytest.raises(InputError, match="broke off"):
            model(IDS[:, :1], past_key_values=cache)
        assert model.generate(IDS, max_new_tokens=3).shape == (1, 15)


def test_two_threads_at_once_are_refused(model):
    errors = []

    def interferes(module, args):
        hook.remove()
        thread = threading.Thread(target=lambda: model.generate(IDS, max_new_tokens=2))
        thread.start()
        thread.join()

    with alisa.hf.attach(model):
        hook = model.model.layers[1].register_forward_pre_hook(interferes)
        try:
            model.generate(IDS, max_new_tokens=2)
        except AlisaError as error:
            errors.append(str(error))
    assert len(errors) == 1
    assert "one thread at a time" in errors[0]


def test_a_cache_is_not_pickled(model):
    with alisa.hf.attach(model) as cache_factory, pytest.raises(InputError, match="deepcopy"):
        pickle.dumps(cache_factory())


def test_crop_takes_what_transformers_gives(model):
    with alisa.hf.attach(model) as cache_factory:
        cache = cache_factory()
        cache.crop(0)
        with pytest.raises(ValueError, match="negative"):
            cache.crop(3)
        with pytest.raises(InputError, match="policy='dense'"):
            cache.crop(-1)


def _compile(model):
    return torch.compile(model, backend="eager")(IDS)


def _compile_whole(model):
    return torch.compile(model, backend="eager", fullgraph=True)(IDS)


def _export(model):
    return torch.export.export(model, (IDS,), strict=False)


def _export_strictly(model):
    return torch.export.export(model, (IDS,), strict=True)


def _trace(model):
    return torch.jit.trace(model, (IDS,), strict=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [_compile, _compile_whole, _export, _export_strictly, _trace])
def test_compiling_and_exporting_are_refused(model, make):
    torch.compiler.reset()
    with alisa.hf.attach(model), torch.no_grad(), pytest.raises(Exception, match="compiled or exported"):
        make(model)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_is_not_attached():
    model = of_class("Arcee")
    with pytest.raises(InputError, match="attach the model that is in it"), alisa.hf.attach(torch.compile(model)):
        pass
    model.model.layers[0].compile(backend="eager")
    with pytest.raises(InputError, match="it is compiled"), alisa.hf.attach(model):
        pass


def test_a_model_that_fails_on_two_tokens_is_refused_in_one_line(model):
    def breaks(module, args):
        raise RuntimeError("first line\nsecond line")

    hook = model.model.layers[0].register_forward_pre_hook(breaks)
    with pytest.raises(InputError, match=r"\(RuntimeError: first line\); run it") as caught, alisa.hf.attach(model):
        pass
    hook.remove()
    assert "\n" not in str(caught.value)


def test_continuous_batching_of_transformers_says_so_itself(model):
    with alisa.hf.attach(model), pytest.raises(Exception, match="continuous batching"):
        model.generate_batch([[5, 6, 7]])


@pytest.mark.parametrize(("found", "said"), [(None, "not installed"), ("5.17.1", "5.17.1"), ("6.0.0rc1", "6.0.0rc1")])
def test_another_transformers_is_called_by_its_version(found, said):
    assert said in alisa.hf.missing_transformers(found)
    assert "alisa[hf]" in alisa.hf.missing_transformers(found)


def test_this_transformers_will_do():
    assert alisa.hf.missing_transformers(transformers.__version__) is None
