"""The checklist for a new vLLM release: all that this package reaches for inside vLLM beyond what vLLM documents.

Pure data: no vLLM is imported. compat.py checks it against the running engine at start-up, module by module as they are
loaded, and tests/test_compat.py against a whole source tree; nothing of vLLM may be reached for that is not here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reach:
    """One thing inside vLLM.

    Attributes:
        module: where it is imported from.
        name: its name there, dotted inside a class.
        why: what it is needed for.
        moved: what to do where a release has moved it.
        parameters: those that it takes first, in this order.
        keywords: those that it is given by name.
        attributes: those that are read or written on its instances.
        known_as: what our code calls such instances; no other attribute of these may be read.
    """

    module: str
    name: str
    why: str
    moved: str
    parameters: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    known_as: tuple[str, ...] = ()


PUBLIC = {
    "vllm": ("LLM", "ModelRegistry", "PoolingParams", "SamplingParams", "__version__"),
    "vllm.config": ("VllmConfig",),
    "vllm.distributed": (
        "get_pp_group",
        "get_tensor_model_parallel_rank",
        "get_tensor_model_parallel_world_size",
        "tensor_model_parallel_all_reduce",
    ),
    "vllm.engine.arg_utils": ("EngineArgs",),
    "vllm.envs": ("VLLM_USE_RUST_FRONTEND",),
    "vllm.exceptions": ("VLLMValidationError",),
    "vllm.inputs": ("TokensPrompt",),
    "vllm.logger": ("init_logger",),
    "vllm.platforms": ("current_platform",),
}
"""What vLLM documents, or shows to every plugin: named here so that the rest can be told from it."""

NOT_MODULES = ("vllm.general_plugins", "vllm.prunepath")
"""Strings that look like modules of vLLM: an entry point group, and our loggers' name, under which vLLM prints them."""

_TAUS_APART = "find where a request's blocks are hashed, or give every request a salt of its own: taus must not share"
_V1 = "read execute_model of the V1 runner: before_forward needs every request's tokens right before the model runs"
_V2 = "read ModelState of the V2 runner: prepare_inputs must run before every forward, captured graphs included"
_FRONT_END = "find where a request becomes the engine's own, in the process that answers HTTP"
_CONFIG = "look the field up in vllm/config; a feature that can no longer be refused by name must be supported"
_WORKER = "read the worker's base class; the executor calls these by name"
_BUILD = "read the model's file; its decoder layer must build our layer in the place of the dense one"
_ADAPTERS = "find what a worker is told of an adapter: all must pass refuse_adapter before they are loaded"
_BATCH = "read run_batch: every line's body must pass settled_knob before it becomes a request"
_QUEUE = "read StatLoggerManager: load.py needs the number of waiting requests after every step"
_BENCHMARK = "read the benchmark's module; only `prunepath bench` needs it"

