"""What the user asked for: frozen, complete at construction, and checked there.

`EngineConfig` says how to run, `SamplingParams` how to pick tokens for one request. Neither is ever filled in later;
what the machine or the model adds (free memory, number of rows) is derived into other objects. Each field with its
docstring is at once the Python option, the flag of the command line, its help and the entry in the report.

A little over 400 lines, most of them these docstrings: an option is in one place, and this is it.
"""

from __future__ import annotations

import json
import re
import secrets
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typing_extensions import Doc

from alisa.errors import InputError
from alisa.field_types import settle
from alisa.policy.registry import POLICIES, can_truncate_names, observes_prompts, policies_help
from alisa.quality import QUALITIES, QualityName, qualities_help

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
WeightDtypeName = Literal["auto", "float", "int8", "int4"]
WeightFormat = Literal["float", "int8", "int4"]
"""The same with `auto` resolved; `float`: the dtype of the arithmetic."""
KvDtypeName = Literal["auto", "float32", "bfloat16", "float16", "int8", "int4", "k8v4"]
DeviceName = Literal["auto", "cpu", "cuda"]
if TYPE_CHECKING:
    PolicyName = str
    OwnPolicy, OwnSparsity, OwnKvDtype = str, float, KvDtypeName
else:
    PolicyName = Literal[tuple(POLICIES)]  # the command line offers them
    # None until the configuration is made: the quality has the say.
    OwnPolicy, OwnSparsity, OwnKvDtype = PolicyName | None, float | None, KvDtypeName | None

_POLICY_HELP = (
    f"Which earlier tokens a step reads; None: as the quality says, sketch without one. {policies_help()} Why sketch: "
    "of two real models, at sparsity 0.8 one loses nothing of its perplexity that shows and the other 0.2 %; at 0.95 "
    "0.4 % at most and 1.2 %. And it finds all facts in 1024 tokens where every choice by history finds a fifth or "
    "less (docs/accuracy.md)."
)
"""From the registry, so that a new policy is told without a word here."""

_QUALITY_HELP = (
    "A name for policy, sparsity and kv_dtype together; where one of these is given, too, that counts. "
    f"{qualities_help()} That is the perplexity lost by two real models (docs/accuracy.md). None: sketch at sparsity "
    "0.8, rows as the model computes."
)

_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{unit}b": factor for unit, factor in _UNITS.items() if len(unit) == 1 and unit != "b"}
_UNITS |= {f"{unit}ib": 1024 ** (i + 1) for i, unit in enumerate("kmgt")}


def parse_bytes(text: str | int, *, least: int = 1) -> int:
    """Bytes meant by `2GiB`, `512MB`, `1.5g` or a plain number.

    Args:
        text: the size.
        least: smallest size that makes sense, 0 where nothing at all is an answer.

    Raises:
        InputError: the text is not a size, or a smaller one.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    unit = match.group(2).lower() if match else None
    if match is None or unit not in _UNITS:
        raise InputError(f"{text!r} is not a memory size; write for example 2GiB, 512MiB or 800MB.")
    num_bytes = int(float(match.group(1)) * _UNITS[unit])
    if num_bytes < least:
        raise InputError(f"A memory size of {text!r} leaves no room at all; write for example 2GiB or 512MiB.")
    return num_bytes


def format_bytes(num_bytes: float) -> str:
    """Short binary form for messages: 1536 -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024 or unit == "GiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"


NUM_SEEDS = 2**64
"""Seeds are 0 up to but not this."""

MAX_LOGPROBS = 20
"""Most likeliest tokens that are told of one place."""

