"""A streamed answer at a target sparsity; the report comes in one more chunk, after the text.

    python examples/streaming.py --sparsity 0.5

`sparsity` needs a checkpoint with a measured tau_curve; `--tau` works with every one.
"""

import argparse
import time

import openai


def main() -> None:
    """Print the answer as it comes, then its speed and its sparsity."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="the served name; the server's first unless given")
    knob = parser.add_mutually_exclusive_group()
    knob.add_argument("--tau", type=float)
    knob.add_argument("--sparsity", type=float)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("question", nargs="?", default="What is copper used for?")
    args = parser.parse_args()

    client = openai.OpenAI(base_url=args.url, api_key="none")
    chunks = client.chat.completions.create(
        model=args.model or client.models.list().data[0].id,
        messages=[{"role": "user", "content": args.question}],
        max_tokens=args.max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"tau": args.tau, "sparsity": args.sparsity, "prunepath_report": True},  # null counts as absent
    )
    times, tokens, report = [], 0, {}
    for chunk in chunks:
        if chunk.choices and chunk.choices[0].delta.content:
            times.append(time.perf_counter())
            print(chunk.choices[0].delta.content, end="", flush=True)
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        report = (chunk.model_extra or {}).get("prunepath", report)
    print("\n")
    if len(times) > 1:
        print(f"{(tokens - 1) / (times[-1] - times[0]):.1f} tokens/s")
    for name, value in report.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