REACHES = (
    # Registration and configuration
    Reach(
        "vllm.model_executor.models.config",
        "MODELS_CONFIG_MAP",
        "the per-architecture hook, without which nothing is refused and no worker class chosen",
        "find what VllmConfig.__post_init__ calls for an architecture",
    ),
    Reach(
        "vllm.model_executor.models.config",
        "VerifyAndUpdateConfig.verify_and_update_config",
        "overridden: the hook before the engine starts",
        "find what VllmConfig.__post_init__ calls for an architecture",
        parameters=("vllm_config",),
    ),
    Reach(
        "vllm.model_executor.models.config",
        "VerifyAndUpdateConfig.verify_and_update_model_config",
        "overridden: bounds max_model_len by the model's positions",
        "find where ModelConfig settles max_model_len",
        parameters=("model_config",),
    ),
    Reach(
        "vllm.config",
        "VllmConfig",
        "what is served, and what must be refused",
        _CONFIG,
        attributes=(
            "additional_config",
            "cache_config",
            "kv_transfer_config",
            "load_config",
            "lora_config",
            "model_config",
            "offload_config",
            "parallel_config",
            "scheduler_config",
            "speculative_config",
            "use_v2_model_runner",
        ),
        known_as=("vllm_config",),
    ),
    Reach(
        "vllm.config.model",
        "ModelConfig",
        "the checkpoint's configuration, its dtype and lengths",
        _CONFIG,
        attributes=(
            "dtype",
            "enable_sleep_mode",
            "generation_config",
            "get_total_num_hidden_layers",
            "get_vocab_size",
            "hf_config",
            "hf_config_path",
            "max_model_len",
            "model",
            "original_max_model_len",
            "override_generation_config",
            "quantization",
            "runner_type",
            "served_model_name",
            "try_get_generation_config",
        ),
        known_as=("model_config",),
    ),
    Reach(
        "vllm.config.parallel",
        "ParallelConfig",
        "our worker class goes in; token orders that taus cannot follow are refused",
        _CONFIG,
        attributes=("enable_dbo", "prefill_context_parallel_size", "ubatch_size", "worker_cls"),
        known_as=("parallel", "parallel_config"),
    ),
    Reach(
        "vllm.config.scheduler",
        "SchedulerConfig",
        "the size of the buffer of taus; full_queue unless given",
        _CONFIG,
        attributes=("max_num_batched_tokens", "max_num_seqs"),
        known_as=("scheduler_config",),
    ),
    Reach(
        "vllm.config.cache",
        "CacheConfig",
        "KV offloading that is configured here becomes a connector later",
        _CONFIG,
        attributes=("kv_offloading_backend", "kv_offloading_size"),
        known_as=("cache",),
    ),
    Reach(
        "vllm.config.offload",
        "OffloadConfig",
        "vLLM's own offload and experts in host memory exclude each other",
        _CONFIG,
        attributes=("prefetch", "uva"),
        known_as=("offload",),
    ),
    Reach(
        "vllm.config.load",
        "LoadConfig",
        "load formats that do not read the checkpoint's tensors by name are refused",
        _CONFIG,
        attributes=("load_format",),
        known_as=("load_config",),
    ),
    Reach(
        "vllm.config.kv_transfer",
        "KVTransferConfig",
        "connectors that go by token ids alone are refused",
        _CONFIG,
        attributes=("kv_connector", "kv_connector_extra_config", "kv_connector_module_path"),
    ),
    Reach(
        "vllm.config.speculative",
        "SpeculativeConfig",
        "a PrunePath draft model is refused",
        _CONFIG,
        attributes=("draft_model_config",),
    ),
    # The front end
    Reach(
        "vllm.v1.engine.input_processor",
        "InputProcessor.process_inputs",
        "wrapped: a request's tau is checked and written to the engine's copy of its parameters",
        _FRONT_END,
        parameters=("self", "request_id", "prompt", "params"),
    ),
    Reach(
        "vllm.v1.engine.input_processor",
        "InputProcessor",
        "which model the request is for",
        _FRONT_END,
        attributes=("vllm_config",),
    ),
    Reach(
        "vllm.exceptions",
        "VLLMValidationError.__init__",
        "a refusal that becomes HTTP 400",
        "find which exception the front end answers with 400",
        parameters=("self", "message"),
        keywords=("parameter",),
    ),
    Reach(
        "vllm.entrypoints.serve.exception_handling.error_response",
        "create_error_response",
        "the body of such an answer",
        "build the OpenAI error by hand",
        parameters=("message",),
    ),
    Reach(
        "vllm.entrypoints.launchers.app",
        "init_entrypoints_middleware",
        "wrapped: our middlewares and routes are added to the server's app",
        "find where the server adds its own middleware; it must run before the app serves",
        parameters=("args", "app"),
    ),
    Reach(
        "vllm.v1.engine.async_llm",
        "AsyncLLM.collective_rpc",
        "a scrape of /metrics has the workers bring their counters up to date, in every data-parallel engine",
        "find how the front end calls a method of every worker",
        parameters=("self", "method"),
        keywords=("args",),
    ),
    Reach(
        "vllm.v1.engine.core_client",
        "AsyncMPClient.call_utility_all_async",
        "a request's report is asked of every data-parallel engine: the front end does not know which ran it",
        "call AsyncLLM.collective_rpc, which brings the first engine's answer alone",
        parameters=("self", "method"),
    ),
    Reach(
        "vllm.v1.engine.core",
        "EngineCore.collective_rpc",
        "what is called there",
        "call AsyncLLM.collective_rpc, which brings the first engine's answer alone",
        parameters=("self", "method", "timeout", "args", "kwargs"),
    ),
    Reach(
        "vllm.v1.engine.async_llm",
        "AsyncLLM",
        "the queue's listener is hung into its logger manager",
        _QUEUE,
        attributes=("engine_core", "logger_manager", "vllm_config"),
        known_as=("engine_client", "engine"),
    ),
    Reach(
        "vllm.v1.metrics.loggers",
        "StatLoggerManager.record",
        "tells listeners of every step",
        _QUEUE,
        parameters=("self", "scheduler_stats", "iteration_stats"),
    ),
    Reach(
        "vllm.v1.metrics.loggers",
        "StatLoggerManager",
        "the list of listeners",
        _QUEUE,
        attributes=("stat_loggers",),
        known_as=("manager",),
    ),
    Reach(
        "vllm.v1.metrics.loggers",
        "AggregateStatLoggerBase.record",
        "overridden: how many requests wait",
        _QUEUE,
        parameters=("self", "scheduler_stats", "iteration_stats"),
        keywords=("engine_idx",),
    ),
    Reach(
        "vllm.v1.metrics.stats",
        "SchedulerStats",
        "how many requests wait",
        _QUEUE,
        attributes=("num_skipped_waiting_reqs", "num_waiting_reqs"),
        known_as=("scheduler_stats",),
    ),
    Reach(
        "vllm.entrypoints.launchers.run_batch",
        "run_batch",
        "wrapped: which model the file is for",
        _BATCH,
        parameters=("engine_client", "args"),
    ),
    Reach(
        "vllm.entrypoints.launchers.run_batch",
        "run_request",
        "wrapped: a line's knob and report",
        _BATCH,
        parameters=("serving_engine_func", "request"),
    ),
    Reach(
        "vllm.entrypoints.launchers.run_batch",
        "BatchRequestInput",
        "a line, whose class method model_validate_json (pydantic's) is wrapped to keep the body as it was written",
        _BATCH,
        attributes=("body",),
    ),
    Reach(
        "vllm.entrypoints.cli.serve",
        "run_server",
        "wrapped by `prunepath serve`: connections are cut after the server was told to stop; a taken port is named",
        "see whether `vllm serve` still waits for open streams for ever; if not, delete the time from _wrap_run_server",
        parameters=("args",),
        keywords=("timeout_graceful_shutdown",),
    ),
    Reach(
        "vllm.entrypoints.cli.main", "main", "`prunepath serve` and `bench serve` run it", "start `vllm` as a command"
    ),
    Reach(
        "vllm.utils.argparse_utils",
        "FlexibleArgumentParser",
        "its error method is replaced by one of one line; benchmarks add vLLM's flags to theirs",
        "leave the engine's own message; read how vLLM's benchmarks make their parser",
        attributes=("error",),
    ),
    # The engine core
    Reach(
        "vllm.v1.engine.core",
        "EngineCore.preprocess_add_request",
        "wrapped: settles a request's tau and salts its prefix-cache blocks with it, whatever front end brought it",
        _TAUS_APART,
        parameters=("self", "request"),
    ),
    Reach(
        "vllm.v1.engine.core",
        "EngineCore",
        "which model the request is for",
        _TAUS_APART,
        attributes=("vllm_config",),
    ),
    Reach(
        "vllm.v1.engine",
        "EngineCoreRequest",
        "a request's parameters and salt; streaming input is refused",
        _TAUS_APART,
        attributes=("cache_salt", "lora_request", "pooling_params", "resumable", "sampling_params"),
        known_as=("request",),
    ),
    Reach(
        "vllm.v1.request",
        "Request",
        "where the answer begins, for blocks that hold generated tokens",
        _TAUS_APART,
        attributes=("num_prompt_tokens", "pooling_params", "sampling_params"),
        known_as=("request",),
    ),
    *(
        Reach(
            module,
            "generate_block_hash_extra_keys",
            "wrapped: with a prefill_tau, blocks that hold answers are keyed by the answer's tau. A caller that looks "
            "tokens ahead (0.33) marks one block earlier, which its hash covers as well",
            _TAUS_APART,
            parameters=("request", "start_token_idx", "end_token_idx", "start_mm_idx"),
        )
        for module in (
            "vllm.v1.core.kv_cache_utils",
            "vllm.v1.core.block_pool",
            "vllm.v1.simple_kv_offload.manager",
        )
    ),
    # LoRA adapters
    Reach(
        "vllm.lora.request",
        "LoRARequest",
        "an adapter that is checked before it is loaded",
        _ADAPTERS,
        attributes=("lora_int_id", "lora_path"),
        known_as=("lora_request",),
    ),
    Reach(
        "vllm.lora.utils",
        "get_adapter_absolute_path",
        "where an adapter is that a worker loads",
        _ADAPTERS,
        parameters=("lora_path",),
    ),
    Reach(
        "vllm.lora.ops.torch_ops.lora_ops",
        "bgmv_shrink",
        "wrapped on a CPU: tokens without an adapter would get the last one's in 0.32 (vllm-project/vllm#48421)",
        "0.33 leaves them alone itself: delete the wrapper with 0.32",
        parameters=("inputs", "lora_b_weights", "output_tensor", "lora_indices_tensor"),
    ),
    Reach(
        "vllm.model_executor.models.interfaces",
        "SupportsLoRA",
        "our decoders name no embedding that an adapter may change",
        "read get_supported_lora_modules: only attention's linears may be among them",
        attributes=("embedding_modules", "packed_modules_mapping"),
    ),
    # Workers and the V1 model runner
    Reach(
        "vllm.v1.worker.worker_base",
        "WorkerBase",
        "what our worker classes stand on",
        _WORKER,
        attributes=("get_model", "model_runner", "vllm_config"),
        known_as=("worker",),
    ),
    Reach(
        "vllm.v1.worker.gpu_worker",
        "Worker",
        "which model runner it has",
        _WORKER,
        attributes=("use_v2_model_runner",),
        known_as=("worker",),
    ),
    Reach(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.reload_weights",
        "what the worker hands its arguments on to",
        _WORKER,
        keywords=("weights_iterator", "weights_path", "is_checkpoint_format"),
    ),
    *(
        Reach(module, f"{worker}.{method}", why, _WORKER, parameters=parameters)
        for module, worker in (("vllm.v1.worker.cpu_worker", "CPUWorker"), ("vllm.v1.worker.gpu_worker", "Worker"))
        for method, why, parameters in (
            ("init_device", "extended: the V1 runner's forward is hooked once it is there", ("self",)),
            ("compile_or_warm_up_model", "extended: our kernels are compiled before, counts begin after", ("self",)),
            (
                "add_lora",
                "extended: an adapter that changes more than attention is refused",
                ("self", "lora_request"),
            ),
            (
                "reload_weights",
                "extended: the checkpoint is checked before, packed weights are made anew after",
                ("self",),
            ),
        )
    ),
    Reach(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._model_forward",
        "wrapped on the instance: taus are written right before the model of a step",
        _V1,
        parameters=("self", "input_ids", "positions"),
    ),
    Reach(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        "the requests and tokens of a step",
        _V1,
        attributes=("_model_forward", "get_model", "input_batch", "query_start_loc", "requests"),
        known_as=("runner", "model_runner"),
    ),
    Reach(
        "vllm.v1.worker.gpu_input_batch",
        "InputBatch",
        "the order of requests in a step, and how far each is",
        _V1,
        attributes=("num_computed_tokens_cpu", "num_prompt_tokens", "req_ids"),
        known_as=("batch",),
    ),
    Reach(
        "vllm.v1.worker.gpu_input_batch",
        "CachedRequestState",
        "a request's parameters",
        _V1,
        attributes=("pooling_params", "sampling_params"),
    ),
    Reach(
        "vllm.v1.utils",
        "CpuGpuBuffer",
        "query_start_loc on host and device",
        _V1,
        attributes=("gpu", "np"),
        known_as=("query_start_loc",),
    ),
    # The V2 model runner
    Reach(
        "vllm.v1.worker.gpu.model_states",
        "resolve_model_state_cls",
        "asks our model for its state (get_model_state_cls)",
        _V2,
        parameters=("vllm_config", "model"),
    ),
    *(
        Reach(module, f"{state}.__init__", "extended: a tau per request slot", _V2, ("self", "vllm_config", "model"))
        for module, state in (
            ("vllm.v1.worker.gpu.model_states.default", "DefaultModelState"),
            ("vllm.v1.worker.gpu.model_states.encoder_only", "EncoderOnlyModelState"),
        )
    ),
    *(
        Reach(module, f"{state}.{method}", why, _V2, parameters)
        for module, state in (
            ("vllm.v1.worker.gpu.model_states.default", "DefaultModelState"),
            ("vllm.v1.worker.gpu.model_states.encoder_only", "EncoderOnlyModelState"),
        )
        for method, why, parameters in (
            ("add_request", "extended: a request's tau", ("self", "req_index", "new_req_data")),
            ("prepare_inputs", "extended: taus are written before a step", ("self", "input_batch", "req_states")),
        )
    ),
    Reach(
        "vllm.v1.worker.gpu.model_states.interface",
        "ModelState",
        "how many request slots there are",
        _V2,
        attributes=("max_num_reqs",),
    ),
    Reach(
        "vllm.v1.worker.gpu.input_batch",
        "InputBatch",
        "the requests and tokens of a step",
        _V2,
        attributes=(
            "idx_mapping",
            "idx_mapping_np",
            "num_computed_tokens_np",
            "num_reqs",
            "num_scheduled_tokens",
            "num_tokens_after_padding",
            "positions",
            "query_start_loc",
        ),
        known_as=("input_batch",),
    ),
    Reach(
        "vllm.v1.core.sched.output",
        "NewRequestData",
        "a request's parameters and prompt",
        _V2,
        attributes=("pooling_params", "prompt_embeds", "prompt_token_ids", "sampling_params"),
        known_as=("new_req_data",),
    ),
    # Models and layers
    *(
        Reach(
            f"vllm.model_executor.models.{module}",
            f"{layer}.__init__",
            "built in its place",
            _BUILD,
            keywords=("prefix",),
        )
        for module, layer in (("llama", "LlamaMLP"), ("qwen2", "Qwen2MLP"), ("gpt2", "GPT2MLP"))
    ),
    *(
        Reach(
            f"vllm.model_executor.models.{module}",
            f"{attention}.forward",
            "hooked: routers may read what enters it",
            "read the decoder layer's forward: route_by_attention needs what its attention is called with",
            keywords=("hidden_states",),
        )
        for module, attention in (("llama", "LlamaAttention"), ("qwen2", "Qwen2Attention"), ("gpt2", "GPT2Attention"))
    ),
    *(
        Reach(
            f"vllm.model_executor.models.{module}",
            f"{model}.__init__",
            "our model is one of these with other layers",
            _BUILD,
            keywords=("vllm_config", "prefix"),
        )
        for module, model in (
            ("llama", "LlamaForCausalLM"),
            ("qwen2", "Qwen2ForCausalLM"),
            ("gpt2", "GPT2LMHeadModel"),
            ("roberta", "RobertaForSequenceClassification"),
        )
    ),
    Reach(
        "vllm.model_executor.layers.attention",
        "Attention",
        "its parameters, where linears are quantised, are scales of keys and values, which no checkpoint has to have",
        "find what a compressed-tensors model adds to its attention layers: load_weights must not miss it",
    ),
    Reach(
        "vllm.model_executor.models.utils",
        "extract_layer_index",
        "a layer's number, from its prefix",
        "take the last whole number of the prefix",
        parameters=("layer_name",),
    ),
    Reach(
        "vllm.model_executor.utils",
        "set_weight_attrs",
        "names our weight loaders to vLLM's",
        "set weight_loader on the parameter",
        parameters=("weight", "weight_attrs"),
    ),
    Reach(
        "vllm.utils.torch_utils",
        "direct_register_custom_op",
        "the routed layer is one opaque op",
        "register it with torch.library",
        keywords=("op_name", "op_func", "fake_impl", "target_lib"),
    ),
    Reach(
        "vllm.utils.torch_utils",
        "async_tensor_h2d",
        "taus go to the device without a wait",
        "pin, then copy with non_blocking",
        parameters=("data",),
        keywords=("device",),
    ),
    Reach(
        "vllm.forward_context",
        "ForwardContext",
        "whether a graph is captured piece by piece: no second stream may run from one to the next",
        "find what tells a model under capture whether its graph ends before the attention",
        attributes=("cudagraph_runtime_mode",),
    ),
    Reach(
        "vllm.forward_context",
        "get_forward_context",
        "the one above",
        "find what tells a model under capture whether its graph ends before the attention",
    ),
    Reach(
        "vllm.config",
        "CUDAGraphMode",
        "the kind of captured graph that is one of pieces",
        "find what tells a model under capture whether its graph ends before the attention",
        attributes=("PIECEWISE",),
        known_as=("CUDAGraphMode",),
    ),
    # Benchmarks
    Reach("vllm.benchmarks.latency", "add_cli_args", "flags of `bench latency`", _BENCHMARK, parameters=("parser",)),
    Reach(
        "vllm.sampling_params",
        "RequestOutputKind",
        "steps of `bench latency` tell who got a token",
        _BENCHMARK,
        attributes=("DELTA",),
    ),
    Reach("vllm.benchmarks.serve", "main", "what `bench serve` runs", _BENCHMARK, parameters=("args",)),
    Reach("vllm.benchmarks.serve", "add_cli_args", "flags of `bench serve`", _BENCHMARK, parameters=("parser",)),
)
