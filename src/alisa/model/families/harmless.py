"""Fields of config.json that do not change what a decoder computes.

They say how a model was trained, saved or is to be sampled from; token ids and generation settings are read elsewhere.
What is switched off (null, false, 0, empty) is harmless whatever it is called.
"""

from __future__ import annotations

# fmt: off
_FIELDS = frozenset(
    {
        "_attn_implementation_autoset", "_commit_hash", "_flash_attn_2_enabled", "_model_name_or_path",
        "_name_or_path",
        "activation_dropout", "architectures", "attention_dropout", "attention_probs_dropout_prob",
        "attention_softmax_in_fp32", "attn_implementation", "attn_pdrop", "auto_map", "bad_words_ids",
        "base_model", "begin_suppress_tokens", "bos_token", "bos_token_id", "cache_implementation",
        "chunk_size_feed_forward", "classifier_dropout", "custom_pipelines", "datasets",
        "decoder_start_token_id", "description", "diversity_penalty", "do_sample", "dropout", "dtype",
        "early_stopping", "embd_pdrop", "embedding_dropout", "encoder_no_repeat_ngram_size", "eos_token",
        "eos_token_id", "eos_token_ids", "experts_implementation", "exponential_decay_length_penalty",
        "ffn_dropout", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "generation_config",
        "gradient_checkpointing", "hidden_dropout", "hidden_dropout_prob", "id2label", "init_std",
        "initializer_cutoff_factor", "initializer_range", "is_decoder", "is_llama_config",
        "keys_to_ignore_at_inference", "label2id", "language", "layerdrop", "length_penalty", "library_name",
        "license", "max_length", "max_sequence_length", "min_length", "model_max_length", "model_type", "n_ctx",
        "n_special", "name", "name_or_path", "neftune_noise_alpha", "no_repeat_ngram_size", "num_beam_groups",
        "num_beams", "num_key_value_groups", "num_labels", "num_return_sequences", "output_attentions",
        "output_hidden_states", "output_past", "output_router_logits", "output_scores", "pad_token",
        "pad_token_id", "predict_special_tokens", "prefix", "pretraining_tp", "problem_type", "pruned_heads",
        "remove_invalid_values", "reorder_and_upcast_attn", "repetition_penalty", "resid_pdrop",
        "residual_dropout", "return_dict", "return_dict_in_generate", "router_aux_loss_coef",
        "router_jitter_noise", "scale_attention_softmax_in_fp32", "sep_token_id", "seq_length",
        "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type",
        "summary_use_proj", "suppress_tokens", "tags", "task_specific_params", "temperature", "tokenizer_class",
        "tokenizer_model_max_length", "tokenizer_padding_side", "top_k", "top_p", "torch_dtype", "torchscript",
        "transformers.js_config", "transformers_version", "typical_p", "unk_token", "unk_token_id",
        "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache", "use_flash_attention",
        "use_flash_attention_2", "use_flash_attn", "use_memory_efficient_attention", "vllm_config",
    }
)
# fmt: on


def is_harmless(name: str, value: object) -> bool:
    """Whether a field that no family asks for may be left alone."""
    is_off = value is None or value is False or value == 0 or value in ("", [], {})
    return is_off or name in _FIELDS
