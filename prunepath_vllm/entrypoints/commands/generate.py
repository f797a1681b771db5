"""``prunepath generate``: complete a prompt offline, through the engine."""

import argparse
import os

from prunepath_vllm.arguments import number, whole
from prunepath_vllm.engine_environment import offline_defaults, require_engine
from prunepath_vllm.errors import UsageError
from prunepath_vllm.tau import resolve_tau


def add_parser(
    subparsers: argparse._SubParsersAction, parents: list[argparse.ArgumentParser]
) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser = subparsers.add_parser("generate", parents=parents, help="complete a prompt offline, through the engine")
    parser.add_argument("checkpoint", metavar="CKPT", help="PrunePath checkpoint directory")
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    dial = parser.add_mutually_exclusive_group()
    dial.add_argument("--tau", type=float, help="in (0, 1.05]; 1 is the dense model (default: the checkpoint's)")
    dial.add_argument("--sparsity", type=float, help="target FFN sparsity in [0, 1), looked up in the tau curve")
    parser.add_argument("--max-tokens", type=whole(1), default=64, metavar="N")
    parser.add_argument("--temperature", type=number(0), default=0.0)
    parser.add_argument("--chat", action="store_true", help="send the prompt as a chat message")
    parser.add_argument("--max-model-len", type=whole(1), metavar="N", help="context length (default: the model's)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the completion; what was used and what it cost goes to stderr."""
    if not os.path.isdir(args.checkpoint):
        raise UsageError(f"{args.checkpoint}: no such directory; expected a PrunePath checkpoint")
    require_engine()
    from prunepath_vllm.checkpoint import validate_checkpoint

    prunepath = validate_checkpoint(args.checkpoint).prunepath
    extra_args = {name: getattr(args, name) for name in ("tau", "sparsity") if getattr(args, name) is not None}
    resolve_tau(
        extra_args,
        default_tau=prunepath.unset_tau,
        tau_curve=prunepath.tau_curve,
        max_tau=prunepath.max_tau,
    )

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    llm = LLM(args.checkpoint, max_model_len=args.max_model_len, **offline_defaults())
    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens, extra_args=extra_args)
    if args.chat:
        (output,) = llm.chat([{"role": "user", "content": args.prompt}], params, use_tqdm=False)
    else:
        (output,) = llm.generate([args.prompt], params, use_tqdm=False)
    print(output.outputs[0].text)
    return 0
