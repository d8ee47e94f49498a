"""The tokenizer against transformers and against itself: leading tokens, streaming, chats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from alisa.errors import InputError, ModelError
from alisa.model.tokenizer import Tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "  leading and   double spaces, a tab\tand\nnew lines\n\n",
    "emoji \N{GRINNING FACE}\N{ZERO WIDTH JOINER}\N{ROCKET} and 漢字かな交じり文, Überstraße, עברית",
    "def f(x):\n    return x ** 2  # comment",
]


def write_json(path: Path, fields: object) -> None:
    path.write_text(json.dumps(fields), encoding="utf-8")


def byte_level() -> tokenizers.Tokenizer:
    """A small byte-level BPE like GPT-2's, with three special tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|im_end|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 4, trainer)
    return backend


def sentencepiece_like(metaspace: bool) -> tokenizers.Tokenizer:
    """LLaMA-2 style: `▁` for spaces, byte tokens for what is not in the vocabulary, `<s>` in front.

    Two ways to write the same thing are in use: normalizer and decoder steps, or the Metaspace pair.
    """
    letters = sorted({c for c in "".join(TEXTS) if c.isascii() and not c.isspace()} | {"▁"})
    pieces = [*letters, *(f"▁{c}" for c in letters if c.isalpha()), "▁▁", "he", "▁the", "in", "▁an", "▁and"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *dict.fromkeys(pieces)]
    vocabulary = {name: index for index, name in enumerate(names)}
    merges = [(a, b) for a, b in (("▁", c) for c in letters if c.isalpha())]
    merges += [("▁", "▁"), ("h", "e"), ("▁t", "he"), ("i", "n"), ("▁a", "n"), ("▁an", "d")]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
        steps = [decoders.ByteFallback(), decoders.Metaspace(replacement="▁", prepend_scheme="first")]
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    lead = [("<s>", 1)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=lead)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def save(directory: Path, backend: tokenizers.Tokenizer, **settings: object) -> Path:
    backend.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | settings)
    return directory


BACKENDS = {
    "byte-level": byte_level,
    "sentencepiece": lambda: sentencepiece_like(metaspace=False),
    "metaspace": lambda: sentencepiece_like(metaspace=True),
}


@pytest.fixture(scope="module", params=BACKENDS)
def loaded(request, tmp_path_factory) -> tuple[Path, Tokenizer]:
    directory = tmp_path_factory.mktemp(request.param)
    save(directory, BACKENDS[request.param](), bos_token="<s>", eos_token="</s>")
    return directory, Tokenizer.load(directory)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_those_of_transformers(loaded, text):
    directory, tokenizer = loaded
    reference = transformers.AutoTokenizer.from_pretrained(directory)
    ids = tokenizer.encode(text)
    assert ids == reference(text).input_ids
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    # The Metaspace pair loses one leading space, in transformers too.
    assert tokenizer.decode(ids).lstrip() == text.lstrip()


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_are_whole_characters(loaded, text):
    _, tokenizer = loaded
    stream = tokenizer.detokenizer()
    ids = tokenizer.encode(text)
    pieces = [stream.feed(token_id) for token_id in ids]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert len([piece for piece in pieces if piece]) > len(text) / 10, "it streams, instead of waiting for the end"
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


@given(data=st.data())
def test_streamed_pieces_add_up_for_any_ids(loaded, data):
    _, tokenizer = loaded
    # Some ids beyond the vocabulary: models have padded rows that have no text.
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    stream = tokenizer.detokenizer()
    assert "".join(map(stream.feed, ids)) + stream.flush() == tokenizer.decode(ids)


@given(text=st.text(max_size=30))
def test_streamed_pieces_add_up_for_any_text(loaded, text):
    _, tokenizer = loaded
    ids = tokenizer.encode(text)
    stream = tokenizer.detokenizer()
    assert "".join(map(stream.feed, ids)) + stream.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("add_bos", [True, False, None])
@pytest.mark.parametrize("name", BACKENDS)
def test_the_leading_token_is_that_of_transformers(name, add_bos, tmp_path):
    settings = {} if add_bos is None else {"add_bos_token": add_bos}
    directory = save(tmp_path, BACKENDS[name](), bos_token="<s>", eos_token="</s>", **settings)
    reference = transformers.AutoTokenizer.from_pretrained(directory)
    ids = Tokenizer.load(directory).encode("the fox")
    assert ids == reference("the fox").input_ids
    assert (ids[0] == reference.bos_token_id) == (name != "byte-level")


def test_a_leading_token_that_is_spelled_out_is_not_doubled(tmp_path):
    tokenizer = Tokenizer.load(save(tmp_path, sentencepiece_like(metaspace=True), bos_token="<s>"))
    assert tokenizer.encode("<s>the fox").count(1) == 1