RENAMED = {"max_batch": "max_num_seqs"}
"""Engine options as version 0.1 called them, and their names now; the old ones go with version 0.3."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    Note:
        None for any field means its default; only for `seed` it means one that is drawn here, once.

    Raises:
        InputError: at construction, naming every field that is out of range or of another type.
    """

    max_tokens: int = 128
    """Upper bound of generated tokens."""
    n: int = 1
    """Texts for each prompt, drawn independently; all are equal where the temperature is 0."""
    temperature: float = 0.0
    """0 picks the most likely token (greedy)."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 or -1: all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches top_p."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the likeliest."""
    repetition_penalty: float = 1.0
    """Divide (positive) or multiply (negative) the logits of tokens seen in the prompt or the output (CTRL,
    1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that are in the output, -2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of a token as often as it is in the output, -2 to 2."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids and what is added to their logits, -100 to 100: -100 in effect forbids a token, 100 demands it. Pairs,
    or from Python a mapping."""
    stop: tuple[str, ...] = ()
    """End before the first of these strings; it is not part of the text. A single string is one stop string."""
    stop_ids: tuple[int, ...] = ()
    """End at the first of these token ids, in addition to the model's own end tokens."""
    min_tokens: int = 0
    """No end token and no stop string ends the text before it has this many tokens."""
    ignore_eos: bool = False
    """Go on after the model's end token; benchmarks want a fixed length."""
    json_schema: str | None = None
    """The text is JSON of this JSON schema ({} is any); tokens that would make it something else are never drawn. From
    Python also a mapping. Needs alisa[grammar]."""
    regex: str | None = None
    """The text matches this regular expression, all of it. Needs alisa[grammar]."""
    logprobs: int | None = None
    """Give the log probability of each output token, and of this many of the likeliest in its place (0: none), as the
    model says it, before penalties, temperature and filters."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt from the second on; prompts are read densely under every
    policy, unless sparse_prompts says otherwise."""
    seed: int = 0
    """The request draws the same random numbers for the same seed, whatever else is in the batch; 0 up to but not
    2**64. In a list of prompts with one set of these parameters, prompt i (from 0) has seed + i, so that equal prompts
    get different texts."""

    def __post_init__(self) -> None:
        if self.seed is None:
            object.__setattr__(self, "seed", secrets.randbelow(NUM_SEEDS))
        if isinstance(self.logit_bias, Mapping):
            object.__setattr__(self, "logit_bias", [(_token_id(name), bias) for name, bias in self.logit_bias.items()])
        if isinstance(self.json_schema, (Mapping, bool)):
            object.__setattr__(self, "json_schema", json.dumps(self.json_schema))
        wrong = settle(self, none_is_default=True)
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        wrong += [
            text
            for bad, text in (
                (self.max_tokens < 1, f"max_tokens is {self.max_tokens}, at least 1 is needed"),
                (self.n < 1, f"n is {self.n}, at least 1 is needed"),
                (
                    self.temperature != 0 and not 1e-6 <= self.temperature <= 100,
                    f"temperature is {self.temperature}, allowed is 0, or 1e-6 to 100",
                ),
                (self.top_k < 0, f"top_k is {self.top_k}, allowed is 0 or -1 (off) or more"),
                (not 0 < self.top_p <= 1, f"top_p is {self.top_p}, allowed is above 0 up to 1"),
                (not 0 <= self.min_p <= 1, f"min_p is {self.min_p}, allowed is 0 to 1"),
                (
                    not 0.01 <= self.repetition_penalty <= 100,
                    f"repetition_penalty is {self.repetition_penalty}, allowed is 0.01 to 100 (1 is off)",
                ),
                *(
                    (not -2 <= penalty <= 2, f"{name} is {penalty}, allowed is -2 to 2")
                    for name, penalty in (
                        ("presence_penalty", self.presence_penalty),
                        ("frequency_penalty", self.frequency_penalty),
                    )
                ),
                (
                    any(token_id < 0 or not -100 <= bias <= 100 for token_id, bias in self.logit_bias),
                    "logit_bias is for token ids from 0 on, and allowed is -100 to 100",
                ),
                (
                    not 0 <= self.min_tokens <= self.max_tokens,
                    f"min_tokens is {self.min_tokens}, allowed is 0 to max_tokens, which is {self.max_tokens}",
                ),
                (
                    self.json_schema is not None and self.regex is not None,
                    "json_schema and regex were both given; a text follows one of them",
                ),
                (
                    self.is_guided and (self.ignore_eos or self.min_tokens > 0),
                    "ignore_eos and min_tokens do not go with json_schema and regex, which say where the text ends",
                ),
                *(
                    (count is not None and not 0 <= count <= MAX_LOGPROBS, f"{name} is {count}, allowed is 0 to 20")
                    for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs))
                ),
                (any(not text for text in self.stop), "an empty stop string would end every text at once"),
                (not 0 <= self.seed < NUM_SEEDS, f"seed is {self.seed}, allowed is 0 up to but not 2**64"),
            )
            if bad
        ]
        if wrong:
            raise InputError("; ".join(wrong) + ".")

    @property
    def is_guided(self) -> bool:
        """Whether a grammar says which tokens may come."""
        return self.json_schema is not None or self.regex is not None

    @property
    def changes_logits(self) -> bool:
        """Whether logits are changed before temperature and filters."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.logit_bias != ()
            or self.min_tokens > 0
            or self.is_guided
        )


def _token_id(name: object) -> object:
    """A key of a mapping as JSON has it: a whole number as a string."""
    return int(name) if isinstance(name, str) and name.isdecimal() else name


_SAMPLE_STRIDE = 0x9E3779B97F4A7C15
"""2**64 over the golden ratio: seeds of samples meet none of those of a list of prompts, which are neighbours."""


def sample_params(params: SamplingParams, sample: int) -> SamplingParams:
    """The parameters of text `sample` (from 0) of the `n` of a prompt; those of the first are as if it were alone."""
    return replace(params, n=1, seed=(params.seed + sample * _SAMPLE_STRIDE) % NUM_SEEDS)


def per_request(params: SamplingParams, index: int) -> SamplingParams:
    """The parameters of request `index` (from 0) of a list that shares `params`: its seed is seed + index.

    So equal prompts differ, and a request draws the same numbers whether it runs with the others, alone or after a
    resume, from Python as from the command line.
    """
    return replace(params, seed=(params.seed + index) % NUM_SEEDS)


_DEFAULT_OPTIONS: Mapping[str, str | float] = {"policy": "sketch", "sparsity": 0.8, "kv_dtype": "auto"}
"""Without a quality."""


def quality_options(name: QualityName | None) -> Mapping[str, str | float]:
    """The options that this quality sets, by their names."""
    return _DEFAULT_OPTIONS if name is None else QUALITIES[name].options


_AS_THE_QUALITY_SAYS: Any = None
"""The default of an option that a quality sets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Which model runs, how it attends, and how much memory it may use.

    `auto` and None are resolved where the answer is known, into other objects.

    Raises:
        InputError: at construction, naming every field that is out of range or of another type.
    """

    model: str | None = None
    """A directory or a Hugging Face id of a checkpoint, or a .gguf file; None: the small model inside the package."""
    quality: Annotated[QualityName | None, Doc(_QUALITY_HELP)] = None
    policy: Annotated[OwnPolicy, Doc(_POLICY_HELP)] = _AS_THE_QUALITY_SAYS
    sparsity: OwnSparsity = _AS_THE_QUALITY_SAYS
    """Share of the earlier tokens that a decode step does not read, 0 up to but not 1; 1 - r in the paper (r: caching
    ratio). dense ignores it. None: as the quality says, 0.8 without one."""
    exact: bool = False
    """The tokens of dense attention: the policy only makes up drafts, several for each step, and a step that reads
    everything once says which of them are right. For policies that can take tokens back: sketch, streaming, local,
    strided. Drafts also come from the text itself, as with speculative; where they do not pay, none are tried."""
    speculative: Literal["off", "lookup"] = "off"
    """Where the tokens come from that a step tries in addition to the next one. lookup: from the text itself, what
    followed the last time that it read so (prompt lookup); for repetitive texts. Changes no token: each is chosen as
    without, and wrong drafts are dropped. How many are tried follows from how often they were right."""
    num_speculative_tokens: int = 8
    """Most tokens of one sequence that a step tries in this way."""
    coverage: float | None = None
    """With a sketch policy on a CPU: as few of these tokens as have this part of the attention weight, above 0 up to 1,
    by the sketch, in each layer; never more than the sparsity allows. None: as many as it allows."""
    budgets: Path | None = None
    """A file of `alisa tune`: layers share the tokens that the sparsity allows as it says, some read more and some
    less; for the policy and the sparsities that it was made for. None: all layers read as many."""
    sparse_prompts: float | None = None
    """Prompts are read sparsely from their 2049th token on: 64 tokens together read, of the blocks of 64 before theirs,
    those whose weight, by the mean of their keys, is at least this part of the largest; the first block and two before
    their own in any case. 0 (all) up to but not 1; 0.03 is what docs/accuracy.md measures. Saves time on a CPU and in
    long prompts only. None: prompts are read densely."""
    dtype: DtypeName = "auto"
    """What the model computes in; auto: what the checkpoint and the device suit."""
    weight_dtype: WeightDtypeName = "auto"
    """What the linear layers are kept in. float: the dtype that the model computes in. On a CPU: int8, half the memory
    and the reading of 16 bits, every output channel with a scale; int4, a third, every 32 inputs with a scale and a
    minimum, which are those of a GGUF file that has them, the projection to the vocabulary in 8 bits. auto: int4 for a
    GGUF file whose layers are in Q4_0 or Q4_1, where the CPU has native products, else float."""
    kv_dtype: OwnKvDtype = _AS_THE_QUALITY_SAYS
    """What K and V are kept in; None: as the quality says, auto without one. auto: the dtype that the model computes
    in, so that dense attention is exact. int8, k8v4 (K in 8 bits, V in 4) and int4 keep a scale for each token and
    head, the latter two for each 64 values of a longer head: 53, 41 and 28 % of the memory of 16 bits in heads of 64
    values; docs/accuracy.md says what they cost. What has 4 bits is turned into a basis that suits it, found at the
    start in one pass over 1024 random tokens."""
    device: DeviceName = "auto"
    """Where the model runs; auto: the GPU if there is one."""
    kv_device_memory: str | int | None = None
    """Hard cap of all that grows with tokens on the device (K and V, what the policy keeps of them, buffers, tables),
    such as 2GiB or 512MiB; None: half of what is free, on a GPU 90 %. K and V that do not fit are offloaded: to main
    memory below a GPU, then to disk."""
    kv_host_memory: str | int | None = None
    """Hard cap of the K and V in main memory below a GPU; 0: none; None: half of what is free. On a CPU main memory is
    the device, and this means nothing."""
    kv_disk_memory: str | int | None = None
    """Hard cap of the K and V on disk, with what deleted ones are rebuilt from; 0: no disk, prompts wait for room in
    memory instead; None: what the work needs, within 80 % of the free room."""
    kv_disk_path: Path | None = None
    """Directory whose disk is used; None: the directory for temporary files. The file is private to the run and gone
    when it ends, however it ends."""
    schedule: Path | None = None
    """File that says when tokens move below the device or are deleted to be recomputed, as JSON (docs/scheduling.md);
    None: when the memory caps demand it."""
    max_num_seqs: int = 32
    """Sequences worked on together; more prompts wait."""
    max_model_len: int | None = None
    """Tokens of a sequence, prompt and output together; None: as many as the model has positions."""
    prefill_chunk: int = 1024
    """Prompt tokens that go through the model in one pass; bounds the activations of long prompts, and how long
    running requests wait for a new one. Changes no token. Where rows are rounded (int8, int4, k8v4), whole sections of
    1024 tokens are read."""
    max_step_tokens: int | None = None
    """Prompt tokens that are read between two tokens of the requests that are being answered, so that a long prompt
    does not keep them waiting; None: prompts are read first, which is fastest where nobody watches. Changes no token.
    Where rows are rounded, a section of 1024 tokens is the least."""
    schedule_policy: Literal["fcfs", "hrrn"] = "fcfs"
    """Who runs next when more requests wait than may run, after priority. fcfs: the first to come. hrrn: the highest
    (waited + expected time) / expected time, so that short requests do not wait for long ones, and long ones not
    forever; the length of an output is guessed from its prompt, once 100 have ended. Changes no token."""
    fair: bool = False
    """Of the requests that wait with the same priority, those of the client go first who has got the fewest tokens; the
    clients of a server are its API keys. So nobody waits longer because another one sends much. Changes no token."""
    prefix_cache: bool = False
    """Keep K and V of prompts, so that a prompt that begins like an earlier one is read from there on only, and the n
    texts of a prompt read it once. Changes no token."""
    prefix_cache_memory: str | int | None = None
    """With prefix_cache: the part of the memory cap that it takes, of kv_device_memory on a CPU and of kv_host_memory
    below a GPU; None: a quarter."""
    prefix_cache_disk: Path | None = None
    """With prefix_cache: a directory that keeps these K and V from one run to the next; several processes may share
    it."""
    prefix_cache_disk_memory: str | int | None = None
    """Most bytes in that directory; None: 8GiB."""

    def __post_init__(self) -> None:
        wrong = settle(self)
        for name, value in quality_options(self.quality).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        sizes = {"kv_device_memory": 1, "kv_host_memory": 0, "kv_disk_memory": 0}
        for name, least in (sizes | {"prefix_cache_memory": 1, "prefix_cache_disk_memory": 1}).items():
            if (size := getattr(self, name)) is not None:
                try:
                    parse_bytes(size, least=least)
                except InputError as error:
                    wrong.append(f"{name}: {str(error).rstrip('.')}")
        wrong += [
            text
            for bad, text in (
                (not 0 <= self.sparsity < 1, f"sparsity is {self.sparsity}, allowed is 0 (dense) up to but not 1"),
                (
                    self.coverage is not None and not 0 < self.coverage <= 1,
                    f"coverage is {self.coverage}, allowed is above 0 up to 1 (all that the sparsity allows)",
                ),
                (
                    self.coverage is not None and self.policy in POLICIES and not POLICIES[self.policy].covers,
                    f"{self.policy} does not know the weight of what it does not read, so that it cannot have a "
                    f"coverage: choose {', '.join(name for name, entry in POLICIES.items() if entry.covers)}",
                ),
                (
                    self.budgets is not None and self.policy in POLICIES and not POLICIES[self.policy].by_layer,
                    f"{self.policy} reads the same in all layers, so that it cannot have budgets of each: choose "
                    f"{', '.join(name for name, entry in POLICIES.items() if entry.by_layer)}",
                ),
                (
                    self.sparse_prompts is not None and not 0 <= self.sparse_prompts < 1,
                    f"sparse_prompts is {self.sparse_prompts}, allowed is 0 (all is read) up to but not 1",
                ),
                (
                    self.sparse_prompts is not None and self.exact,
                    "exact gives the tokens of dense attention, and sparse_prompts others: leave one out",
                ),
                (
                    self.sparse_prompts is not None and self.policy in POLICIES and observes_prompts(self.policy),
                    f"{self.policy} looks at the whole attention of a prompt, which sparse_prompts does not compute: "
                    f"choose {', '.join(name for name in POLICIES if not observes_prompts(name))}",
                ),
                (self.max_num_seqs < 1, f"max_num_seqs is {self.max_num_seqs}, at least 1 is needed"),
                (
                    self.max_model_len is not None and self.max_model_len < 2,
                    f"max_model_len is {self.max_model_len}, at least 2 are needed, one for the prompt and one new",
                ),
                (
                    not 1 <= self.num_speculative_tokens <= 32,
                    f"num_speculative_tokens is {self.num_speculative_tokens}, allowed is 1 to 32",
                ),
                (
                    (self.exact or self.speculative != "off") and not POLICIES[self.policy].can_truncate,
                    f"{'exact' if self.exact else 'speculative'} tries tokens and takes some back, and the policy "
                    f"{self.policy} cannot forget what it has seen of them; {can_truncate_names()} can",
                ),
                (self.prefill_chunk < 1, f"prefill_chunk is {self.prefill_chunk}, at least 1 is needed"),
                (
                    self.max_step_tokens is not None and self.max_step_tokens < 1,
                    f"max_step_tokens is {self.max_step_tokens}, at least 1 is needed",
                ),
                (
                    not self.prefix_cache and (self.prefix_cache_disk, self.prefix_cache_memory) != (None, None),
                    "prefix_cache is off, and an option says how it is kept: turn it on",
                ),
                (
                    self.prefix_cache_disk is None and self.prefix_cache_disk_memory is not None,
                    "prefix_cache_disk_memory is of the directory prefix_cache_disk: name one",
                ),
            )
            if bad
        ]
        if wrong:
            raise InputError("; ".join(wrong) + ".")

    @property
    def reading_policy(self) -> str:
        """The policy that says what a step reads whose tokens count."""
        return "dense" if self.exact else self.policy

    @property
    def reading_coverage(self) -> float | None:
        """And its coverage."""
        return None if self.exact else self.coverage

    def describe(self) -> dict[str, str | int | float | None]:
        """Every option as it was asked for, as plain values for a report."""
        asked = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in asked.items()}


def with_options(config: EngineConfig | None, options: Mapping[str, Any]) -> EngineConfig:
    """`config` (None: the defaults) with these options changed; names of version 0.1 are taken with a warning.

    Raises:
        InputError: an option is unknown, given twice, out of range or of another type.
    """
    known = [field.name for field in fields(EngineConfig)]
    changes: dict[str, Any] = {}
    for given, value in options.items():
        name = RENAMED.get(given, given)
        if name != given:
            warnings.warn(renamed(given, name), FutureWarning, stacklevel=3)
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(known)}."
            raise InputError(f"There is no option {name!r}; {hint}")
        if name in changes:
            raise InputError(f"{name} was given twice, once under its old name; give it once.")
        changes[name] = value
    if "quality" in changes:
        unsaid: dict[str, Any] = dict.fromkeys(_DEFAULT_OPTIONS)
        changes = unsaid | changes
    return replace(config or EngineConfig(), **changes)


def renamed(old: str, new: str) -> str:
    """The line that tells a user of a name of version 0.1."""
    return f"{old} is called {new} now; the old name will go with version 0.3."
