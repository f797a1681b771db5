"""One batch without a server: every prompt at every tau, together in the engine.

For instance, on the checkpoint that `make demo` makes (on a CPU the cache wants a size, here 1 GiB):

    VLLM_CPU_KVCACHE_SPACE=1 python examples/offline_batch.py .cache/SmolLM2-135M-Instruct-PrunePath --tau 1.0 0.8 0.6
"""

import argparse


def main() -> None:
    """Print, for every prompt, its continuations by tau and the sparsity that was counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="PrunePath checkpoint: a directory or a Hugging Face name")
    parser.add_argument("--tau", type=float, nargs="+", default=[1.0, 0.8, 0.6])
    parser.add_argument("--prompt", nargs="+", default=["Copper is a metal that", "The longest river of Europe"])
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--max-model-len", type=int, default=512)
    args = parser.parse_args()

    from vllm import LLM, SamplingParams  # after --help: it takes seconds

    llm = LLM(args.checkpoint, max_model_len=args.max_model_len)
    jobs = [(prompt, tau) for prompt in args.prompt for tau in args.tau]
    names = [f"job {i}" for i in range(len(jobs))]  # the workers count under these
    params = [
        SamplingParams(temperature=0, max_tokens=args.max_tokens, extra_args={"tau": tau, "prunepath_report": name})
        for (_, tau), name in zip(jobs, names, strict=True)
    ]
    outputs = llm.generate([prompt for prompt, _ in jobs], params)
    for (prompt, tau), name, output in zip(jobs, names, outputs, strict=True):
        # One entry per worker: of prompt and answer, the active experts of each layer and the possible ones of any.
        answers = [count[1] for count in llm.collective_rpc("prunepath_report", args=(name,)) if count]
        shares = [active / possible for layers, possible in answers for active in layers if possible]
        sparsity = f"{1 - sum(shares) / len(shares):.1%}" if shares else "none run"
        print(f"tau {tau:<5} FFN sparsity {sparsity:<7} {prompt}{output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
