"""Shows sharded training (FSDP2) of a published shape with random weights: speed, memory, resume, export, serving.

    python scripts/sharded_training.py qwen2-7b --tokenizer .cache/SmolLM2-135M-Instruct --work /tmp/w --output out.json

Trains the whole shape for some steps, then --layers of its layers once straight and once with an interruption, compares
the two results bit by bit and generates with one in vLLM. Random tokens: nothing is learned. The whole of Qwen2-7B
takes about 70 GB on each of two GPUs and 30 GB of disk.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from prunepath_vllm.benchmarks import report, shapes
from prunepath_vllm.checkpoint import read_tensor_index, stream_tensors
from prunepath_vllm.modeling import register_auto_classes

ON_GPU = torch.cuda.is_available()
STEPS = 6
SERVE = """
import sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    options = dict(kv_cache_memory_bytes=1 << 28, gpu_memory_utilization=0.1)
    llm = LLM(sys.argv[1], max_model_len=512, enforce_eager=True, **options)
    params = [SamplingParams(temperature=0, max_tokens=8, extra_args={"tau": tau}) for tau in (1.0, 0.6)]
    for output in llm.generate(["The capital of France is"] * 2, params, use_tqdm=False):
        print("TOKENS", *output.outputs[0].token_ids)
"""


def make_checkpoint(shape: str, folder: Path, tokenizer: Path, layers: int | None = None) -> int:
    """A PrunePath checkpoint with random weights, made on the GPU where there is one; its number of parameters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    register_auto_classes()
    if layers is not None:
        cut = {**shapes.SHAPES[shape], "num_hidden_layers": layers, "vocab_size": 49152}
        shape = "cut"
        shapes.SHAPES[shape] = cut
    shapes.write_config(shape, folder, sparse=True, expert_size=32)
    config = json.loads((folder / "config.json").read_text())
    with torch.device("cuda" if ON_GPU else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    shapes.randomise(model)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)
    return sum(parameter.numel() for parameter in model.parameters())


def write_recipe(work: Path, name: str, model: str, steps: int, length: int, **runtime: Any) -> Path:
    """A recipe of one stage with every GPU's memory holding its share."""
    runtime |= dict(
        device="auto" if ON_GPU else "cpu", bf16=True, sharding="full", gradient_checkpointing=True, log_steps=1, keep=9
    )
    recipe = dict(
        output=str(work / name),
        model=dict(path=str(work / model)),
        data=dict(train=[dict(path=str(work / "tokens.npy"))], sequence_length=length),
        stages=[dict(tau="fixed", tau_start=0.6, losses=dict(balance=0.01))],
        optimizer=dict(lr=1e-5),
        schedule=dict(max_steps=steps),
        batch=dict(sequences=8),
        runtime=dict(runtime, tensorboard=False),
    )
    path = work / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def train(recipe: Path, processes: int, *more: str) -> dict[str, Any]:
    """Train in a process for each GPU: seconds in all, and the most memory that was in use on each, MiB."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launch, "-m", "prunepath_vllm.entrypoints.cli", "train", "--config", str(recipe), *more]
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    begin, most = time.monotonic(), [0] * processes
    with open(recipe.with_suffix(".log"), "a") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        while process.poll() is None:
            used = subprocess.run(query, capture_output=True, text=True).stdout.split() if ON_GPU else []
            most = [max(pair) for pair in zip(most, map(int, used), strict=False)] or most
            time.sleep(1)
    if process.returncode:
        sys.exit(f"{recipe}: training failed: see {recipe.with_suffix('.log')}")
    return dict(seconds=round(time.monotonic() - begin), peak_mib=most)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """What a run logged of its steps."""
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [row for row in rows if "tokens_per_second" in row]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors by name."""
    return dict(stream_tensors(folder, read_tensor_index(folder)))


def interrupted(work: Path, straight: Path) -> None:
    """A copy of a run as a kill after its first checkpoint would have left it."""
    again = work / "again"
    shutil.copytree(straight, again, ignore=shutil.ignore_patterns("model", f"checkpoint-{STEPS}"))
    rows = (again / "log.jsonl").read_text().splitlines()
    kept = [row for row in rows if json.loads(row).get("step", STEPS) <= STEPS // 2]
    (again / "log.jsonl").write_text("".join(f"{row}\n" for row in kept))


def main() -> None:
    """Run it all; the results so far are in --output after every part."""
    parser = argparse.ArgumentParser(description="Shows sharded training of a published shape with random weights.")
    parser.add_argument("shape", choices=shapes.SHAPES)
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="its vocabulary is at most 49,152")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="to create; deleted parts are large")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--processes", type=int, default=max(2, torch.cuda.device_count()), metavar="N")
    parser.add_argument("--layers", type=int, default=2, metavar="N", help="of the model that is resumed (default: 2)")
    parser.add_argument("--length", type=int, default=1024, metavar="N", help="tokens of a sequence (default: 1024)")
    args = parser.parse_args()
    work: Path = args.work
    work.mkdir(parents=True)
    tokens = np.random.default_rng(0).integers(0, 49000, 40 * 8 * args.length * args.processes)
    np.save(work / "tokens.npy", tokens.astype(np.uint16))
    found: dict[str, Any] = dict(shape=args.shape, processes=args.processes, versions=report.versions())

    def tell(**facts: Any) -> None:
        found.update(facts)
        args.output.write_text(json.dumps(found, indent=1) + "\n")
        print({name: value for name, value in facts.items() if not isinstance(value, list)}, flush=True)

    tell(parameters=make_checkpoint(args.shape, work / "whole-start", args.tokenizer))
    recipe = write_recipe(work, "whole", "whole-start", 10, args.length)
    tell(whole=train(recipe, args.processes), whole_steps=steps_of(work / "whole"))
    tell(tokens_per_second=float(np.median([row["tokens_per_second"] for row in found["whole_steps"][3:]])))
    for name in ("whole", "whole-start"):
        shutil.rmtree(work / name)

    tell(resumed_parameters=make_checkpoint(args.shape, work / "start", args.tokenizer, args.layers))
    straight = write_recipe(work, "straight", "start", STEPS, args.length, save_steps=STEPS // 2)
    tell(straight=train(straight, args.processes))
    interrupted(work, work / "straight")
    again = write_recipe(work, "again", "start", STEPS, args.length, save_steps=STEPS // 2)
    tell(again=train(again, args.processes, "--resume"))
    first, second = (tensors_of(work / name / "model") for name in ("straight", "again"))
    tell(same_bits=first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first))
    (work / "serve.py").write_text(SERVE)
    served = [sys.executable, str(work / "serve.py"), str(work / "straight" / "model")]
    said = subprocess.run(served, capture_output=True, text=True)
    tell(served="; ".join(line for line in said.stdout.splitlines() if "TOKENS" in line) or said.stderr[-2000:])


if __name__ == "__main__":
    main()
