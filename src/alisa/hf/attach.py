"""`attach`: a model of transformers reads its KV cache as alisa does, for the length of a `with`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel

from alisa.attention.build import build_session
from alisa.attention.caps import device_cap, disk_directory, lower_caps
from alisa.attention.kv_cache import RowSource, build_kv_cache, plan_kv_cache
from alisa.basis.calibration import find_row_basis
from alisa.cache.codec import make_codec
from alisa.config import EngineConfig, KvDtypeName, with_options
from alisa.errors import InputError
from alisa.hf.batch import Batch
from alisa.hf.cache import AlisaCache, refuse_other_prompt
from alisa.hf.handed import handed_forward
from alisa.hf.observed import ObservedAttention, observe, refusal
from alisa.hf.seam import NAME, check_eager, register
from alisa.hf.sequences import Sequences
from alisa.kernels.choose import choose_backend
from alisa.outputs import Medium
from alisa.policy.registry import make_policy
from alisa.quality import QualityName
from alisa.spec import RowFormat


class CacheFactory:
    """Makes caches for an attached model; all of them together stay under the caps of `attach`.

    Args:
        sequences: those of the model.
        observed: how its layers attend.
    """

    def __init__(self, sequences: Sequences, observed: ObservedAttention) -> None:
        self._sequences = sequences
        self._observed = observed

    def __call__(self) -> AlisaCache:
        """An empty cache, for one batch."""
        return AlisaCache(Batch(self._sequences, self._observed))

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheFactory:
        return self  # a copy of the model has the same caches

    def kv_bytes(self, medium: Medium = Medium.DEVICE) -> int:
        """Bytes of the rows of all caches in one medium now."""
        return self._sequences.nbytes(medium)

    @property
    def state_bytes(self) -> int:
        """Bytes that the policy keeps of them; under the cap of the device too."""
        return self._sequences.session.state.nbytes


@contextmanager
def attach(
    model: PreTrainedModel,
    *,
    quality: QualityName | None = None,
    policy: str | None = None,
    sparsity: float | None = None,
    coverage: float | None = None,
    kv_dtype: KvDtypeName | None = None,
    kv_device_memory: str | int | None = None,
    kv_host_memory: str | int | None = None,
    kv_disk_memory: str | int | None = None,
    kv_disk_path: Path | str | None = None,
    max_num_seqs: int = 32,
    max_model_len: int | None = None,
) -> Iterator[CacheFactory]:
    """A model of transformers reads its KV cache as alisa does, until the end of the `with`.

    `model.generate`, a pipeline and the model's own forward pass then keep K and V in alisa's rows. Everything is as it
    was afterwards. Two tokens are run through the model at the beginning, to see how it attends.

    Args:
        model: any decoder whose attention goes through transformers' attention interface.
        quality: a name for policy, sparsity and kv_dtype; this and the others as in `alisa.config.EngineConfig`.
        policy: which earlier tokens a decode step reads; None: as the quality says, sketch without one.
        sparsity: share of the earlier tokens that a decode step does not read; None: as the quality says, 0.8 without
            one.
        coverage: part of the attention weight that is enough: a sketch policy then reads less where less has it.
        kv_dtype: what rows are kept in; None: as the quality says, the model's dtype without one.
        kv_device_memory: hard cap for the rows of all caches, and what the policy keeps of them.
        kv_host_memory: hard cap of rows in main memory below a GPU.
        kv_disk_memory: hard cap of rows on disk.
        kv_disk_path: whose disk.
        max_num_seqs: sequences in all caches together, those of beams included.
        max_model_len: longest sequence; None: what the model's configuration says. A window that is no shorter is none.

    Yields:
        Makes caches, for `past_key_values`; the model makes its own where none is given.

    Raises:
        InputError: an option is wrong, or the model attends in a way that alisa does not.
        CapacityError: the caps hold not even one token.
    """
    options = {
        "quality": quality,
        "policy": policy,
        "sparsity": sparsity,
        "coverage": coverage,
        "kv_dtype": kv_dtype,
        "kv_device_memory": kv_device_memory,
        "kv_host_memory": kv_host_memory,
        "kv_disk_memory": kv_disk_memory,
        "kv_disk_path": kv_disk_path,
        "max_num_seqs": max_num_seqs,
        "max_model_len": max_model_len,
    }
    config = with_options(None, options)
    generate = _generate_of(model)
    with _our_attention(model):
        sequences, observed = _sequences(model, config)
        factory = CacheFactory(sequences, observed)
        hook = model.register_forward_pre_hook(_ForwardHook(factory), with_kwargs=True)
        # In the model's own dictionary, where it comes before the class's: nn.Module would ask for a module.
        former = vars(model).get("generate")
        vars(model)["generate"] = _Generate(model, generate, factory)
        try:
            yield factory
        finally:
            del vars(model)["generate"]
            if former is not None:
                vars(model)["generate"] = former
            hook.remove()
            sequences.close()


def _generate_of(model: PreTrainedModel) -> Callable[..., Any]:
    """The function that generates with a model, of its class."""
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"{type(model).__name__} is not a model of transformers but something around one (compiled, wrapped); "
            "attach the model that is in it."
        )
    # What `module.compile()` sets; torch has no other way to ask.
    if any(module._compiled_call_impl is not None for module in model.modules()):
        raise refusal(type(model).__name__, "it is compiled")
    if not isinstance(model, GenerationMixin):
        raise refusal(type(model).__name__, "it does not generate text")
    return type(model).generate  # pyrefly: ignore[missing-attribute]  # what the line above has asked


@contextmanager
def _our_attention(model: PreTrainedModel) -> Iterator[None]:
    """The text part of the model calls our attention function, until the end of the `with`."""
    text = model.config.get_text_config(decoder=True)
    former = text._attn_implementation or "eager"
    use_our_attention(model)
    try:
        yield
    finally:
        _set_attention(model, text, former)


def use_our_attention(model: PreTrainedModel) -> None:
    """The text part of the model calls our attention function from now on.

    Raises:
        InputError: it does already, or it cannot.
    """
    name, config = type(model).__name__, model.config
    if config.is_encoder_decoder:
        raise refusal(name, "it has an encoder, whose attention is not causal")
    text = config.get_text_config(decoder=True)
    if text._attn_implementation == NAME:
        raise InputError(f"{name} is attached to alisa already; leave that alisa.hf.attach first.")
    register()
    _set_attention(model, text, NAME)
    if text._attn_implementation != NAME:
        raise refusal(name, "it computes its attention itself, outside transformers' attention interface")


def _set_attention(model: PreTrainedModel, text: PreTrainedConfig, implementation: str) -> None:
    parts = [key for key in model.config.sub_configs if getattr(model.config, key) is text]
    model.set_attn_implementation(dict.fromkeys(parts, implementation) if parts else implementation)


def _sequences(model: PreTrainedModel, config: EngineConfig) -> tuple[Sequences, ObservedAttention]:
    """A session for this model, and how its layers attend."""
    observed = observe(model)
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    max_len = config.max_model_len or positions
    if max_len is None:
        raise InputError(
            f"the configuration of {type(model).__name__} does not say how long a sequence may be; give max_model_len."
        )
    shape, device = observed.shape(max_len), model.device
    dtype = str(model.dtype).removeprefix("torch.") if config.kv_dtype == "auto" else config.kv_dtype
    codec = make_codec(RowFormat(dtype, shape.num_kv_heads, shape.head_dim))
    policy, backend = make_policy(config.policy, config.sparsity, config.coverage), choose_backend(device)
    source = RowSource(shape, max_len, device, backend, None)
    cache_config = plan_kv_cache(
        source, policy, codec, config, None, device_cap(config, device), *lower_caps(config, device), runs_all=True
    )
    session = build_session(
        build_kv_cache(source, codec, cache_config, disk_directory(config), "lru", overlap=True),
        policy,
        backend,
        shape,
        device,
        max_num_seqs=cache_config.max_num_seqs,
        state_tokens=cache_config.state_tokens,
        max_len=cache_config.max_model_len,
        looks_ahead=cache_config.placement.uses_tiers,
        sinks=observed.sinks,
    )
    # Of the model without a limit, as in `Decoder.for_rows`.
    basis = find_row_basis(
        dtype,
        observed.shape(positions or max_len),
        model.config.get_text_config(decoder=True).vocab_size,
        positions or max_len,
        lambda tokens, positions, attend, _: handed_forward(model, tokens, positions, attend),
        device,
        observed.sinks,
    )
    return Sequences(session, cache_config, basis), observed


class _ForwardHook:
    """Sees every call of an attached model: refuses what would go wrong, and gives a cache where there is none."""

    def __init__(self, factory: CacheFactory) -> None:
        self._factory = factory

    def __call__(
        self, module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the call, with a cache."""
        check_eager()
        if module.training:
            raise InputError(
                "a model attached to alisa cannot be trained; call model.eval(), or leave alisa.hf.attach."
            )
        if kwargs.get("output_attentions") or module.config.output_attentions:
            raise InputError("alisa keeps no attention weights; leave output_attentions out.")
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise InputError("alisa takes an attention mask of one number for each token so far, [batch, tokens].")
        if kwargs.get("use_cache") is False:
            raise InputError(
                "alisa is the KV cache of an attached model, and use_cache=False asks for none; leave it out, or leave "
                "alisa.hf.attach."
            )
        cache = kwargs.get("past_key_values")
        if cache is None:
            cache = self._factory()
        if isinstance(cache, AlisaCache):
            ids = args[0] if args else kwargs.get("input_ids")
            twins = () if cache.batch.size else _twins(ids, [*args[1:], *kwargs.values()])
            cache.batch.note(ids, twins)
        return args, kwargs | {"past_key_values": cache}


