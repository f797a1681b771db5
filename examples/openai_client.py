"""One question at several taus, through the official OpenAI client; prints each answer and what it cost.

With a server up (prunepath serve CKPT):

    python examples/openai_client.py "What is copper used for?" --tau 1.0 0.9 0.7
"""

import argparse

import openai


def main() -> None:
    """Ask, and print a line of cost under every answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="the served name; the server's first unless given")
    parser.add_argument("--tau", type=float, nargs="+", default=[1.0, 0.8])
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("question", nargs="?", default="What is copper used for?")
    args = parser.parse_args()

    client = openai.OpenAI(base_url=args.url, api_key="none")
    model = args.model or client.models.list().data[0].id
    for tau in args.tau:
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": args.question}],
            max_tokens=args.max_tokens,
            temperature=0,
            extra_body={"tau": tau, "prunepath_report": True},
        )
        report = answer.model_extra["prunepath"]
        sparsity = report["ffn_sparsity"]
        print(answer.choices[0].message.content)
        print(f"[tau {report['tau']}, FFN sparsity {'not counted' if sparsity is None else f'{sparsity:.1%}'}]\n")


if __name__ == "__main__":
    main()