@pytest.mark.parametrize(("model_type", "leads"), [("opt", True), ("gpt2", False)])
def test_vocabulary_and_merges_make_the_same_tokenizer(model_type, leads, tmp_path):
    backend = byte_level()
    backend.model.save(str(tmp_path))
    write_json(tmp_path / "config.json", {"model_type": model_type, "eos_token_id": 1})
    special = {"content": "</s>", "lstrip": False, "special": True}
    write_json(tmp_path / "special_tokens_map.json", {"bos_token": special, "eos_token": "</s>"})
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode("the fox\N{ROCKET}")
    assert ids == [1] * leads + backend.encode("the fox\N{ROCKET}").ids
    assert tokenizer.decode([*ids, 1]) == "the fox\N{ROCKET}"
    assert tokenizer.encode("</s>the") == [1, *backend.encode("the").ids]
    assert tokenizer.eos_ids == {1}


def test_an_older_opt_repository_is_read_as_in_transformers(tmp_path):
    byte_level().model.save(str(tmp_path))
    config = transformers.OPTConfig(bos_token_id=1, eos_token_id=1)
    config.save_pretrained(tmp_path)
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "bos_token": "</s>", "eos_token": "</s>"}
    write_json(tmp_path / "tokenizer_config.json", settings | {"unk_token": "</s>", "pad_token": "<s>"})
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text) == reference(text).input_ids
        assert tokenizer.encode(text)[0] == 1


CHAT_TEXTS = [
    *TEXTS,
    "<|im_start|>user\nIt's 2024, they'LL see<|im_end|>\n",
    "a <tool_call> b<|extra|>c <role>d 3.14159",
]


