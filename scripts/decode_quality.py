"""Perplexity of a text read a token a step, many sequences at once: what a batch of answers is computed with.

    python scripts/decode_quality.py CKPT --text FILE --tau 1.0,0.5 --mode at_least --output out.json

Scoring a prompt runs in large steps, where the mode "at_least" computes every expert, so it says nothing about answers.
Here the engine generates, and a logits processor makes it choose the text's next token; the probability it had given to
that token is the score. Prompts (--context tokens) are read at the same tau and not scored.
"""

import argparse
import json
import math
import os
from pathlib import Path

import torch
from vllm import LLM, SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor, RequestLogitsProcessor

from prunepath_vllm.arguments import check_output_file, whole
from prunepath_vllm.benchmarks import options, report
from prunepath_vllm.conversion.text import read_sequences
from prunepath_vllm.modeling import load_tokenizer

WANTED = "wanted_tokens"
"""In a request's extra_args: the token ids it is to choose."""


class TeacherForcing(AdapterLogitsProcessor):
    """Leaves a request the token of its text that comes next."""

    def is_argmax_invariant(self) -> bool:
        """It changes the likeliest token: greedy requests need it."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> RequestLogitsProcessor | None:
        """What a request's logits go through; None without :data:`WANTED` in its extra_args."""
        wanted = (params.extra_args or {}).get(WANTED)
        if wanted is None:
            return None

        def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            token = wanted[len(output_ids)]
            value = logits[token].clone()
            return logits.fill_(float("-inf")).index_fill_(0, logits.new_tensor([token], dtype=torch.long), value)

        return force


def losses(llm: LLM, texts: list[list[int]], tau: float, context: int) -> list[float]:
    """Negative log-probabilities of texts' tokens after the first `context`, all texts in one batch."""
    prompts = [{"prompt_token_ids": text[:context]} for text in texts]
    params = [
        SamplingParams(
            temperature=0, max_tokens=len(text) - context, ignore_eos=True, logprobs=0, detokenize=False,
            extra_args={"tau": tau, WANTED: text[context:]},
        )
        for text in texts
    ]  # fmt: skip
    found = []
    for text, answer in zip(texts, llm.generate(prompts, params, use_tqdm=False), strict=True):
        output = answer.outputs[0]
        assert list(output.token_ids) == text[context:]
        found += [-step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]
    return found


def main() -> None:
    """Score at every tau; write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CKPT")
    parser.add_argument("--text", required=True, metavar="FILE")
    parser.add_argument("--tau", type=options.taus, default=[1.0, 0.75, 0.5], metavar="LIST")
    parser.add_argument("--mode", choices=("exact", "at_least"), default="exact")
    parser.add_argument("--batch-size", type=whole(1), default=16, metavar="N")
    parser.add_argument("--context", type=whole(1), default=32, metavar="N", help="tokens of a prompt (default: 32)")
    parser.add_argument("--length", type=whole(2), default=288, metavar="N", help="tokens of a text (default: 288)")
    parser.add_argument("--batches", type=whole(1), default=4, metavar="N")
    parser.add_argument("--output", metavar="FILE")
    args = parser.parse_args()
    if args.context >= args.length:
        parser.error(f"--context {args.context}: expected less than --length, {args.length}")
    check_output_file(args.output, "--output")
    count = args.batch_size * args.batches
    tokenizer = load_tokenizer(args.checkpoint)
    sequences = read_sequences(tokenizer, args.text, length=args.length, max_tokens=count * args.length, minimum=count)
    texts = [batch.tolist() for batch in sequences.split(args.batch_size)]
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # the other runner takes no processor of one request's logits
    llm = LLM(
        args.checkpoint, max_model_len=args.length + 1, max_num_seqs=args.batch_size, kv_cache_memory_bytes=1 << 30,
        gpu_memory_utilization=0.05, logits_processors=[TeacherForcing],
        additional_config={"prunepath": {"mode": args.mode}},
    )  # fmt: skip
    rows = []
    for tau in args.tau:
        found = [loss for batch in texts for loss in losses(llm, batch, tau, args.context)]
        rows.append({"tau": tau, "perplexity": math.exp(math.fsum(found) / len(found))})
        print(f"{args.mode}, tau {tau:g}: perplexity {rows[-1]['perplexity']:.3f}", flush=True)
    if args.output:
        facts = {name: getattr(args, name) for name in ("mode", "batch_size", "context", "length", "batches")}
        model = Path(args.checkpoint).name
        text = Path(args.text).name
        result = {"checkpoint": model, "text": text, **facts, "points": rows, "versions": report.versions()}
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
