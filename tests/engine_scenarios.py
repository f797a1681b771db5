"""Runs one checkpoint through vLLM and prints what came out as JSON; tests start it as a process of its own.

    python engine_scenarios.py SCENARIO CHECKPOINT RUNNER [JSON options]

RUNNER is "v1", or "v2": vLLM's V2 model runner on the CPU, its Triton kernels under the interpreter; or "cuda": the
runner that vLLM chooses on a GPU. The runner and Triton's interpreter are chosen by variables that are read at import:
they are those of runners.py, which warm.py also imports first.
"""

import gc
import json
import sys

from prometheus_client import CollectorRegistry, multiprocess
from vllm import LLM, PoolingParams, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreRequest

SCENARIO, CHECKPOINT, RUNNER = sys.argv[1:4]
OPTIONS = json.loads(sys.argv[4]) if len(sys.argv) > 4 else {}

TAUS = (1.0, 0.9, 0.5, 0.3, 0.7, 1.05)
PROMPTS = [f"{i}: " + "the quick brown fox jumps over the lazy dog; " * (1 + i % 3) for i in range(9)]
# A step of interpreted kernels takes 25 times as long as one of V1.
NEW_TOKENS = OPTIONS.get("new_tokens", 4 if RUNNER == "v2" else 10)
SHARED_PREFIX = "a prompt long enough to fill several blocks of the prefix cache. " * 2


def engine(checkpoint=CHECKPOINT, **options):
    """A small engine: steps of 64 tokens, so that prompts are chunked, and few sequences at a time."""
    defaults = dict(
        max_model_len=256, dtype=OPTIONS.get("dtype", "float32"), max_num_batched_tokens=64, max_num_seqs=6,
        block_size=32, seed=0, additional_config={"prunepath": OPTIONS.get("policy", {})},
    )  # fmt: skip
    if RUNNER != "cuda":  # the cache is filled with zeros, all of it
        defaults |= dict(num_gpu_blocks_override=512)
    else:  # a fixed, small share, whatever else runs on the GPU
        defaults |= dict(gpu_memory_utilization=0.05, kv_cache_memory_bytes=1 << 28)
    return LLM(checkpoint, **{**defaults, **options})


def params(tau=None, **options):
    extra = {} if tau is None else {"tau": tau}
    return SamplingParams(
        **{**dict(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True), **options}, extra_args=extra
    )


def row(output, tau):
    return {
        "tau": tau,
        "prompt": list(output.prompt_token_ids),
        "tokens": [list(one.token_ids) for one in output.outputs],
        "cached": output.num_cached_tokens,
    }


def counter(llm, name):
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


def interpret_ngrams():
    """Half a minute of numba's compiler for functions that take microseconds here: they run as the Python they are."""
    from vllm.v1.spec_decode import ngram_proposer

    for name in ("batch_propose_numba", "_find_longest_matched_ngram_and_propose_tokens"):
        setattr(ngram_proposer, name, getattr(ngram_proposer, name).py_func)


def decoder():
    """Mixed taus in one batch, the same alone, prefix-cache hits across taus, n > 1, and a default."""
    speculative = "speculative_config" in OPTIONS.get("engine", {})
    if speculative and RUNNER != "cuda":
        interpret_ngrams()
    llm = engine(enforce_eager=OPTIONS.get("eager", True), **OPTIONS.get("engine", {}))
    taus = [TAUS[i % len(TAUS)] for i in range(len(PROMPTS))]
    mixed = llm.generate(PROMPTS, [params(tau) for tau in taus], use_tqdm=False)
    llm.reset_prefix_cache()
    lone = [llm.generate([prompt], params(tau), use_tqdm=False)[0] for prompt, tau in zip(PROMPTS, taus, strict=True)]
    llm.reset_prefix_cache()
    order = [0.5, 0.9, 0.5, 1.0, 1.05]
    shared = [llm.generate([SHARED_PREFIX + "end"], params(tau), use_tqdm=False)[0] for tau in order]
    (several,) = llm.generate([PROMPTS[0]], params(0.5, n=3, temperature=0.02), use_tqdm=False)
    (default,) = llm.generate([PROMPTS[0]], params(), use_tqdm=False)
    return {
        "mixed": [row(output, tau) for output, tau in zip(mixed, taus, strict=True)],
        "lone": [row(output, tau) for output, tau in zip(lone, taus, strict=True)],
        "shared_prefix": [row(output, tau) for output, tau in zip(shared, order, strict=True)],
        "n3": row(several, 0.5),
        "default": row(default, None),
        "accepted": counter(llm, "vllm:spec_decode_num_accepted_tokens") if speculative else 0,
    }


