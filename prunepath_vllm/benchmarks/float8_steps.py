"""``python -m prunepath_vllm.benchmarks.float8_steps``: how far a GPU's steps of several tokens are from those of one.

With float8 experts a GPU widens the weights in steps of one token (W8A16), and quantises what they are multiplied with
in steps of several (W8A8): of the first linear, and of the second too in long prefills. Here both are emulated in
float32, whose other roundings are too small to count, on the same text: every position's next token, all positions
computed one way. Yardsticks are the checkpoint before it was quantised, and W8A16 in bfloat16. With --dtype bfloat16
all is in bfloat16, and the yardstick is W8A16 as transformers computes it, which rounds at other places.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from prunepath_vllm.activations import ACTIVATIONS
from prunepath_vllm.arguments import OneLineErrors, check_output_file, whole
from prunepath_vllm.benchmarks.float32 import layer_output
from prunepath_vllm.benchmarks.options import causal_checkpoint, taus
from prunepath_vllm.benchmarks.report import table, versions
from prunepath_vllm.errors import PrunePathError, UsageError
from prunepath_vllm.kernels.layer import LayerSpec, Weights
from prunepath_vllm.modeling.inference import RoutedFeedForward
from prunepath_vllm.modeling.quantised import QuantisedLinear

STEPS = {"W8A16": (False, False), "W8A8 first linear": (True, False), "W8A8 both linears": (True, True)}
"""Whether the inputs of the first and of the second linear are in float8, by kind of step."""

REFERENCE, ROUNDED, ROUNDED_ELSEWHERE = "W8A16", "W8A16 in bfloat16", "W8A16 rounded elsewhere"
UNQUANTISED = "not quantised"


def layer_of(module: RoutedFeedForward) -> tuple[Weights, LayerSpec]:
    """A quantised feed-forward module as the kernels describe it, its neurons in float32."""
    inputs, output = module.linears()
    router = module.router
    weights = Weights(
        torch.cat([_rows(linear) for linear in inputs]),
        None if inputs[0].bias is None else torch.cat([linear.bias for linear in inputs]),
        _rows(output),
        output.bias,
        torch.cat([linear.weight_scale for linear in inputs]),
        output.weight_scale,
    )
    spec = LayerSpec(
        hidden=weights.w_out_t.shape[1],
        num_experts=router.kept,
        expert_size=router.expert_size,
        dtype=torch.float32,
        activation=ACTIVATIONS[module.activation],
        glu=len(inputs) > 1,
        expert_dtype=output.weight.dtype,
    )
    return weights, spec


def _rows(linear: QuantisedLinear) -> Tensor:
    """The weight as [F, H]."""
    return linear.weight if linear.neuron_axis == 0 else linear.weight.t()


@contextmanager
def computed_as(model: Any, first: bool, second: bool) -> Iterator[None]:
    """Inside, feed-forward layers quantise what enters their first and second linear, or leave it as it is.

    The benchmarks' reference computes them, with inputs and outputs in the model's dtype.
    """
    modules = [module for module in model.modules() if isinstance(module, RoutedFeedForward)]
    for module in modules:
        module.forward = _forward(module, first, second)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _forward(module: RoutedFeedForward, first: bool, second: bool) -> Any:
    weights, spec = layer_of(module)

    def forward(x: Tensor, tau: Tensor, router_input: Tensor | None = None, *, native: bool = False) -> Tensor:
        gates, _, _ = module.router(x if router_input is None else router_input, tau)
        gates = gates[..., : spec.num_experts].flatten(0, 1)
        # Never rounded in between: bfloat16 is a yardstick of its own.
        return layer_output(x.flatten(0, 1), gates, weights, spec, (first, second, False)).to(x.dtype).view(x.shape)

    return forward


def divergences(wanted: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """Two models' logits [N, V]: KL divergence of the second from the first, float64 [N], and bool [N], same argmax."""
    p, q = (logits.double().log_softmax(dim=-1) for logits in (wanted, found))
    return (p.exp() * (p - q)).sum(dim=-1), wanted.argmax(dim=-1) == found.argmax(dim=-1)