DECLARED = {
    "400": {"content": "<tool_call>", "special": False},
    "401": {"content": "<|extra|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False},
    "402": {"content": "<role>", "special": False, "lstrip": True, "rstrip": False, "normalized": False},
}


@pytest.mark.parametrize("place", ["tokenizer_config.json", "added_tokens.json"])
@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "Qwen2TokenizerFast", "GPT2Tokenizer", None])
def test_the_named_class_decides_how_vocabulary_and_merges_cut_words(kind, place, tmp_path):
    byte_level().model.save(str(tmp_path))
    settings = {"eos_token": "<|im_end|>", "pad_token": "</s>", "unk_token": "</s>"}
    settings |= {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    settings |= {} if kind is None else {"tokenizer_class": kind}
    if place == "added_tokens.json":
        write_json(tmp_path / place, {fields["content"]: int(token_id) for token_id, fields in DECLARED.items()})
    else:
        settings["added_tokens_decoder"] = DECLARED
    write_json(tmp_path / "tokenizer_config.json", settings)
    config = transformers.GPT2Config if kind == "GPT2Tokenizer" else transformers.Qwen2Config
    config(eos_token_id=2).save_pretrained(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    for text in CHAT_TEXTS:
        assert tokenizer.encode(text) == reference(text).input_ids
    assert tokenizer.encode("<tool_call><|extra|><role>") == [400, 401, 402]
    assert tokenizer.encode("<|im_start|><|im_end|>") == [3, 2]


def test_a_class_that_is_not_known_is_refused_with_the_recipe(tmp_path):
    byte_level().model.save(str(tmp_path))
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    with pytest.raises(ModelError, match=r"class unnamed is not known here; .* writes tokenizer.json"):
        Tokenizer.load(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    with pytest.raises(ModelError, match="class LlamaTokenizer is not known"):
        Tokenizer.load(tmp_path)


def test_tokens_that_only_the_files_beside_tokenizer_json_know_are_single_tokens(tmp_path):
    declared = {"400": {"content": "<|a|>", "special": True}, "401": {"content": "<b>", "special": False}}
    directory = save(tmp_path, byte_level(), eos_token="<|end|>", added_tokens_decoder=declared)
    write_json(directory / "added_tokens.json", {"<b>": 401})
    reference = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer = Tokenizer.load(directory)
    for text in ("x<|a|>y", "x <b> y<|end|>", "<|a|><b><|end|>"):
        assert tokenizer.encode(text) == reference(text).input_ids
    assert tokenizer.encode("<|a|><b><|end|>") == [400, 401, 402]
    assert tokenizer.eos_ids == {402}
    write_json(directory / "added_tokens.json", {"<b>": 401, "<c>": 777})
    with pytest.raises(ModelError, match=r"'<c>' the id .*, and the files beside it say 777"):
        Tokenizer.load(directory)


def test_end_tokens_come_from_every_file(tmp_path):
    directory = save(tmp_path, byte_level(), eos_token={"content": "<|im_end|>"})
    write_json(directory / "config.json", {"eos_token_id": 0})
    write_json(directory / "generation_config.json", {"eos_token_id": [0, 1]})
    assert Tokenizer.load(directory).eos_ids == {0, 1, 2}


CHATML = """{% for message in messages %}
    {% if message.role == 'tool' %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message.role + '\n' + message.content | trim + '<|im_end|>' + '\n' }}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{% endif %}
"""
HEADERS = """{{- bos_token }}
{%- set ns = namespace(first=true) %}
{%- for message in messages %}
    {%- generation %}
    {{- '[' + message['role'] + ']\n\n' + message['content'] + '</s>' }}
    {%- endgeneration %}
    {%- if ns.first %}{{- {"role": message.role, "text": "<é>"} | tojson }}{% set ns.first = false %}{% endif %}
{%- endfor %}
{%- if tools %}{{- tools }}{% endif %}
{%- if add_generation_prompt %}{{- '[assistant]\n\n' }}{% endif %}"""
INSTRUCT = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"""

CHAT = [
    {"role": "user", "content": " What is an ewe? "},
    {"role": "assistant", "content": "A sheep."},
    {"role": "user", "content": "And a ram?"},
]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("template", [CHATML, HEADERS, INSTRUCT], ids=["chatml", "headers", "instruct"])
@pytest.mark.parametrize("backend", [byte_level, lambda: sentencepiece_like(metaspace=True)], ids=["bytes", "spm"])
def test_chats_are_rendered_as_in_transformers(backend, template, add_generation_prompt, tmp_path):
    directory = save(tmp_path, backend(), bos_token="<s>", eos_token="</s>", chat_template=template)
    tokenizer = Tokenizer.load(directory)
    reference = transformers.AutoTokenizer.from_pretrained(directory)
    options = {"add_generation_prompt": add_generation_prompt}
    text = tokenizer.render_chat(CHAT, **options)
    assert text == reference.apply_chat_template(CHAT, tokenize=False, **options)
    ids = reference.apply_chat_template(CHAT, tokenize=True, return_dict=False, **options)
    assert tokenizer.encode_chat(CHAT, **options) == ids
    if template != CHATML:
        assert text.startswith("<s>")
        assert tokenizer.encode(text) == ids, "encoding the text of a chat adds no second leading token"


TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]
WITH_TOOLS = """{% if tools %}{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content or '' }}{% if m.tool_calls %}
{{ m.tool_calls[0].function.name }}{% endif %}
{% endfor %}{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"""


def test_tools_and_other_arguments_reach_the_template_as_in_transformers(tmp_path):
    directory = save(tmp_path, byte_level(), eos_token="</s>", chat_template=WITH_TOOLS)
    tokenizer = Tokenizer.load(directory)
    reference = transformers.AutoTokenizer.from_pretrained(directory)
    for thinking in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        text = tokenizer.render_chat(CHAT, tools=TOOLS, template_kwargs=thinking)
        assert text == reference.apply_chat_template(
            CHAT, tools=TOOLS, tokenize=False, add_generation_prompt=True, **thinking
        )
        assert ("<think>" in text) == (thinking.get("enable_thinking") is False)


def test_a_key_that_is_null_is_left_out(tmp_path):
    template = "{% for m in messages %}{{ m.role }}{% if 'content' in m %}: {{ m['content'] }}{% endif %};{% endfor %}"
    tokenizer = Tokenizer.load(save(tmp_path, byte_level(), chat_template=template))
    assert tokenizer.render_chat([{"role": "assistant", "content": None, "tool_calls": []}]) == "assistant;"


def test_a_template_file_is_read_when_a_chat_needs_it(tmp_path):
    directory = save(tmp_path, byte_level())
    (directory / "chat_template.jinja").write_bytes(b"{{ '\xff' }}")
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.encode("the fox")
    with pytest.raises(InputError, match=r"chat_template.jinja is not readable .*0xff"):
        tokenizer.render_chat(CHAT)


def test_named_templates_and_the_template_file(tmp_path):
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "{{ messages[0].content }}"}]
    directory = save(tmp_path, byte_level(), chat_template=named)
    assert Tokenizer.load(directory).render_chat([{"role": "user", "content": "hi"}]) == "hi"
    (directory / "chat_template.jinja").write_text("file: {{ messages[0].content }}")
    assert Tokenizer.load(directory).render_chat([{"role": "user", "content": "hi"}]) == "file: hi"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "no chat template"),
        ("{% if %}", "not usable"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "calls itself without end"),
        ("{{ ''.__class__.__mro__ }}", "refuses"),
    ],
)
def test_chats_that_cannot_be_rendered_say_why(template, words, tmp_path):
    tokenizer = Tokenizer.load(save(tmp_path, byte_level(), chat_template=template))
    assert tokenizer.has_chat_template == (template is not None)
    with pytest.raises(InputError, match=words):
        tokenizer.render_chat(CHAT)


def test_directories_without_a_usable_tokenizer_say_what_to_do(tmp_path):
    with pytest.raises(ModelError, match="no tokenizer"):
        Tokenizer.load(tmp_path)
    for name, words in [
        ("tekken.json", r"only as tekken\.json \(Mistral's own form\), .*; take tokenizer\.json from a repository"),
        ("spiece.model", r"only as spiece\.model \(SentencePiece\), .*; convert it once"),
        ("tokenizer.model", r"only as tokenizer\.model \(SentencePiece\), .*; convert it once"),
    ]:
        (tmp_path / name).write_bytes(b"\n")
        with pytest.raises(ModelError, match=words):
            Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="damaged"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelError, match="instead of a JSON object"):
        Tokenizer.load(tmp_path)