def cold():
    """Of a checkpoint with a max_tau: the options' taus and the default in one batch, and alone; and one above."""
    llm = engine(enforce_eager=OPTIONS["eager"])
    taus = [[*OPTIONS["taus"], None][i % (len(OPTIONS["taus"]) + 1)] for i in range(len(PROMPTS))]
    many = [params(tau) for tau in taus]
    for i, one in enumerate(many):
        one.extra_args["prunepath_report"] = f"request {i}"
    mixed = llm.generate(PROMPTS, many, use_tqdm=False)
    reports = []
    for i in range(len(PROMPTS)):
        (parts,) = llm.collective_rpc("prunepath_report", args=(f"request {i}",))
        active = [sum(layer) for layer in zip(*(counted for counted, _ in parts), strict=True)]
        reports.append({"active": active, "possible": sum(possible for _, possible in parts)})
    lone = [llm.generate([prompt], params(tau), use_tqdm=False)[0] for prompt, tau in zip(PROMPTS, taus, strict=True)]
    try:
        llm.generate([PROMPTS[0]], params(0.7), use_tqdm=False)
        refused = ""
    except ValueError as error:
        refused = str(error)
    return {
        "mixed": [row(output, tau) for output, tau in zip(mixed, taus, strict=True)],
        "lone": [row(output, tau) for output, tau in zip(lone, taus, strict=True)],
        "reports": reports,
        "refused": refused,
    }


def graphs():
    """Mixed taus twice in one batch, and alone, under the graph mode of the options."""
    llm = engine(
        compilation_config={"cudagraph_mode": OPTIONS["cudagraph_mode"]}, enable_prefix_caching=False, max_num_seqs=9,
        attention_backend=OPTIONS.get("attention_backend"),
    )  # fmt: skip
    taus = [TAUS[i % len(TAUS)] for i in range(len(PROMPTS))]
    many = [params(tau, max_tokens=40) for tau in taus]
    first, second = (llm.generate(PROMPTS, many, use_tqdm=False) for _ in range(2))
    lone = [llm.generate([p], q, use_tqdm=False)[0] for p, q in zip(PROMPTS, many, strict=True)]
    return {
        name: [row(output, tau) for output, tau in zip(outputs, taus, strict=True)]
        for name, outputs in {"first": first, "second": second, "lone": lone}.items()
    }


def odd_batches():
    """Batches of every size, at which no graph was captured: what Triton compiled for them while the engine served."""
    from triton import knobs

    llm = engine(enable_prefix_caching=False, max_num_seqs=7, compilation_config={"cudagraph_capture_sizes": [1, 4]})
    compiled = []
    before = knobs.runtime.jit_post_compile_hook

    def tell(**event):
        compiled.append(f"{event['fn'].module}.{event['fn'].name}")
        return before(**event) if before else None

    knobs.runtime.jit_post_compile_hook = tell
    for count in range(1, 8):
        for taus in ((1.0,), (0.5,), (1.0, 0.3)):
            many = [params(taus[i % len(taus)]) for i in range(count)]
            llm.generate(PROMPTS[:count], many, use_tqdm=False)
    return {"compiled": compiled}


def preemption():
    """More tokens than the KV cache holds: requests are preempted and recomputed at their own tau."""
    llm = engine(enforce_eager=True, num_gpu_blocks_override=12, disable_log_stats=False)
    taus = [TAUS[i % len(TAUS)] for i in range(6)]
    many = [params(tau, max_tokens=OPTIONS.get("max_tokens", 40)) for tau in taus]
    outputs = llm.generate(PROMPTS[:6], many, use_tqdm=False)
    return {
        "mixed": [row(output, tau) for output, tau in zip(outputs, taus, strict=True)],
        "preemptions": counter(llm, "vllm:num_preemptions"),
    }


