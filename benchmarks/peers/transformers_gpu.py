"""Hugging Face transformers on a GPU with its offloaded cache: K and V in main memory, each layer's come in its turn.

Started by `benchmarks/gpu_check.py` (src/alisa/lab/bench/remote/measured.py); weights are dummies of the job's shape,
made on the device, of whose memory torch may take `device_memory_bytes`.
"""

from __future__ import annotations

import torch
from measured import EngineJob, finish, unavailable
from transformers import AutoModelForCausalLM, OPTConfig, PreTrainedModel
from transformers_engine import CACHES, generate


def make_model(job: EngineJob) -> PreTrainedModel:
    """A model of the job's shape in its dtype: in float32 it would not fit."""
    shape = job.shape
    config = OPTConfig(
        hidden_size=shape["hidden_size"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        ffn_dim=shape["ffn_size"],
        vocab_size=shape["vocab_size"],
        max_position_embeddings=shape["max_positions"],
        word_embed_proj_dim=shape["hidden_size"],
    )
    usual = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, job.dtype))
    try:
        with torch.device("cuda"):
            return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    finally:
        torch.set_default_dtype(usual)


def main() -> None:
    """Measure."""
    job = EngineJob.read()
    if job.shape["family"] != "opt":
        unavailable(f"this driver makes OPT models only, not {job.shape['family']}")
        return
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, job.options["device_memory_bytes"] / total))
    model = make_model(job)
    generate(model, job.warm_up(), CACHES["offloaded"])
    clock, num_output = generate(model, job, CACHES["offloaded"])
    details = {"peak_device_bytes": torch.cuda.max_memory_reserved()}
    notes = ["offloaded cache", "sdpa", job.dtype]
    finish(job, clock, packages=["transformers", "torch"], num_output=num_output, notes=notes, details=details)


if __name__ == "__main__":
    main()
