"""``prunepath inspect``: validate a PrunePath checkpoint and say what is in it."""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunepath_vllm.arguments import check_output_file

if TYPE_CHECKING:
    from prunepath_vllm.checkpoint import CheckpointSummary


def add_parser(subparsers, parents: list[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add this command to the command line."""
    parser = subparsers.add_parser(
        "inspect",
        parents=parents,
        help="validate a PrunePath checkpoint and describe it",
        description="Validate a PrunePath checkpoint, values included, and say what is in it.",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="PrunePath checkpoint directory")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", metavar="FILE", help="write the JSON there, too")
    return parser


def run(args: argparse.Namespace) -> int:
    """Validate, then print a table or JSON."""
    from prunepath_vllm.checkpoint import validate_checkpoint

    check_output_file(args.output, "--output")
    facts = describe(validate_checkpoint(args.checkpoint, check_values=True))
    if args.output:
        Path(args.output).write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2) if args.json else _table(facts))
    return 0


def describe(summary: "CheckpointSummary") -> dict[str, Any]:
    """What is known about a validated checkpoint, as plain JSON values."""
    from prunepath_vllm.checkpoint import stream_tensors

    family, config = summary.family, summary.config
    layers = range(summary.num_layers)
    routers = [f"{family.router(layer)}.weight" for layer in layers]
    zero = sum(not bool(tensor.any()) for _, tensor in stream_tensors(summary.path, summary.tensors, routers))
    infos = summary.tensors.values()
    return {
        "checkpoint": str(summary.path),
        "family": family.name,
        "architecture": family.architecture,
        "parameters": sum(math.prod(info.shape) for info in infos),
        "dtypes": sorted({info.dtype for info in infos}),
        "files": sorted({info.file for info in infos}),
        "num_layers": len(layers),
        "hidden_size": summary.hidden_size,
        "intermediate_size": family.intermediate_size(config),
        "activation": family.activation(config),
        "routers": {"fitted": len(layers) - zero, "zero": zero, "bias": summary.router_bias},
        **summary.prunepath.to_json(),
        "router": summary.prunepath.router.model_dump(),
        "expert_dtype": summary.prunepath.expert_dtype,
        "linear_dtype": summary.linear_dtype,
        "kept_share": summary.prunepath.kept_share,
        "max_tau": summary.prunepath.max_tau,
    }


def _kept(facts: dict[str, Any]) -> str:
    if facts["max_tau"] is None:
        return "all"
    layers = [len(kept) for kept in facts["kept_experts"]]
    return f"{facts['kept_share']:.1%}, {min(layers)} to {max(layers)} per layer, for tau up to {facts['max_tau']:g}"


def _table(facts: dict[str, Any]) -> str:
    routers, split, curve = facts["routers"], facts["split"], facts["tau_curve"]
    state = "zero" if not routers["fitted"] else "fitted"
    if routers["fitted"] and routers["zero"]:
        state = f"fitted in {routers['fitted']} layers, zero in {routers['zero']}"
    options = facts["router"]
    shape = "" if options["rank"] is None else f", rank {options['rank']}"
    shape += ", read the attention's input" if options["input"] == "attention" else ""
    selection = facts["selection"].replace("_", " ")
    if facts["threshold"] is not None:
        selection += f" {facts['threshold']:g}"
    rows = [
        ("family", f"{facts['family']} ({facts['architecture']})"),
        ("base model", facts["base_model"] or "not recorded"),
        ("parameters", f"{facts['parameters'] / 1e6:,.1f} M, {', '.join(facts['dtypes'])}"),
        ("layers", f"{facts['num_layers']}, hidden {facts['hidden_size']}, FFN {facts['intermediate_size']}"),
        ("experts", f"{facts['num_experts']} per layer, {facts['expert_size']} neurons each, {facts['activation']}"),
        ("kept experts", _kept(facts)),
        ("routers", f"{state}, {'with' if routers['bias'] else 'no'} bias{shape}"),
        ("split", f"{split['method']} ({split['source'] or 'no source'}), seed {split['seed']}"),
        ("selection", selection),
        ("gate", facts["gate"]),
        ("expert dtype", f"{facts['expert_dtype']}, a scale per neuron" if facts["expert_dtype"] else "not quantised"),
        ("attention", f"{facts['linear_dtype']}, a scale per output" if facts["linear_dtype"] else "not quantised"),
        ("dense positions", str(facts["dense_positions"])),
        ("default tau", f"{facts['default_tau']:g}"),
        ("tau curve", "not measured" if curve is None else f"{len(curve)} points: tau -> FFN sparsity"),
    ]
    lines = [facts["checkpoint"], *(f"  {name:<16} {value}" for name, value in rows)]
    points = [f"{tau:<6.4g} {sparsity:6.1%}" for tau, sparsity in curve or []]
    columns = 3
    height = math.ceil(len(points) / columns)
    for row in range(height):
        lines.append(" " * 19 + "   ".join(points[row::height]))
    lines.append("  valid: FFN, router, embedding and head tensors are well shaped and finite")
    return "\n".join(lines)
