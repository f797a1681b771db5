"""Scenarios of adapters and of pooling; started as engine_scenarios.py is.

python lora_pooling_scenarios.py SCENARIO CHECKPOINT RUNNER OPTIONS
"""

import gc
import json

from engine_scenarios import OPTIONS, PROMPTS, SCENARIO, SHARED_PREFIX, TAUS, engine, params, row
from vllm import PoolingParams
from vllm.lora.request import LoRARequest


def lora():
    """Taus and adapters mixed in one batch, and alone; prefix-cache hits across both; and what is said to bad adapters.

    The options name the adapters' folders: `adapters`, and `refused`.
    """
    requests = {path: LoRARequest(f"adapter {i}", i, path) for i, path in enumerate(OPTIONS["adapters"], 1)}
    adapters = [None, *requests]
    llm = engine(enforce_eager=True, enable_lora=True, max_loras=2, max_lora_rank=8, **OPTIONS.get("engine", {}))

    def generate(prompts, many):
        chosen = [requests.get(adapter) for _, adapter in many]
        outputs = llm.generate(prompts, [params(tau) for tau, _ in many], lora_request=chosen, use_tqdm=False)
        return [row(output, tau) | {"adapter": adapter} for output, (tau, adapter) in zip(outputs, many, strict=True)]

    prompts = PROMPTS[: OPTIONS.get("prompts", len(PROMPTS))]
    many = [(TAUS[i % len(TAUS)], adapters[(i + i // 3) % len(adapters)]) for i in range(len(prompts))]
    mixed = generate(prompts, many)
    llm.reset_prefix_cache()
    lone = [generate([prompt], [one])[0] for prompt, one in zip(prompts, many, strict=True)]
    llm.reset_prefix_cache()
    shared = [(0.5, 1), (0.5, 0), (0.9, 1), (0.5, 1), (0.5, 2), (0.5, 0), (1.0, 2), (1.05, 2)]
    shared_prefix = [generate([SHARED_PREFIX], [(tau, adapters[number])])[0] for tau, number in shared]
    said = []
    for i, path in enumerate(OPTIONS["refused"]):
        for load in (
            lambda one: llm.generate([PROMPTS[0]], params(0.5), lora_request=one, use_tqdm=False),
            llm.llm_engine.add_lora,
        ):
            try:
                load(LoRARequest(f"refused {i}", 10 + i, path))
                said.append(None)
            except (ValueError, RuntimeError) as error:  # a worker's, which may be another process
                said.append(str(error))
    after = generate(prompts[:3], many[:3])
    return {"mixed": mixed, "lone": lone, "shared_prefix": shared_prefix, "said": said, "after": after}


def pooling():
    """Of each case, in one process: embeddings, or scores of a reranker, of prompts at mixed taus, and at tau 1.

    A case is a checkpoint, what the engine converts it to, and its overrides.
    """
    found = {}
    for name, (checkpoint, convert, overrides) in OPTIONS["cases"].items():
        options = {"hf_overrides": overrides} if overrides else {}
        try:
            llm = engine(checkpoint, enforce_eager=True, runner="pooling", convert=convert, **options)
        except Exception as error:
            found[name] = {"error": str(error)}
            continue
        found[name] = {}
        # Some prompts twice, at another tau, and longer than a step: cached blocks must be their tau's.
        prompts = [*PROMPTS[:5], PROMPTS[1], PROMPTS[2]]
        for kind, taus in {
            "mixed": (0.5, 0.9, 1.0, 0.3, 0.7, 0.4, 0.9),
            "tau 1": (1.0,) * 7,
            "default": (None,),
        }.items():
            many = [PoolingParams(extra_kwargs={} if tau is None else {"tau": tau}) for tau in taus]
            if convert == "embed":
                outputs = llm.embed(prompts[: len(taus)], pooling_params=many, use_tqdm=False)
                values = [output.outputs.embedding for output in outputs]
            elif overrides["method"] == "from_2_way_softmax":
                pairs = zip(prompts, many, strict=False)
                outputs = [llm.score("query", text, pooling_params=one, use_tqdm=False)[0] for text, one in pairs]
                values = [[output.outputs.score] for output in outputs]
            else:
                outputs = llm.classify(prompts[: len(taus)], pooling_params=many, use_tqdm=False)
                values = [output.outputs.probs for output in outputs]
            found[name][kind] = [
                {"tau": tau, "prompt": list(output.prompt_token_ids), "values": value}
                for tau, output, value in zip(taus, outputs, values, strict=True)
            ]
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
    return found


if __name__ == "__main__":
    result = globals()[SCENARIO]()
    print("\nRESULT " + json.dumps(result))
