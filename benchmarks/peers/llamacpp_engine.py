"""llama.cpp through the C interface of llama-cpp-python: all sequences of the batch in one `llama_decode` a step.

    .peers/llamacpp/bin/python benchmarks/peers/llamacpp_engine.py --shape llama-1.1b --prompt-len 1024 --output-len 256

Set up for its best here: compiled for this machine, bfloat16 weights, cache of 16-bit rows allocated at once, flash
attention where it chooses to, as many threads as cores. The checkpoint is written as a GGUF file once. llama.cpp has no
OPT, so that shape is recorded as unavailable.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from time import perf_counter

import llama_cpp as api
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors import safe_open
from workload import SHAPES, Run, Shape, Timing, Workload, finish, parser, run_of, unavailable

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


def write_gguf(shape: Shape, model: Path, target: Path) -> None:
    """Write the checkpoint as GGUF: matrices in bfloat16, norms in float32, no vocabulary."""
    partial = target.with_suffix(".partial")
    writer = GGUFWriter(partial, "llama")
    writer.add_context_length(shape.max_positions)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.ffn_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.hidden_size // shape.num_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    with safe_open(model / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            weight = file.get_tensor(name)
            if "q_proj" in name or "k_proj" in name:
                weight = for_interleaved_rope(weight, shape.num_heads if "q_proj" in name else shape.num_kv_heads)
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


class Engine:
    """A loaded model with a context for one workload.

    Args:
        file: the GGUF file.
        workload: whose sequences must fit into the cache.
        threads: for prompts and for decoding.
    """

    def __init__(self, file: Path, workload: Workload, threads: int) -> None:
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(str(file).encode(), api.llama_model_default_params())
        params = api.llama_context_default_params()
        params.n_ctx = workload.batch * (-(-(workload.prompt_len + workload.output_len) // 256) * 256)
        params.n_batch = workload.batch * workload.prompt_len
        params.n_ubatch = UBATCH
        params.n_seq_max = workload.batch
        params.n_threads = threads
        params.n_threads_batch = threads
        self._context = api.llama_init_from_model(self._model, params)
        self._batch = api.llama_batch_init(params.n_batch, 0, 1)
        self._vocab_size = SHAPES[workload.shape].vocab_size

    def clear(self) -> None:
        """Forget all sequences."""
        api.llama_memory_clear(api.llama_get_memory(self._context), True)

    def step(self, tokens: list[list[int]], position: int) -> list[int]:
        """Put the tokens of every sequence through the model; the likeliest next token of each.

        Args:
            tokens: for each sequence, as many as for every other.
            position: of the first of them.
        """
        batch, last = self._batch, []
        batch.n_tokens = 0
        for sequence, ids in enumerate(tokens):
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


def generate(engine: Engine, workload: Workload) -> tuple[Timing, int]:
    """Run the workload; its timing and the number of tokens that came."""
    engine.clear()
    start = perf_counter()
    tokens = engine.step(workload.prompts(), 0)
    num_output = len(tokens)
    prefill_s = perf_counter() - start
    for step in range(workload.output_len - 1):
        tokens = engine.step([[token] for token in tokens], workload.prompt_len + step)
        num_output += len(tokens)
    return Timing(perf_counter() - start, prefill_s), num_output


def measure(run: Run) -> None:
    """Print the record."""
    shape = SHAPES[run.workload.shape]
    if shape.family != "llama":
        unavailable("llamacpp", run, f"llama.cpp has no model of the family {shape.family}")
        return
    file = run.model.with_name(f"{run.model.name}-bf16.gguf")
    if not file.exists():
        write_gguf(shape, run.model, file)
    engine = Engine(file, run.workload, run.threads)
    generate(engine, run.workload.warm_up())
    timing, num_output = generate(engine, run.workload)
    notes = ["bf16 weights, f16 KV rows, compiled for this machine", f"{UBATCH} tokens in a pass"]
    finish("llamacpp", run, timing, packages=["llama-cpp-python", "gguf"], num_output=num_output, notes=notes)


def main() -> None:
    """Measure."""
    measure(run_of(parser(__doc__).parse_args()))


if __name__ == "__main__":
    main()