@torch.inference_mode()
def measure(
    model: Any, tokens: Tensor, at_taus: Sequence[float], others: Mapping[str, tuple[Any, bool]] | None = None
) -> list[dict[str, Any]]:
    """Every kind of step on the same text.

    Args:
        model: causal, of transformers, its experts in float8.
        tokens: int64 [N, S].
        at_taus: each in (0, 1.05].
        others: yardsticks by name: a model, and whether :func:`computed_as` W8A16 or as transformers does.

    Returns:
        a row for each tau: {"tau", "perplexity" by name, "from_w8a16" by name, without its own}, the latter
        {"same_argmax", "kl_mean", "kl_p99"} over the positions that have a next token.
    """
    rows = []
    ways: dict[str, tuple[Any, tuple[bool, bool] | None]] = {name: (model, step) for name, step in STEPS.items()}
    ways |= {name: (other, STEPS[REFERENCE] if hooked else None) for name, (other, hooked) in (others or {}).items()}
    with tqdm(total=len(at_taus) * len(tokens) * len(ways), desc="forward", file=sys.stderr) as bar:
        for tau in at_taus:
            losses: dict[str, list[Tensor]] = {name: [] for name in ways}
            pairs: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in ways if name != REFERENCE}
            for text in tokens:
                wanted = torch.empty(0)
                for name, (one, step) in ways.items():  # W8A16 first
                    logits = _logits(one, text, tau, step)
                    losses[name].append(torch.nn.functional.cross_entropy(logits, text[1:], reduction="none"))
                    if name == REFERENCE:
                        wanted = logits
                    else:
                        pairs[name].append(divergences(wanted, logits))
                    bar.update()
            from_w8a16 = {}
            for name, found in pairs.items():
                kl, same = (torch.cat(parts) for parts in zip(*found, strict=True))
                figures = dict(same_argmax=same.double().mean(), kl_mean=kl.mean(), kl_p99=kl.quantile(0.99))
                from_w8a16[name] = {key: value.item() for key, value in figures.items()}
            perplexity = {name: math.exp(torch.cat(parts).double().mean().item()) for name, parts in losses.items()}
            rows.append({"tau": tau, "perplexity": perplexity, "from_w8a16": from_w8a16})
    return rows


def _logits(model: Any, text: Tensor, tau: float, step: tuple[bool, bool] | None) -> Tensor:
    """Of the positions of `text` [S] that have a next token, float32 [S - 1, V]; step None: as transformers does."""
    if step is None:
        return model(text[None], tau=tau).logits[0, :-1].float()
    with computed_as(model, *step):
        return model(text[None], tau=tau).logits[0, :-1].float()


def run(argv: Sequence[str] | None = None) -> None:
    """Measure a checkpoint, print a table, write --output."""
    from transformers import AutoModelForCausalLM

    from prunepath_vllm.conversion.text import read_sequences
    from prunepath_vllm.modeling import load_tokenizer, register_auto_classes

    prog = "python -m prunepath_vllm.benchmarks.float8_steps"
    parser = OneLineErrors(prog=prog, description=__doc__)
    parser.add_argument("checkpoint", metavar="CKPT", help="PrunePath checkpoint directory, causal, experts in float8")
    parser.add_argument("--unquantised", metavar="CKPT", help="what it was quantised from, for comparison")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--tau", type=taus, default=[1.0, 0.8, 0.5], metavar="LIST")
    parser.add_argument("--length", type=whole(2), default=512, metavar="N", help="tokens a sequence (default: 512)")
    parser.add_argument("--max-tokens", type=whole(2), default=4096, metavar="N", help="of the text (default: 4096)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")
    parser.add_argument("--output", metavar="FILE", help="write the results as JSON")
    args = parser.parse_args(argv)
    check_output_file(args.output, "--output")
    stored = causal_checkpoint(args.checkpoint).prunepath.expert_dtype
    if stored != "float8_e4m3fn":
        raise UsageError(f"{args.checkpoint}: experts in {stored or 'no quantised dtype'}; expected float8_e4m3fn")
    if args.unquantised and causal_checkpoint(args.unquantised).prunepath.expert_dtype:
        raise UsageError(f"--unquantised {args.unquantised}: expected a checkpoint whose experts are not quantised")
    register_auto_classes()
    tokenizer = load_tokenizer(args.checkpoint)
    tokens = read_sequences(tokenizer, args.text, length=args.length, max_tokens=args.max_tokens)

    def load(path: str, dtype: str = args.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()

    model = load(args.checkpoint)
    if args.dtype == "bfloat16":
        others = {ROUNDED_ELSEWHERE: (model, False)}
    else:
        others = {ROUNDED: (load(args.checkpoint, "bfloat16"), True)}
    if args.unquantised:
        others[UNQUANTISED] = (load(args.unquantised), False)
    rows = measure(model, tokens, args.tau, others)
    header = ["tau", "", "same argmax", "KL, mean", "KL, 99th", "perplexity"]
    cells = []
    for row in rows:
        for name, perplexity in row["perplexity"].items():
            found = [f"{value:.3g}" for value in row["from_w8a16"].get(name, {}).values()] or [""] * 3
            cells.append([f"{row['tau']:g}", name, *found, f"{perplexity:.4g}"])
    print(table(header, cells))
    if args.output:
        result = {
            "model": Path(args.unquantised or args.checkpoint).name,
            "dtype": args.dtype,
            "text": Path(args.text).name,
            "sequences": len(tokens),
            "length": args.length,
            "rows": rows,
            "versions": versions(),
        }
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    try:
        run()
    except PrunePathError as error:
        raise SystemExit(f"float8_steps: {error}") from None
