"""README.md of a PrunePath checkpoint, written from its config.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunepath_vllm.checkpoint import load_prunepath_config, read_json
from prunepath_vllm.config import PrunePathConfig
from prunepath_vllm.linears import linear_dtype
from prunepath_vllm.tau import MAX_TAU

CARD_FILE = "README.md"
QUALITY_FILE = "quality.json"
"""What a training or a sweep measured: {data, points: [{tau, ffn_sparsity, loss, perplexity, accuracy}]}; a sweep also
says {max_loss, recommended: {tau, ffn_sparsity, loss}}, where a loss is relative."""

SOURCE_WEIGHTS = "prunepath_source_weights"
"""Field of config.json: how the weights that were converted were quantised, and what became of that."""


def write_model_card(path: str | Path) -> Path:
    """Write (or rewrite) the model card of a PrunePath checkpoint directory and return its path.

    Raises:
        CheckpointError: config.json cannot be read.
        ConfigError: it does not describe a PrunePath model.
    """
    path = Path(path)
    family, prunepath, config = load_prunepath_config(path)
    base = prunepath.base_model or f"a {family.dense_architecture} model"
    linears = linear_dtype(config, family, prunepath)
    causal = family.auto_class == "AutoModelForCausalLM"
    card = "\n\n".join(
        [
            _front_matter(prunepath, causal),
            f"# PrunePath: {base}",
            f"{base}, its feed-forward layers cut into experts that are routed per token. A request chooses how many "
            f"run with `tau`: {_range(prunepath)}. The method is "
            "[PrunePath](https://arxiv.org/abs/2605.28283).",
            _facts(prunepath, family.num_layers(config), family.model_type, linears),
            "## Quality and sparsity\n\n" + (_quality(path, prunepath) or _curve(prunepath)),
            "## Use\n\n" + _usage(prunepath, causal),
            "## Limits\n\n" + _limits(prunepath, config.get(SOURCE_WEIGHTS), linears),
        ]
    )
    (path / CARD_FILE).write_text(card + "\n", encoding="utf-8")
    return path / CARD_FILE


def _range(prunepath: PrunePathConfig) -> str:
    return "all of them at 1, fewer below" if prunepath.max_tau is None else f"up to {prunepath.max_tau:g}"


def _front_matter(prunepath: PrunePathConfig, causal: bool) -> str:
    lines = ["---", "library_name: prunepath-vllm"]
    if prunepath.base_model:
        lines.append(f"base_model: {json.dumps(prunepath.base_model)}")  # a JSON string is a YAML string
    lines.append(f"pipeline_tag: {'text-generation' if causal else 'text-classification'}")
    return "\n".join([*lines, "tags:", "- prunepath", "- sparsity", "- vllm", "---"])


def _facts(prunepath: PrunePathConfig, layers: int, model_type: str, linears: str | None) -> str:
    split = prunepath.split
    source = f" of {split.source}" if split.source else ""
    rows = [
        ("model type", f"`{model_type}`, {layers} layers"),
        ("experts per layer", f"{prunepath.num_experts} of {prunepath.expert_size} neurons"),
        ("split", f"{split.method}{source}, seed {split.seed}"),
        ("selection", prunepath.selection.replace("_", " ") + _threshold(prunepath)),
        ("gate", prunepath.gate),
        *([("experts kept", _kept(prunepath))] if prunepath.kept_experts is not None else []),
        *([("expert weights", f"{prunepath.expert_dtype}, a scale per neuron")] if prunepath.expert_dtype else []),
        *([("attention weights", f"{linears}, a scale per output channel")] if linears else []),
        ("dense positions", str(prunepath.dense_positions)),
        ("default tau", f"{prunepath.default_tau:g}"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _kept(prunepath: PrunePathConfig) -> str:
    usage = prunepath.expert_usage
    on = "" if usage is None else f"; counted on {usage.tokens} tokens of {usage.text}"
    return f"{prunepath.kept_share:.1%}, for tau up to {prunepath.max_tau:g}{on}"


def _threshold(prunepath: PrunePathConfig) -> str:
    return "" if prunepath.threshold is None else f", {prunepath.threshold:g}"


def _quality(path: Path, prunepath: PrunePathConfig) -> str | None:
    """The table of QUALITY_FILE; None where there is none, or the tau curve was measured anew since."""
    if not (path / QUALITY_FILE).is_file():
        return None
    measured = read_json(path / QUALITY_FILE)
    points = measured["points"]
    curve = prunepath.tau_curve or []
    if curve and [point["tau"] for point in points] != [tau for tau, _ in curve]:
        return None
    if any(abs(point["ffn_sparsity"] - sparsity) > 0.01 for point, (_, sparsity) in zip(points, curve, strict=False)):
        return None
    name = "perplexity" if points[0]["perplexity"] is not None else "accuracy"
    rows = [f"| {point['tau']:.3g} | {point['ffn_sparsity']:.1%} | {point[name]:.4g} |" for point in points]
    return "\n".join(
        [
            f"FFN sparsity (share of experts left out) and {name} on {measured['data']}.{_recommended(measured)}",
            "",
            f"| tau | FFN sparsity | {name} |",
            "|---|---|---|",
            *rows,
        ]
    )


def _recommended(measured: Mapping[str, Any]) -> str:
    """A sweep's choice, where the file is a sweep's."""
    chosen = measured.get("recommended")
    if chosen is None:
        return ""
    return (
        f" `prunepath sweep` recommends tau {chosen['tau']:.3g} for a loss of at most {measured['max_loss']:.1%}: "
        f"{chosen['loss']:+.1%} at {chosen['ffn_sparsity']:.1%} sparsity."
    )


def _curve(prunepath: PrunePathConfig) -> str:
    if not prunepath.tau_curve:
        return (
            "Not measured. `prunepath calibrate` fits the routers and measures which share of the experts each tau "
            "leaves out; `prunepath eval` measures what that costs in quality."
        )
    rows = [f"| {tau:.3g} | {sparsity:.1%} |" for tau, sparsity in prunepath.tau_curve]
    return "\n".join(
        [
            "FFN sparsity (share of experts left out) measured at each tau on held-out calibration text. Quality at a "
            "tau depends on the task: measure it with `prunepath eval`.",
            "",
            "| tau | FFN sparsity |",
            "|---|---|",
            *rows,
        ]
    )


def _usage(prunepath: PrunePathConfig, causal: bool) -> str:
    if causal:
        example = (
            "prunepath serve CHECKPOINT      # this directory\n"
            "curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\\n"
            '  -d \'{"model": "CHECKPOINT", "prompt": "Once upon a time", "max_tokens": 32, "tau": TAU}\''
        )
    else:
        example = (
            "prunepath serve CHECKPOINT      # this directory\n"
            "curl http://127.0.0.1:8000/classify -H 'Content-Type: application/json' \\\n"
            '  -d \'{"model": "CHECKPOINT", "input": "A fine film.", "tau": TAU}\''
        )
    example = example.replace("TAU", f"{min(0.8, prunepath.max_tau or MAX_TAU):.4g}")
    knob = f"`tau` is a number in (0, {MAX_TAU}]; at 1 and above every expert runs."
    if prunepath.max_tau is not None:
        knob = f"`tau` is a number in (0, {prunepath.max_tau}]; requests above it are refused."
    if prunepath.tau_curve:
        knob += (
            f" `sparsity`, in [{_least_sparsity(prunepath)}, 1), asks for a share of experts to leave out instead; the "
            "curve above gives its tau."
        )
    return f"```bash\npip install prunepath-vllm\n{example}\n```\n\n{knob}"


def _least_sparsity(prunepath: PrunePathConfig) -> float:
    curve = prunepath.tau_curve
    return curve[-1][1] if curve and prunepath.max_tau is not None else 0


def _limits(prunepath: PrunePathConfig, source_weights: object, linears: str | None) -> str:
    lines = [
        "- Loads only where prunepath-vllm is installed: its `model_type` is its own, so that no engine serves it as a "
        "dense model by mistake.",
        "- Below tau 1 it makes errors that the dense model does not, besides those that it does.",
        "- A converted model that was not fine-tuned loses quality at much lower sparsity than the published ones.",
    ]
    if isinstance(source_weights, str):
        lines.append(f"- Converted from quantised weights: {' '.join(source_weights.split())}.")
    if prunepath.max_tau is not None:
        lines.append(
            f"- Made for tau up to {prunepath.max_tau:g}: experts that its text did not use there have no weights. A "
            "token that chooses one all the same gets nothing from it."
        )
    if prunepath.expert_dtype is not None:
        lines.append(f"- Its experts are quantised to {prunepath.expert_dtype} and were not trained so.")
    if linears is not None:
        lines.append(
            f"- Its attention's linears are quantised to {linears} and were not trained so; vLLM quantises what they "
            "multiply, too."
        )
    if not prunepath.tau_curve:
        lines.append(
            "- Routers that were never calibrated or trained rank experts arbitrarily: use tau 1 until they are."
        )
    return "\n".join(lines)
