"""``prunepath sample``: text of a model's own, as training data."""

import argparse


def add_parser(
    subparsers: argparse._SubParsersAction, parents: list[argparse.ArgumentParser]
) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "sample",
        parents=parents,
        help="have a dense model write its own training text",
        description="Continue pieces of a text, picked at random, with tokens drawn from a dense causal model, and "
        "write the token ids to a .npy file that a recipe can name as data. Meant for distilling that model.",
    )
    parser.add_argument("model", metavar="MODEL", help="directory or Hugging Face name of a dense causal model")
    parser.add_argument("output", metavar="OUTPUT", help=".npy file to write")
    parser.add_argument("--prompts", required=True, metavar="FILE", help="text the pieces are taken from: a source")
    parser.add_argument("--tokens", required=True, type=int, metavar="N", help="how many tokens to write, at least")
    parser.add_argument("--prompt-length", type=int, default=16, metavar="N", help="tokens of a piece (default: 16)")
    parser.add_argument("--length", type=int, default=1024, metavar="N", help="tokens of a sequence (default: 1024)")
    parser.add_argument("--batch", type=int, default=1024, metavar="N", help="sequences at a time (default: 1024)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the distribution (default: 1)")
    parser.add_argument("--max-minutes", type=float, metavar="M", help="begin no further batch after M minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Sample and say what came out."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from prunepath_vllm.devices import check_device
    from prunepath_vllm.errors import UsageError
    from prunepath_vllm.training.data import read_tokens, write_tokens
    from prunepath_vllm.training.recipe import Source
    from prunepath_vllm.training.sample import sample

    check_device(args.device)
    for name in ("tokens", "batch", "temperature"):
        if (value := getattr(args, name)) <= 0:
            raise UsageError(f"--{name} {value}: expected a positive number")
    if not args.output.endswith(".npy"):
        raise UsageError(f"output {args.output}: expected a name ending in .npy")
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"model {args.model}: expected a dense causal model ({reason})") from None
    made = sample(
        model.eval().to(args.device),
        read_tokens(Source(path=args.prompts), tokenizer),
        tokens=args.tokens,
        length=args.length,
        prompt_length=args.prompt_length,
        batch=args.batch,
        vocabulary=len(tokenizer),
        temperature=args.temperature,
        max_minutes=args.max_minutes,
        seed=args.seed,
    )
    write_tokens(made.reshape(-1), tokenizer, args.output)
    print(f"Wrote {args.output}: {made.size} tokens in {len(made)} sequences of {args.length}.")
    return 0
