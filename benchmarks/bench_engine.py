#!/usr/bin/env python3
"""Decode steps and prefill through the whole engine, dense and sparse, same flags, one machine.

    python benchmarks/bench_engine.py --shape qwen2-7b --batches 1,4,16,64 --shares 1.0,0.5,0.2,0.1 --output out.json

Weights are random (the engine's dummy format, then filled on the device with a Gaussian of the usual size), so any
published shape can be timed without its checkpoint. Router logits then have standard deviation 1, every layer and token
its own, and tau is set to what selects the share asked for: routing as unrelated between tokens as it can be, the worst
case for the union over a batch. The dense engine is vLLM's own class of the same family. Each engine runs in a process
of its own. Before anything is timed, the routed op is compared with float32 PyTorch on the engine's own layer; when
that fails no speed is printed.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2-7b": dict(
        family="qwen2", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064,
    ),
    "qwen2.5-32b": dict(
        family="qwen2", hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40,
        num_key_value_heads=8, vocab_size=152064,
    ),
    "llama-3-8b": dict(
        family="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256,
    ),
    "gpt2-medium": dict(
        family="gpt2", n_embd=1024, n_inner=4096, n_layer=24, n_head=16, vocab_size=50257, n_positions=1024,
    ),
    "smollm2-135m": dict(
        family="llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
    ),
}  # fmt: skip
PROMPT_TOKENS = 64
MAX_MODEL_LEN = 1024


def write_config(shape: str, folder: Path, *, sparse: bool, expert_size: int = 32) -> Path:
    """A checkpoint directory with a configuration and no weights."""
    from transformers import GPT2Config, LlamaConfig, Qwen2Config

    fields = dict(SHAPES[shape])
    family = fields.pop("family")
    config = {"qwen2": Qwen2Config, "llama": LlamaConfig, "gpt2": GPT2Config}[family](**fields).to_dict()
    dense_class = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}[family]
    config.update(architectures=[dense_class], dtype="bfloat16", model_type=family)
    if family != "gpt2":
        config["max_position_embeddings"] = 32768
    if sparse:
        d_ff = config.get("intermediate_size") or config["n_inner"]
        config.update(
            architectures=[f"PrunePath{dense_class}"],
            model_type=f"prunepath_{family}",
            prunepath_config=dict(
                format_version=1, num_experts=d_ff // expert_size, expert_size=expert_size, selection="cumulative_mass",
                threshold=None, gate="none", dense_positions=0, default_tau=1.0, tau_curve=None,
                split=dict(method="random", seed=0, source=None), base_model=shape,
            ),
        )  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tau_of_share(share: float, num_experts: int) -> float:
    """The tau at which Gaussian router logits of standard deviation 1 select `share` of the experts on average."""
    import torch

    if share >= 1:
        return 1.0
    logits = torch.randn(4096, num_experts, generator=torch.Generator().manual_seed(0))
    ranked = logits.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        active = (ranked < middle).float().sum(-1).clamp(min=1).mean().item() / num_experts
        low, high = (middle, high) if active < share else (low, middle)
    return low


def randomise(model: Any) -> None:
    """Fill every parameter with a Gaussian; runs inside the engine."""
    import torch

    generator = torch.Generator(device="cuda").manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            # Chunks: the generator draws in float32.
            std = 1 / math.sqrt(parameter.shape[-1]) if "router" in name else 0.02
            for rows in parameter.data.split(max(1, 2**26 // parameter.shape[-1])):
                rows.copy_(torch.randn(rows.shape, generator=generator, device="cuda") * std)


def check_layer(model: Any) -> float:
    """Relative RMS error of the first routed layer against float32 PyTorch, mixed taus; 0 for a dense model."""
    import torch

    from prunepath_vllm.kernels import cpu
    from prunepath_vllm.kernels.weights import Weights
    from prunepath_vllm.model_executor.layers.routed_ffn import ExpertInputs, ExpertOutputs, ExpertRouter, RoutedFFN

    worst = 0.0
    for block in model.modules():
        parts = {type(child): child for child in block.children()}
        if not {ExpertInputs, ExpertOutputs, ExpertRouter, RoutedFFN} <= set(parts):
            continue
        ffn, router = parts[RoutedFFN], parts[ExpertRouter]
        inputs, outputs = parts[ExpertInputs], parts[ExpertOutputs]
        saved = ffn.tau.clone()
        settings = ffn.settings
        for tokens in (1, 4, 16, 64, 256):
            x = torch.randn(tokens, inputs.weight.shape[1], device="cuda", dtype=torch.bfloat16)
            ffn.tau[:tokens] = torch.tensor([0.3, 1.0, 0.7, 0.05], device="cuda").repeat(64)[:tokens]
            ffn.dense_step.fill_(False)
            y = block(x)
            tensors = [inputs.weight, inputs.bias, outputs.weight, outputs.bias]
            weights = Weights(
                *(None if t is None else t.float() for t in tensors), settings["activation"], settings["glu"]
            )
            routing = {name: settings[name] for name in ("selection", "threshold", "gate")}
            expected = cpu.routed_ffn(
                x.float(), ffn.tau[:tokens], router.weight, router.bias, weights, gather=False, **routing
            )
            worst = max(worst, ((y.float() - expected).norm() / expected.norm()).item())
        ffn.tau.copy_(saved)
        return worst
    return worst


def peak_gib(model: Any) -> float:
    """Most memory the engine's process has reserved so far; the KV cache takes what --memory leaves."""
    import torch

    return torch.cuda.max_memory_reserved() / 2**30