def dense():
    """Greedy tokens at tau 1, or of a dense model, which ignores tau; batched as a server would."""
    llm = engine(enforce_eager=True, max_num_batched_tokens=512, max_model_len=512, max_num_seqs=8)
    prompts = OPTIONS.get("prompts", PROMPTS)
    options = {"max_tokens": OPTIONS.get("max_tokens", NEW_TOKENS)}
    outputs = llm.generate(prompts, [params(1.0, **options) for _ in prompts], use_tqdm=False)
    return {"tokens": [list(output.outputs[0].token_ids) for output in outputs]}


def families():
    """Of each family, in one process: mixed taus in one batch, and tau 1 beside what the dense engine gives.

    The options may give each engine several processes.
    """
    found = {}
    for name, checkpoints in OPTIONS["cases"].items():
        found[name] = {}
        for kind, checkpoint in checkpoints.items():
            llm = engine(checkpoint, enforce_eager=True, **OPTIONS.get("engine", {}))
            taus = [TAUS[i % len(TAUS)] for i in range(len(PROMPTS))] if kind == "sparse" else []
            mixed = llm.generate(PROMPTS[: len(taus)], [params(tau) for tau in taus], use_tqdm=False)
            full = llm.generate(PROMPTS, [params(1.0) for _ in PROMPTS], use_tqdm=False)
            found[name][kind] = {
                "mixed": [row(output, tau) for output, tau in zip(mixed, taus, strict=True)],
                "tau 1": [list(output.outputs[0].token_ids) for output in full],
                "processes": llm.llm_engine.vllm_config.parallel_config.world_size,
            }
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
    return found


def functions():
    """Each of several checkpoints in an engine of its own: the log-probabilities of a prompt's tokens, by tau.

    Of a classifier the probabilities of its classes; of an engine that does not start what it said.
    """
    found = {}
    for name, (checkpoint, options) in OPTIONS["cases"].items():
        try:
            llm = engine(
                checkpoint, **{"enforce_eager": True, "max_model_len": None, "enable_prefix_caching": False, **options}
            )
            limit = llm.llm_engine.model_config.max_model_len
            found[name] = {"limit": limit} | (scored(llm) if "max_model_len" not in options else {})
        except Exception as error:
            found[name] = {"error": str(error)}
            continue
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
    return found


def scored(llm):
    """At tau 1 and 0.5, and what is said to a prompt of one token more than the engine takes."""
    prompt = {"prompt_token_ids": OPTIONS["prompt"]}
    limit = llm.llm_engine.model_config.max_model_len
    result = {}
    for tau in (1.0, 0.5):
        if llm.llm_engine.model_config.runner_type == "pooling":
            (output,) = llm.classify([prompt], pooling_params=PoolingParams(extra_kwargs={"tau": tau}), use_tqdm=False)
            result[str(tau)] = output.outputs.probs
        else:
            (output,) = llm.generate([prompt], params(tau, max_tokens=1, prompt_logprobs=0), use_tqdm=False)
            pairs = zip(OPTIONS["prompt"], output.prompt_logprobs, strict=True)
            result[str(tau)] = [given[token].logprob for token, given in pairs if given is not None]
    try:
        many = {"prompt_token_ids": [5] * (limit + 1)}
        llm.classify([many], use_tqdm=False) if "classify" in llm.supported_tasks else llm.generate([many], params())
        result["too long"] = None
    except (ValueError, VLLMValidationError) as error:
        result["too long"] = str(error)
    return result


