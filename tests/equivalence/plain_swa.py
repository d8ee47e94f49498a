"""Algorithm 1 as a teacher-forced mask, row by row, on transformers' own model: simple, slow, and independent.

Nothing of the engine is used: the whole sequence goes through the model at once, and attention of every layer is
computed one row at a time, each row masked by what the earlier rows of the same layer showed.
"""

from fractions import Fraction

import torch
from transformers import AttentionInterface, AutoModelForCausalLM


def teacher_forced_logits(directory, token_ids, prompt_len, sparsity, dense_until=16):
    """Float32[S, V] of the tokens, rows before `prompt_len` dense, the others sparse."""

    def attention(module, query, key, value, attention_mask, scaling, **kwargs):
        group = query.shape[1] // key.shape[1]
        key, value = (tensor[0].repeat_interleave(group, dim=0) for tensor in (key, value))
        return masked_rows(query[0] * scaling, key, value, prompt_len, sparsity, dense_until), None

    AttentionInterface.register("plain_swa", attention)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="plain_swa")
    with torch.no_grad():
        return model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0].float()


def masked_rows(query, key, value, prompt_len, sparsity, dense_until):
    """query (scaled), key, value [H, S, D] -> [1, S, H, D]."""
    num_heads, length, head_dim = query.shape
    ratio = 1 - Fraction(str(sparsity))
    attention_rows = torch.zeros(length, length)  # summed over heads
    out = torch.zeros(length, num_heads, head_dim)
    for i in range(length):
        keep = torch.zeros(length, dtype=torch.bool)
        keep[: i + 1] = True
        if i >= prompt_len and i > dense_until:
            k = max(1, int(i * ratio / 2 + Fraction(1, 2)))
            local_sum = attention_rows[i - k : i, : i - k].sum(dim=0)
            keep[: i - k] = False
            keep[local_sum.topk(min(k, i - k)).indices] = True
        scores = torch.einsum("hd,hsd->hs", query[:, i], key)
        weights = scores.masked_fill(~keep, -torch.inf).softmax(dim=-1)
        attention_rows[i] = weights.sum(dim=0)
        out[i] = torch.einsum("hs,hsd->hd", weights, value)
    return out[None]