def inside(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`function(model)` as the engine's process runs it: its tensors belong to inference mode."""

    def run(model: Any) -> Any:
        import torch

        with torch.inference_mode():
            return function(model)

    return run


def run_engine(args: argparse.Namespace) -> dict[str, Any]:
    """One engine, every batch and share; called in a process of its own."""
    import torch
    from vllm import LLM, SamplingParams

    sparse = args.engine == "sparse"
    with tempfile.TemporaryDirectory() as folder:
        path = write_config(args.shape, Path(folder) / "model", sparse=sparse, expert_size=args.expert_size)
        start = time.perf_counter()
        llm = LLM(
            str(path), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
            max_model_len=args.max_model_len,
            max_num_seqs=max(args.batches), gpu_memory_utilization=args.memory, enable_prefix_caching=False,
            max_num_batched_tokens=max(8192, args.prefill), disable_log_stats=True,
        )  # fmt: skip
    load_seconds = time.perf_counter() - start
    llm.apply_model(inside(randomise))
    error = llm.apply_model(inside(check_layer))[0]
    if not error < 5e-3:
        raise SystemExit(f"the routed layer is off by {error:.1e} relative RMS: no speed is reported")
    d_ff = SHAPES[args.shape].get("intermediate_size") or SHAPES[args.shape]["n_inner"]
    generator = torch.Generator().manual_seed(0)

    def seconds(batch: int, tau: float, new_tokens: int, prompt_tokens: int = PROMPT_TOKENS) -> float:
        prompts = [
            {"prompt_token_ids": torch.randint(10, 50000, (prompt_tokens,), generator=generator).tolist()}
            for _ in range(batch)
        ]
        params = SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False,
            extra_args={"tau": tau} if sparse else None,
        )  # fmt: skip
        begin = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - begin

    rows = []
    for share in args.shares if sparse else [None]:
        tau = 1.0 if share is None else tau_of_share(share, d_ff // args.expert_size)
        for batch in args.batches:
            seconds(batch, tau, 8)
            steps = [
                (seconds(batch, tau, args.tokens + 1) - seconds(batch, tau, 1)) / args.tokens
                for _ in range(args.repeats)
            ]
            rows.append(dict(batch=batch, share=share, tau=tau, step_ms=1e3 * statistics.median(steps), steps=steps))
        if args.prefill:
            seconds(1, tau, 1, args.prefill)
            times = [seconds(1, tau, 1, args.prefill) for _ in range(args.repeats)]
            rows.append(
                dict(prefill=args.prefill, share=share, tau=tau, prefill_ms=1e3 * statistics.median(times), times=times)
            )
        shown = [{k: v for k, v in row.items() if k not in ("steps", "times")} for row in rows[-5:]]
        print(json.dumps(shown), flush=True)
    return dict(
        engine=args.engine, rows=rows, load_seconds=load_seconds, layer_error=error,
        peak_gib=llm.apply_model(peak_gib)[0],
    )  # fmt: skip


def versions() -> dict[str, str]:
    """What the figures depend on."""
    import torch
    import triton
    import vllm

    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.strip()
    names = dict(gpu=torch.cuda.get_device_name(), driver=driver, torch=torch.__version__, triton=triton.__version__)
    return {**names, "vllm": vllm.__version__}


def table(results: dict[str, Any]) -> str:
    """Sparse against dense, one line a share."""
    dense = {row.get("batch"): row for row in results["dense"]["rows"]}
    shares = sorted({row["share"] for row in results["sparse"]["rows"]}, reverse=True)
    batches = [batch for batch in dense if batch is not None]
    lines = ["share    " + "".join(f"batch {batch:<14}" for batch in batches) + ("prefill" if None in dense else "")]
    lines.append("dense    " + "".join(f"{dense[batch]['step_ms']:7.3f} ms{'':10}" for batch in batches))
    if None in dense:
        lines[-1] += f"{dense[None]['prefill_ms']:.1f} ms"
    for share in shares:
        rows = {row.get("batch"): row for row in results["sparse"]["rows"] if row["share"] == share}
        line = f"{share:<9}"
        for batch in batches:
            step = rows[batch]["step_ms"]
            line += f"{step:7.3f} ms {dense[batch]['step_ms'] / step:5.2f}x   "
        if None in dense:
            step = rows[None]["prefill_ms"]
            line += f"{step:.1f} ms {dense[None]['prefill_ms'] / step:.2f}x"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    """Run both engines and compare, or (internally) one."""
    numbers = lambda kind: lambda text: [kind(part) for part in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-7b")
    parser.add_argument("--expert-size", type=int, default=32)
    parser.add_argument("--batches", type=numbers(int), default=[1, 4, 16, 64])
    parser.add_argument("--shares", type=numbers(float), default=[1.0, 0.5, 0.2, 0.1])
    parser.add_argument("--tokens", type=int, default=96, help="decode steps per measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prefill", type=int, default=0, help="also time the prefill of one prompt of this length")
    parser.add_argument("--max-model-len", type=int, default=MAX_MODEL_LEN)
    parser.add_argument("--memory", type=float, default=0.9)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--engine", choices=("dense", "sparse"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions of this file run inside our own engine
    if args.engine:
        args.output.write_text(json.dumps(run_engine(args)))
        return
    results: dict[str, Any] = {"shape": args.shape, "prompt_tokens": PROMPT_TOKENS, "expert_size": args.expert_size}
    for engine in ("dense", "sparse"):
        part = args.output.with_suffix(f".{engine}.json")
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--engine", engine, "--output", str(part)], check=True)
        results[engine] = json.loads(part.read_text())
        part.unlink()
    results["versions"] = versions()
    args.output.write_text(json.dumps(results, indent=1))
    print(f"{args.shape}: routed layer within {results['sparse']['layer_error']:.1e} of float32\n{table(results)}")


if __name__ == "__main__":
    main()