def counts():
    """What was counted for requests that asked, among ones that did not, for all of them, and for the steps they made.

    The options may give the engine several processes.
    """
    steps = []

    def scheduled(self, *args, **kwargs):
        output = schedule(self, *args, **kwargs)
        counts = output.num_scheduled_tokens.items()  # by then added to what was computed
        steps.append([[name.split("-")[0], self.requests[name].num_computed_tokens - n, n] for name, n in counts])
        return output

    schedule, Scheduler.schedule = Scheduler.schedule, scheduled
    if RUNNER != "cuda":  # where vLLM warms up with requests of its own
        warm_up_like_a_gpu()
    options = {"enforce_eager": True, **OPTIONS.get("engine", {})}
    llm = engine(enable_prefix_caching=False, **options)
    asking = {i: {"prunepath_report": f"request {i}"} for i in range(6)}

    def generate(asking, taus=TAUS):
        many = [params(tau, max_tokens=NEW_TOKENS + i) for i, tau in enumerate(taus)]
        for i, one in enumerate(many):
            one.extra_args |= asking.get(i, {})
        outputs = llm.generate(PROMPTS[: len(taus)], many, use_tqdm=False)
        reports = [llm.collective_rpc("prunepath_report", args=(f"request {i}",)) for i in range(len(taus))]
        rows = [row(output, tau) | {"id": output.request_id} for output, tau in zip(outputs, taus, strict=True)]
        return {"rows": rows, "reports": reports}

    results = {
        "few": generate({i: asking[i] for i in (1, 3)}),
        "every": generate(asking),
        "sparse": generate({}, (0.3, 0.05, 0.1)),
    }
    llm.collective_rpc("prunepath_publish")
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    samples = [sample for family in registry.collect() for sample in family.samples]
    ours = {":".join([sample.name, *sample.labels.values()]): sample.value for sample in samples}
    metrics = {name: value for name, value in ours.items() if name.startswith("prunepath:")}
    return {"requests": results, "steps": [step for step in steps if step], "metrics": metrics}


def warm_up_like_a_gpu():
    """Let the CPU worker's warm-up run a step of 7 tokens that is counted: none of it may be seen later."""
    import numpy as np
    from vllm.v1.worker.cpu_worker import CPUWorker

    from prunepath_vllm.model_executor.tau import TokenTaus

    def warm_up(self):
        seven = np.array([7])
        TokenTaus.of(self.get_model()).counts.begin_step(np.ones(1, np.float32), 0 * seven, seven, seven, ())
        return original(self)

    original, CPUWorker.compile_or_warm_up_model = CPUWorker.compile_or_warm_up_model, warm_up


def encoder():
    """Classification at mixed taus in one batch, and alone."""
    llm = engine(enforce_eager=True, max_num_batched_tokens=512, max_model_len=256)
    taus = [TAUS[i % len(TAUS)] for i in range(6)]
    pooling = [PoolingParams(extra_kwargs={"tau": tau}) for tau in taus]
    mixed = llm.classify(PROMPTS[:6], pooling_params=pooling, use_tqdm=False)
    lone = [llm.classify([p], pooling_params=q, use_tqdm=False)[0] for p, q in zip(PROMPTS, pooling, strict=False)]
    prompts = [list(output.prompt_token_ids) for output in mixed]
    return {
        "taus": taus,
        "prompts": prompts,
        "mixed": [output.outputs.probs for output in mixed],
        "lone": [output.outputs.probs for output in lone],
    }


def refusals():
    """What each bad value says; afterwards the engine and the caller's parameters are as they were."""
    llm = engine(enforce_eager=True)
    before = llm.generate([PROMPTS[0]], params(0.5), use_tqdm=False)[0].outputs[0].token_ids
    said = {}
    bad = [True, False, "0.8", float("nan"), float("inf"), [0.8], 0, -0.1, 1.06, 10**18]
    for value in bad:
        try:
            llm.generate([PROMPTS[0]], params(value), use_tqdm=False)
            said[repr(value)[:20]] = None
        except ValueError as error:
            said[repr(value)[:20]] = str(error)
    others = {"both": {"tau": 0.5, "sparsity": 0.5}, "no curve": {"sparsity": 0.5}}
    others |= {"report": {"prunepath_report": True}, "Tau": {"Tau": 0.5}, "prefill_tau": {"prefill_tau": 0.5}}
    others |= {"extra_body": {"extra_body": {"vllm_xargs": {"tau": 0.5}}}}
    for name, extra in others.items():
        try:
            llm.generate([PROMPTS[0]], SamplingParams(extra_args=extra), use_tqdm=False)
            said[name] = None
        except ValueError as error:
            said[name] = str(error)
    mine = params(0.5)
    llm.generate([PROMPTS[0]], mine, use_tqdm=False)
    after = llm.generate([PROMPTS[0]], params(0.5), use_tqdm=False)[0].outputs[0].token_ids
    ranges = {"auto": params("auto"), "range": params({"min": 0.3, "max": 0.5}), "dense": params(1.0)}
    offline = {name: llm.generate([PROMPTS[0]], one, use_tqdm=False)[0] for name, one in ranges.items()}
    left = {name: list(output.outputs[0].token_ids) for name, output in offline.items()}
    return {
        "said": said, "before": list(before), "after": list(after), "mine": mine.extra_args, "left": left,
        "around": around_the_front_end(llm),
    }  # fmt: skip


