"""LangChain through the OpenAI interface: one chat model per tau, a draft at a low one, corrected by the dense model.

It needs one package more:

    pip install langchain-openai
    python examples/langchain_chat.py --draft-tau 0.7
"""

import argparse


def main() -> None:
    """Draft at a low tau, revise with the dense model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--draft-tau", type=float, default=0.8)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("question", nargs="?", default="What is copper used for?")
    args = parser.parse_args()

    from langchain_openai import ChatOpenAI  # not among this package's requirements

    def chat(tau: float) -> ChatOpenAI:
        return ChatOpenAI(
            base_url=args.url,
            api_key="none",
            model=args.model,
            temperature=0,
            max_tokens=args.max_tokens,
            extra_body={"tau": tau},
        )

    draft = chat(args.draft_tau).invoke(args.question).content
    print(f"[tau {args.draft_tau}]\n{draft}\n")
    print(f"[tau 1.0]\n{chat(1.0).invoke(f'Correct this answer to {args.question!r}: {draft}').content}")


if __name__ == "__main__":
    main()