def _twins(ids: Tensor | None, others: Sequence[object]) -> tuple[int, ...]:
    """Of each sequence, the first one for which the model is given the same; none where that cannot be told."""
    tensors = [other for other in others if isinstance(other, Tensor)]
    plain = (Tensor, Cache, bool, int, str, type(None))
    if ids is None or any(tensor.dim() > 2 for tensor in tensors) or not all(isinstance(o, plain) for o in others):
        return ()
    given = [ids, *(tensor for tensor in tensors if tensor.dim() == 2 and len(tensor) > 1)]
    if any(len(each) != len(ids) for each in given):
        return ()
    return tuple(
        next(first for first in range(index + 1) if all(each[first].equal(each[index]) for each in given))
        for index in range(len(ids))
    )


class _Generate:
    """`model.generate` of an attached model: a fresh cache for each call, and none that holds another text."""

    def __init__(self, model: PreTrainedModel, generate: Callable[..., Any], factory: CacheFactory) -> None:
        self._model = model
        self._generate = generate
        self._factory = factory

    def __deepcopy__(self, memo: dict[int, Any]) -> _Generate:
        return _Generate(memo[id(self._model)], self._generate, self._factory)

    def __call__(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """As the model's own `generate`."""
        _refuse_other_caches(kwargs)
        if kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = self._factory()
        ids = kwargs.get("input_ids") if inputs is None else inputs
        cache = kwargs["past_key_values"]
        if isinstance(cache, AlisaCache) and kwargs.get("inputs_embeds") is not None and cache.is_initialized:
            raise InputError(
                "the cache holds tokens, and nothing says whether embeddings go on with them; pass input_ids, or make "
                "a new cache."
            )
        if isinstance(cache, AlisaCache) and isinstance(ids, Tensor) and kwargs.get("inputs_embeds") is None:
            mask = kwargs.get("attention_mask")
            # A mask that is longer than the ids says that they alone are new.
            if mask is None or mask.shape[1] == ids.shape[1]:
                refuse_other_prompt(cache, ids)
                cache.batch.expect(ids.shape[1])
            else:
                cache.batch.expect(mask.shape[1])
        return self._generate(self._model, inputs, *args, **kwargs)


def _refuse_other_caches(kwargs: dict[str, Any]) -> None:
    """Raise InputError where a call of `generate` names a kind of transformers' own caches."""
    config = kwargs.get("generation_config")
    named = kwargs.get("cache_implementation") or (config.cache_implementation if config is not None else None)
    if named is not None:
        raise InputError(
            f"alisa is the KV cache of an attached model, and cache_implementation={named!r} asks for another; leave "
            "it out, or leave alisa.hf.attach."
        )