def around_the_front_end(llm):
    """Requests straight to the engine core, as a front end that knows nothing of tau sends them; the last is bad."""
    core = llm.llm_engine.engine_core
    prompt = llm.generate([SHARED_PREFIX], params(0.9), use_tqdm=False)[0].prompt_token_ids

    def generate(name, tau):
        core.add_request(
            EngineCoreRequest(
                request_id=name, prompt_token_ids=list(prompt), mm_features=None, sampling_params=params(tau),
                pooling_params=None, arrival_time=0.0, lora_request=None, cache_salt=None, data_parallel_rank=None,
            )
        )  # fmt: skip
        tokens, finished = [], False
        while not finished:
            for output in core.get_output().outputs:
                tokens += output.new_token_ids
                finished = output.finished
        return tokens

    taus = (0.3, 1.0, 0.3, None)
    rows = [
        {"tau": tau, "prompt": list(prompt), "tokens": [generate(f"around-{i}", tau)]} for i, tau in enumerate(taus)
    ]
    try:
        said = generate("bad", 3.0)
    except ValueError as error:
        said = str(error)
    return {"rows": rows, "said": said}


def reload():
    """Tokens before and after weights are loaded again: the same, another checkpoint's, and back.

    The options name the other checkpoints: `changed` has other weights, `refused` (a list) must not be taken, nor the
    tensors of `refused_tensors`.
    """
    llm = engine(enforce_eager=OPTIONS.get("eager", True), enable_prefix_caching=False)

    def generate():
        taus = TAUS[:4]
        outputs = llm.generate(PROMPTS[:4], [params(tau) for tau in taus], use_tqdm=False)
        return [row(output, tau) for output, tau in zip(outputs, taus, strict=True)]

    results = {"before": generate()}
    llm.collective_rpc("reload_weights")
    results["same"] = generate()
    llm.collective_rpc("reload_weights", kwargs={"weights_path": OPTIONS["changed"]})
    results["changed"] = generate()
    refused = []
    for path in OPTIONS["refused"]:
        try:
            llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
            refused.append(None)
        except ValueError as error:
            refused.append(str(error))
    if path := OPTIONS.get("refused_tensors"):
        try:
            llm.collective_rpc(reload_tensors, args=(path,))
            refused.append(None)
        except ValueError as error:
            refused.append(str(error))
    results["after refusals"] = generate()
    llm.collective_rpc("reload_weights", kwargs={"weights_path": CHECKPOINT})
    results["back"] = generate()
    llm.collective_rpc(send_weights, args=(OPTIONS["changed"],))
    results["sent"] = generate()
    return {"rows": results, "refused": refused}


def reload_refused():
    """Tokens before and after weights were not loaded again, and why."""
    llm = engine(enforce_eager=True, enable_prefix_caching=False)
    results = []
    refused = ""
    for _ in range(2):
        outputs = llm.generate(PROMPTS[:2], [params(0.6)] * 2, use_tqdm=False)
        results.append([row(output, 0.6) for output in outputs])
        try:
            llm.collective_rpc("reload_weights")
        except ValueError as error:
            refused = str(error)
    return {"before": results[0], "after": results[1], "refused": refused}


def reload_tensors(worker, checkpoint):
    """A checkpoint's tensors, in a list."""
    from pathlib import Path

    from safetensors.torch import load_file

    worker.reload_weights(weights_iterator=list(load_file(Path(checkpoint) / "model.safetensors").items()))


def send_weights(worker, checkpoint):
    """What vLLM's weight transfer engines do with a trainer's tensors: one call of load_weights for each."""
    from pathlib import Path

    from safetensors.torch import load_file
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    model = worker.model_runner.get_model()
    with set_current_vllm_config(worker.vllm_config):
        initialize_layerwise_reload(model)
        for name, tensor in load_file(Path(checkpoint) / "model.safetensors").items():
            model.load_weights([(name, tensor)])
        finalize_layerwise_reload(model, worker.vllm_config.model_config)


if __name__ == "__main__":
    result = globals()[SCENARIO]()
    print("\nRESULT " + json.dumps(result))
