"""What happens to vLLM's engine arguments that `EngineArgs` does not have: data, one line per argument."""

from __future__ import annotations

from typing import Any, NamedTuple

#: Nothing here depends on them, whatever their value: accepted, and named in one line of log.
IGNORED = frozenset(
    """
    enforce_eager swap_space disable_custom_all_reduce max_seq_len_to_capture max_context_len_to_capture
    cudagraph_capture_sizes max_cudagraph_capture_size cuda_graph_sizes compilation_config optimization_level
    performance_mode attention_backend attention_config disable_cascade_attn prefix_caching_hash_algo
    disable_hybrid_kv_cache_manager use_v2_block_manager disable_async_output_proc preemption_mode
    max_parallel_loading_workers ray_workers_use_nsight tokenizer_pool_size tokenizer_pool_type
    tokenizer_pool_extra_config use_tqdm_on_load served_model_name code_revision ignore_patterns pt_load_map_location
    safetensors_load_strategy disable_log_requests enable_log_requests
    guided_decoding_backend structured_outputs_config max_loras max_lora_rank max_cpu_loras lora_dtype
    fully_sharded_loras lora_extra_vocab_size limit_mm_per_prompt mm_processor_kwargs mm_processor_cache_gb
    disable_chunked_mm_input skip_mm_profiling interleave_mm_strings allowed_local_media_path allowed_media_domains
    master_addr master_port kv_offloading_backend multi_step_stream_outputs show_hidden_metrics_for_version
    data_parallel_backend block_hash_algo language_model_only enable_sleep_mode
    """.split()
)


class Only(NamedTuple):
    """An argument of which only some values mean what the engine does anyway."""

    allowed: tuple[Any, ...]
    #: Why, and what to do; completes "name=value is not supported: only ... works, since ...".
    reason: str


_ONE_GPU = "an engine runs on one GPU"
_SPECULATION = "speculative decoding is not supported yet"
_QUANTISED = "only unquantised weights and KV are supported"
_CONFIG_JSON = "the model's config.json decides; edit a copy of it"
_LORA = "LoRA adapters are not supported yet"
_OFFLOAD = "weights and KV stay on the device"
_HOOKS = "the engine cannot be extended through this argument"
_V0_ONLY = "vLLM dropped this argument with its V0 engine"
_REMOTE = "KV is not exchanged with other processes"
_HUB = "files come from the model directory or the Hugging Face hub; use the variable HF_TOKEN for a token"

#: Accepted with a line of log when the value is one of these, refused by name otherwise.
ONLY: dict[str, Only] = {
    "trust_remote_code": Only((False,), "code of model repositories is never run; all models are built in"),
    "tensor_parallel_size": Only((1,), _ONE_GPU),
    "pipeline_parallel_size": Only((1,), _ONE_GPU),
    "data_parallel_size": Only((1,), _ONE_GPU),
    "decode_context_parallel_size": Only((1,), _ONE_GPU),
    "prefill_context_parallel_size": Only((1,), _ONE_GPU),
    "nnodes": Only((1,), _ONE_GPU),
    "node_rank": Only((0,), _ONE_GPU),
    "distributed_executor_backend": Only((None, "uni", "mp"), _ONE_GPU),
    "enable_expert_parallel": Only((False,), _ONE_GPU),
    "enable_eplb": Only((False,), _ONE_GPU),
    "device": Only((None, "auto"), "JAX chooses the device; set the variable JAX_PLATFORMS to cpu or cuda"),
    "quantization": Only((None,), _QUANTISED),
    "quantization_param_path": Only((None,), _QUANTISED),
    "calculate_kv_scales": Only((False,), _QUANTISED),
    "speculative_config": Only((None,), _SPECULATION),
    "speculative_model": Only((None,), _SPECULATION),
    "num_speculative_tokens": Only((None,), _SPECULATION),
    "num_lookahead_slots": Only((0,), _SPECULATION),
    "enable_lora": Only((False,), _LORA),
    "lora_modules": Only((None,), _LORA),
    "cpu_offload_gb": Only((0, None), _OFFLOAD),
    "kv_offloading_size": Only((None,), _OFFLOAD),
    "kv_transfer_config": Only((None,), _REMOTE),
    "kv_events_config": Only((None,), _REMOTE),
    "ec_transfer_config": Only((None,), _REMOTE),
    "enable_prompt_embeds": Only((False,), "prompts are text or token ids"),
    "hf_overrides": Only((None, {}), _CONFIG_JSON),
    "rope_scaling": Only((None, {}), _CONFIG_JSON),
    "rope_theta": Only((None,), _CONFIG_JSON),
    "disable_sliding_window": Only((False,), _CONFIG_JSON),
    "hf_config_path": Only((None,), _HUB),
    "hf_token": Only((None,), _HUB),
    "tokenizer_revision": Only((None,), "model and tokenizer have one revision; pass revision"),
    "config_format": Only(("auto", "hf"), "configurations are read in Hugging Face's format"),
    "tokenizer_mode": Only(("auto", "hf"), "the tokenizer's files decide"),
    "model_impl": Only(("auto",), "all models are built in"),
    "model_loader_extra_config": Only((None, {}), _HOOKS),
    "additional_config": Only((None, {}), _HOOKS),
    "logits_processor_pattern": Only((None,), _HOOKS),
    "scheduler_cls": Only((None,), _HOOKS),
    "worker_cls": Only((None, "auto"), _HOOKS),
    "worker_extension_cls": Only((None, ""), _HOOKS),
    "io_processor_plugin": Only((None,), _HOOKS),
    "scheduler_reserve_full_isl": Only((True,), "a prompt is admitted when all of it fits in the free KV blocks"),
    "watermark": Only((0, None), "all KV blocks are used"),
    "max_num_scheduled_tokens": Only((None,), "the token budget of a step is max_num_batched_tokens"),
    "max_num_active_seqs": Only((None,), "max_num_seqs is the limit"),
    "max_num_queued_reqs": Only((None,), "the queue has no limit"),
    "max_num_queued_tokens": Only((None,), "the queue has no limit"),
    "max_num_partial_prefills": Only((1,), "long_prefill_token_threshold is the knob"),
    "max_long_partial_prefills": Only((1,), "long_prefill_token_threshold is the knob"),
    "num_scheduler_steps": Only((1,), _V0_ONLY),
    "scheduler_delay_factor": Only((0,), _V0_ONLY),
    "reasoning_parser": Only((None, ""), "texts are returned as they are generated"),
    "profiler_config": Only((None,), "profiler_dir names the folder of start_profile's traces"),
    "otlp_traces_endpoint": Only((None,), "traces are not exported"),
    "collect_detailed_traces": Only((None, []), "traces are not exported"),
}

KNOWN = frozenset(IGNORED) | frozenset(ONLY)


def refusal(name: str, value: Any) -> str | None:
    """Why a value of a known vLLM argument is refused ("must ..."), or None where it is harmless."""
    if name in IGNORED:
        return None
    rule = ONLY[name]
    if any(value is allowed or (allowed is not None and value == allowed) for allowed in rule.allowed):
        return None
    allowed = " or ".join(map(repr, rule.allowed))
    return f"is not supported: only {allowed} works, since {rule.reason}; leave the argument out"
