"""llama.cpp through the C interface of llama-cpp-python: all sequences of the batch in one `llama_decode` a step.

Started by `alisa bench run` (src/alisa/lab/bench/remote/measured.py). Set up as its users run it, and for its best
here: compiled for this machine, float16 rows in a cache that is allocated at once, flash attention where it chooses to,
as many threads as cores. A GGUF file is run as it is, or with the option `weights = "q8_0"` as llama.cpp's own
quantiser writes it from that file; a checkpoint is written as a GGUF file in bfloat16 once. llama.cpp has no OPT, so
that shape is recorded as unavailable. Batches are as large as a memory budget allows, and each ends before the next
begins. A conversation stays in the cache, and each turn adds what is new.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import llama_cpp as api
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from measured import Clock, EngineJob, NoRoom, finish, unavailable
from safetensors import safe_open

UBATCH = 512
"""Tokens in one pass through the model; larger ones gain nothing on a CPU."""

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
MODEL_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """What GGUF calls a tensor of a LLaMA checkpoint."""
    stem = name.removesuffix(".weight")
    if stem in MODEL_NAMES:
        return f"{MODEL_NAMES[stem]}.weight"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{LAYER_NAMES[part]}.weight"


def for_interleaved_rope(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of a query or key projection in the order of pairs, which llama.cpp rotates; the checkpoint has halves."""
    halves = weight.view(num_heads, 2, -1, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()


def write_gguf(shape: Mapping[str, Any], model: Path, target: Path) -> None:
    """Write the checkpoint as GGUF: matrices in bfloat16, norms in float32, no vocabulary."""
    partial = target.with_suffix(".partial")
    writer = GGUFWriter(partial, "llama")
    writer.add_context_length(shape["max_positions"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_block_count(shape["num_layers"])
    writer.add_feed_forward_length(shape["ffn_size"])
    writer.add_head_count(shape["num_heads"])
    writer.add_head_count_kv(shape["num_kv_heads"])
    writer.add_layer_norm_rms_eps(shape["norm_eps"])
    writer.add_rope_dimension_count(shape["head_dim"])
    writer.add_rope_freq_base(shape["rope"]["theta"])
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    with safe_open(model / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            weight = file.get_tensor(name)
            if "q_proj" in name or "k_proj" in name:
                weight = for_interleaved_rope(weight, shape["num_heads"] if "q_proj" in name else shape["num_kv_heads"])
            if weight.ndim == 1:
                writer.add_tensor(gguf_name(name), weight.float().numpy())
            else:
                raw = weight.view(torch.uint8).numpy()
                writer.add_tensor(gguf_name(name), raw, raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)


def as_q8_0(file: Path, target: Path) -> None:
    """Write the file with its matrices in Q8_0, from the numbers that it has."""
    partial = target.with_suffix(".partial")
    params = api.llama_model_quantize_default_params()
    params.ftype = api.LLAMA_FTYPE_MOSTLY_Q8_0
    params.allow_requantize = True
    status = api.llama_model_quantize(str(file).encode(), str(partial).encode(), ctypes.byref(params))
    if status != 0:
        raise RuntimeError(f"llama_model_quantize returned {status}.")
    partial.rename(target)


class Engine:
    """A loaded model with a context for one job.

    Args:
        file: the GGUF file.
        job: whose sequences must fit into the cache.
        together: sequences at a time.
    """

    def __init__(self, file: Path, job: EngineJob, together: int) -> None:
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(str(file).encode(), api.llama_model_default_params())
        params = api.llama_context_default_params()
        params.n_ctx = together * (-(-job.longest // 256) * 256)
        # The last token of an answer comes with the next turn.
        params.n_batch = together * (max(map(len, job.prompts)) + job.turns)
        params.n_ubatch = UBATCH
        params.n_seq_max = together
        params.n_threads = job.threads
        params.n_threads_batch = job.threads
        self._context = api.llama_init_from_model(self._model, params)
        self._batch = api.llama_batch_init(params.n_batch, 0, 1)
        self._vocab_size = job.shape["vocab_size"]

    def clear(self) -> None:
        """Forget all sequences."""
        api.llama_memory_clear(api.llama_get_memory(self._context), True)

    def step(self, tokens: Sequence[Sequence[int]], positions: Sequence[int]) -> list[int]:
        """Put tokens of every sequence through the model; the likeliest next token of each.

        Args:
            tokens: for each sequence.
            positions: of the first of them.
        """
        batch, last = self._batch, []
        batch.n_tokens = 0
        for sequence, (ids, position) in enumerate(zip(tokens, positions, strict=True)):
            for offset, token_id in enumerate(ids):
                index = batch.n_tokens
                batch.token[index] = token_id
                batch.pos[index] = position + offset
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = sequence
                batch.logits[index] = offset == len(ids) - 1
                batch.n_tokens += 1
            last.append(batch.n_tokens - 1)
        status = api.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}.")
        return [self._likeliest(index) for index in last]

    def _likeliest(self, index: int) -> int:
        logits = api.llama_get_logits_ith(self._context, index)
        array = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * self._vocab_size)).contents
        return int(np.frombuffer(array, dtype=np.float32).argmax())


def generate(engine: Engine, job: EngineJob) -> tuple[Clock, int]:
    """Run the job; its times and the number of tokens that came."""
    clock, num_output = Clock(len(job.prompts)), 0
    for start, prompts in job.groups():
        engine.clear()
        tokens = engine.step(prompts, [0] * len(prompts))
        num_output += len(tokens)
        for index in range(start, start + len(prompts)):
            clock.first(index)
        for step in range(job.output_len - 1):
            tokens = engine.step([[token] for token in tokens], [len(ids) + step for ids in prompts])
            num_output += len(tokens)
            clock.step()
    clock.stop()
    return clock, num_output


def converse(engine: Engine, job: EngineJob) -> tuple[Clock, int]:
    """Hold the conversation; its times and the number of tokens that came."""
    engine.clear()
    clock, num_output, position = Clock(len(job.prompts)), 0, 0
    unread: list[int] = []
    for index, ids in enumerate(job.prompts):
        clock.turn()
        [token] = engine.step([[*unread, *ids]], [position])
        position += len(unread) + len(ids)
        num_output += 1
        clock.first(index)
        for _ in range(job.output_len - 1):
            [token] = engine.step([[token]], [position])
            position += 1
            num_output += 1
            clock.step()
        unread = [token]
    clock.stop()
    return clock, num_output


def file_of(job: EngineJob) -> Path:
    """The GGUF file to run, written if it is not there yet."""
    model, scratch = Path(job.model), Path(job.scratch)
    file = model
    if model.is_dir():
        file = scratch / f"{model.name}-bf16.gguf"
        if not file.exists():
            write_gguf(job.shape, model, file)
    if job.options.get("weights", "file") == "file":
        return file
    target = scratch / f"{model.name.removesuffix('.gguf')}-q8_0.gguf"
    if not target.exists():
        scratch.mkdir(parents=True, exist_ok=True)
        as_q8_0(file, target)
    return target


def measure(job: EngineJob) -> None:
    """Print the result."""
    if job.shape["family"] != "llama":
        unavailable(f"llama.cpp has no model of the family {job.shape['family']}")
        return
    together = 1 if job.turns else max(len(prompts) for _, prompts in job.groups())
    file = file_of(job)
    engine = Engine(file, job, together)
    run = converse if job.turns else generate
    run(engine, job.warm_up())
    clock, num_output = run(engine, job)
    notes = [
        f"{file.name}, f16 KV rows, compiled for this machine",
        f"{UBATCH} tokens in a pass",
        f"batches of {together}",
    ]
    finish(job, clock, packages=["llama-cpp-python", "gguf"], num_output=num_output, notes=notes)


def main() -> None:
    """Measure."""
    try:
        measure(EngineJob.read())
    except NoRoom as error:
        unavailable(str(error))


if __name__ == "__main__":
    main()
