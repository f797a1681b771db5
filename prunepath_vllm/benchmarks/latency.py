"""``vllm bench latency``, dense and at several taus in one run.

The loop that is timed is vLLM's, written again: vLLM's starts an engine each time it runs and knows no tau. Here one
engine is started per model, in a process of its own, and every tau is measured on it: tau belongs to the request, so a
start per tau would change nothing but the time a run takes. Beside vLLM's figures: the decode step, the
median time between two steps in which every request of the batch got a token, and the prefill of one long prompt.

From a script, piece by piece: :func:`parse`, :func:`start_engine`, :func:`measure`.
"""

import argparse
import copy
import fcntl
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from vllm import LLM, SamplingParams
from vllm.benchmarks import latency as vllm_latency
from vllm.engine.arg_utils import EngineArgs
from vllm.inputs import TokensPrompt
from vllm.sampling_params import RequestOutputKind
from vllm.utils.argparse_utils import FlexibleArgumentParser

from prunepath_vllm.arguments import OneLineErrors, check_output_file, number, whole
from prunepath_vllm.benchmarks import options, report, shapes
from prunepath_vllm.benchmarks.published import SHAPES
from prunepath_vllm.config import check_dense_shape
from prunepath_vllm.engine_environment import runs_on_cpu, set_server_defaults
from prunepath_vllm.errors import UsageError
from prunepath_vllm.linears import LINEAR_DTYPES
from prunepath_vllm.model_executor.operator_policy import OperatorPolicy
from prunepath_vllm.modeling import load_tokenizer

TEXT_CHARACTERS = 1 << 20
"""Of --text, that are tokenised."""

PERCENTAGES = (10, 25, 50, 75, 90, 99)
"""Percentiles of a batch's latency, as ``vllm bench latency`` gives them."""

Point = dict[str, float | None]
"""{"tau", "share"}: where on the dial to measure, and the share of active experts expected there (None: unknown); with
--hottest-half also "bias", of the routers of the first half of the experts."""


class _Parser(OneLineErrors, FlexibleArgumentParser):
    """The engine's parser, whose flags it adds; underscores do for dashes."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Our arguments and every flag of ``vllm bench latency``, under vLLM's names.

    Raises:
        UsageError: arguments that make no sense together.
    """
    parser = _Parser(
        prog="prunepath bench latency",
        conflict_handler="resolve",
        description="The engine's latency benchmark, dense and at several taus in one run.",
    )
    vllm_latency.add_cli_args(parser)
    parser.add_argument("checkpoint", nargs="?", metavar="CKPT", help="PrunePath checkpoint directory")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of a published shape, instead of CKPT")
    parser.add_argument("--expert-size", type=whole(1), default=32, metavar="N", help="with --shape (default: 32)")
    parser.add_argument(
        "--router-input", choices=("ffn", "attention"), default="ffn", help="with --shape: what its routers read"
    )
    options.add_expert_dtype(parser)
    parser.add_argument(
        "--linears", choices=LINEAR_DTYPES, help="with --expert-dtype: attention's linears too (as quantize --linears)"
    )
    parser.add_argument(
        "--dense-quantization", metavar="METHOD",
        help="vLLM's quantization of the dense engine, such as fp8_per_channel (float8, with a scale per neuron)",
    )  # fmt: skip
    parser.add_argument("--dense", metavar="DIR", help="the dense model; --shape brings its own")
    parser.add_argument("--tau", type=options.taus, metavar="LIST", help="(default: 1.0,0.8,0.5)")
    parser.add_argument(
        "--share", type=options.shares, metavar="LIST", help="with --shape: active shares of experts, instead of --tau"
    )
    parser.add_argument(
        "--hottest-half", type=number(0.5, 0.99), metavar="USES",
        help="with --share: bias routers so that half of the experts take this share of all uses",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=options.numbers(int), default=[1, 4, 16, 64], metavar="LIST")
    parser.add_argument("--repeats", type=whole(1), default=3, metavar="N", help="of the decode step (default: 3)")
    parser.add_argument(
        "--prefill", type=options.numbers(int), default=[], metavar="LIST", help="also time prompts of so many tokens"
    )
    parser.add_argument(
        "--text", metavar="FILE", help="decode steps and prefill on pieces of this text, not on random tokens"
    )
    parser.add_argument(
        "--lock", metavar="FILE", help="start this run's engines together, and measure only while holding this file"
    )
    parser.add_argument(
        "--num-iters", type=whole(0), default=30, help="iterations of vLLM's loop; 0: decode steps and prefill alone"
    )
    parser.add_argument("--output", "--output-json", dest="output", metavar="FILE", help="write the results as JSON")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the speed-up against the active share")
    options.add_debug(parser)
    # One engine, measured in this process, its figures written to FILE: what the command starts for each.
    parser.add_argument("--engine", choices=("dense", "sparse"), help=argparse.SUPPRESS)
    parser.add_argument("--part", metavar="FILE", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if (args.checkpoint is None) == (args.shape is None):
        raise UsageError("expected a checkpoint or --shape, and not both")
    if args.share and (args.tau or not args.shape):
        raise UsageError("--share: expected with --shape, instead of --tau")
    if args.hottest_half and not args.share:
        raise UsageError(f"--hottest-half {args.hottest_half:g}: expected with --share")
    if args.expert_dtype and not args.shape:
        raise UsageError("--expert-dtype: expected with --shape; a checkpoint is made by `prunepath quantize`")
    if args.linears and (not args.expert_dtype or runs_on_cpu()):
        raise UsageError("--linears: expected with --expert-dtype, on a GPU; `prunepath quantize` makes a checkpoint")
    if args.dense_quantization and not (args.shape or args.dense):
        raise UsageError("--dense-quantization: expected with --shape or --dense")
    if args.dense and args.shape:
        raise UsageError("--dense: expected with a checkpoint; --shape brings its own dense model")
    if args.use_beam_search or args.profile:
        raise UsageError("--use-beam-search (which carries no tau) and --profile: expected with `vllm bench latency`")
    if args.output_len < 3 or args.input_len < 1:
        raise UsageError("expected --output-len of 3 or more and --input-len of 1 or more")
    if args.text and (args.shape or not Path(args.text).is_file()):
        raise UsageError(f"--text {args.text}: expected a text file, with a checkpoint")
    check_output_file(args.output, "--output")
    check_output_file(args.lock, "--lock")
    if args.plot:
        report.check_plot(args.plot, dense=bool(args.shape or args.dense))
    return args


def has_host_experts(additional_config: Any) -> bool:
    """Whether the operator's policy leaves experts in host memory."""
    policy = _policy(additional_config)
    return bool(policy.get("host_experts") or policy.get("gpu_expert_gib"))


def _policy(additional_config: Any) -> dict[str, Any]:
    """The operator's policy as it is given; what is no object is for the engine to refuse."""
    policy = (additional_config or {}).get("prunepath") or {}
    return policy if isinstance(policy, dict) else {}


def operating_points(args: argparse.Namespace) -> list[Point]:
    """What --tau or --share ask for. A checkpoint's shares come from its tau curve."""
    if args.shape:
        config = shapes.dense_config(args.shape)
        num_experts = check_dense_shape(shapes.shape_family(args.shape).intermediate_size(config), args.expert_size)
        if args.share:
            return [_point_of_share(share, num_experts, args.hottest_half) for share in args.share]
        return [{"tau": tau, "share": shapes.share_of_tau(tau, num_experts)} for tau in args.tau or (1.0, 0.8, 0.5)]
    curve = options.causal_checkpoint(args.checkpoint).prunepath.tau_curve
    return [{"tau": tau, "share": shapes.share_on_curve(curve, tau)} for tau in args.tau or (1.0, 0.8, 0.5)]


def _point_of_share(share: float, num_experts: int, uses: float | None) -> Point:
    if uses is None:
        return {"tau": shapes.tau_of_share(share, num_experts), "share": share}
    bias = shapes.bias_of_uses(uses, share, num_experts)
    return {"tau": shapes.tau_of_share(share, num_experts, bias), "share": share, "bias": bias}


def start_engine(args: argparse.Namespace, engine: str) -> tuple[LLM, dict[str, Any]]:
    """Start one engine and check its routed layer.

    Args:
        args: from :func:`parse`.
        engine: "dense" or "sparse".

    Returns:
        the engine, and {"load_seconds", "layer_error"} (None for a dense model).

    Raises:
        BenchmarkError: the routed layer of the running engine is not what float32 arithmetic gives.
    """
    set_server_defaults()
    args = copy.copy(args)
    with tempfile.TemporaryDirectory() as folder:
        if args.shape:
            path = shapes.write_config(
                args.shape, Path(folder) / "model", sparse=engine == "sparse", expert_size=args.expert_size,
                router_input=args.router_input, expert_dtype=args.expert_dtype, linears=args.linears,
            )  # fmt: skip
            args.skip_tokenizer_init = True
            args.max_model_len = args.max_model_len or max(
                1024, args.input_len + args.output_len, *(tokens + 1 for tokens in args.prefill)
            )
            if runs_on_cpu():
                shapes.write_weights(path)
            else:
                args.load_format = "dummy"
        else:
            path = args.checkpoint if engine == "sparse" else args.dense
        if engine == "sparse" and has_host_experts(args.additional_config):
            # vLLM's own way is the dense engine's alone.
            args.cpu_offload_gb, args.offload_group_size, args.offload_backend = 0, 0, "auto"
        if engine == "dense" and args.dense_quantization:
            args.quantization = args.dense_quantization
        args.model, args.worker_extension_cls, args.disable_log_stats = str(path), report.PROBE, True
        args.max_num_seqs = args.max_num_seqs or max(args.batch_size)
        if args.max_num_batched_tokens is None and not runs_on_cpu():
            args.max_num_batched_tokens = max([8192, *args.prefill])
        start = time.perf_counter()
        llm = LLM.from_engine_args(EngineArgs.from_cli_args(args))
        facts: dict[str, Any] = {"load_seconds": time.perf_counter() - start}
    if args.load_format == "dummy":
        llm.collective_rpc("prunepath_randomise")
    facts["layer_error"] = report.judge_layer(llm.collective_rpc(report.CHECK))
    return llm, facts


def measure(llm: LLM, args: argparse.Namespace, points: Sequence[Point]) -> dict[str, Any]:
    """Time an engine that :func:`start_engine` gave.

    Args:
        llm: the engine.
        args: from :func:`parse`.
        points: for a dense engine one point whose tau is None.

    Returns:
        {"rows", "prefill", "peak_gib"}. A row has tau, share, batch_size, what ``vllm bench latency`` writes
        (avg_latency and latencies in seconds, percentiles), and decode_step_ms with the median of each repeat.
    """
    rows, prefill = [], []
    cells = [(point, batch) for point in points for batch in args.batch_size]
    for point, batch in tqdm(cells, desc="tau x batch size", file=sys.stderr):
        _favour(llm, point)
        row = {**point, "batch_size": batch}
        row |= _engine_loop(llm, args, point["tau"], batch) if args.num_iters else {}
        _seconds(llm, args, point["tau"], batch, 8)
        steps = [_decode_steps_ms(llm, args, point["tau"], batch) for _ in range(args.repeats)]
        row["decode_step_ms"] = statistics.median(chain(*steps))
        rows.append({**row, "decode_steps_ms": [statistics.median(one) for one in steps]})
    for point, tokens in [(point, tokens) for point in points for tokens in args.prefill]:
        _favour(llm, point)
        times = [1e3 * _seconds(llm, args, point["tau"], 1, 1, tokens) for _ in range(args.repeats + 1)][1:]
        prefill.append({**point, "tokens": tokens, "prefill_ms": statistics.median(times), "times_ms": times})
    return {"rows": rows, "prefill": prefill, "peak_gib": max(llm.collective_rpc("prunepath_peak_gib"))}


def _favour(llm: LLM, point: Point) -> None:
    if (bias := point.get("bias")) is not None:
        llm.collective_rpc("prunepath_favour", args=(bias,))


def _engine_loop(llm: LLM, args: argparse.Namespace, tau: float | None, batch: int) -> dict[str, Any]:
    """The loop of ``vllm bench latency`` on an engine that runs already, and its figures under its names.

    Raises:
        UsageError: the engine has no room for input and output.
    """
    longest = llm.llm_engine.model_config.max_model_len
    if args.input_len + args.output_len > longest:
        raise UsageError(
            f"--input-len {args.input_len} and --output-len {args.output_len}: expected at most {longest} together, "
            "the engine's --max-model-len"
        )
    params = SamplingParams(
        n=args.n,
        temperature=1.0,
        ignore_eos=True,
        max_tokens=args.output_len,
        detokenize=not args.disable_detokenize and args.shape is None,
        extra_args=None if tau is None else {"tau": tau},
    )
    # vLLM draws token ids below 10,000, which a small vocabulary does not have.
    vocabulary = min(10000, llm.llm_engine.model_config.get_vocab_size())
    drawn = torch.randint(vocabulary, (batch, args.input_len), generator=_prompts).tolist()
    prompts = [TokensPrompt(prompt_token_ids=tokens) for tokens in drawn]
    for _ in range(args.num_iters_warmup):
        llm.generate(prompts, params, use_tqdm=False)
    latencies = []
    for _ in range(args.num_iters):
        begin = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        latencies.append(time.perf_counter() - begin)
    percentiles = zip(PERCENTAGES, np.percentile(latencies, PERCENTAGES).tolist(), strict=True)
    return {
        "avg_latency": statistics.fmean(latencies),
        "latencies": latencies,
        "percentiles": {str(percentage): seconds for percentage, seconds in percentiles},
    }


def _decode_steps_ms(llm: LLM, args: argparse.Namespace, tau: float | None, batch: int) -> list[float]:
    """Milliseconds between two steps in which every request of a batch of fresh prompts got a token."""
    engine, params = llm.llm_engine, _greedy(tau, args.output_len)
    params.output_kind = RequestOutputKind.DELTA  # a step then tells who got a token
    prompts = [TokensPrompt(prompt_token_ids=tokens) for tokens in _fresh_prompts(llm, args, batch, args.input_len)]
    for index, prompt in enumerate(llm.renderer.render_cmpl(prompts)):
        engine.add_request(str(index), prompt, params)
    times = []
    while engine.has_unfinished_requests():
        if len(engine.step()) == batch:
            times.append(time.perf_counter())
    return [1e3 * (end - begin) for begin, end in pairwise(times)]


_prompts = torch.Generator().manual_seed(0)


def text_tokens(path: str, tokenizer: Any, longest: int) -> list[int]:
    """Token ids of a text's beginning: enough for prompts of up to `longest` that differ.

    Raises:
        UsageError: it is not UTF-8, or shorter.
    """
    try:
        with open(path, encoding="utf-8") as file:
            tokens: list[int] = tokenizer.encode(file.read(TEXT_CHARACTERS), add_special_tokens=False)
    except UnicodeDecodeError as error:
        raise UsageError(f"--text {path}: expected a UTF-8 text file ({error})") from None
    if len(tokens) <= longest:
        raise UsageError(f"--text {path}: {len(tokens)} tokens; expected more than {longest}, one prompt")
    return tokens


def _longest(args: argparse.Namespace) -> int:
    """Tokens of the longest prompt."""
    return max([args.input_len, *args.prefill])


@functools.cache
def _token_ids(llm: LLM, path: str, longest: int) -> torch.Tensor:
    return torch.tensor(text_tokens(path, llm.get_tokenizer(), longest))


def _fresh_prompts(llm: LLM, args: argparse.Namespace, batch: int, length: int) -> list[list[int]]:
    """Token ids of prompts that no cache holds, of --text or at random."""
    if args.text:
        text = _token_ids(llm, args.text, _longest(args))  # once an engine
        starts = torch.randint(len(text) - length, (batch, 1), generator=_prompts)
        return text[starts + torch.arange(length)].tolist()
    vocabulary = min(50000, llm.llm_engine.model_config.get_vocab_size())
    return torch.randint(10, vocabulary, (batch, length), generator=_prompts).tolist()


def _greedy(tau: float | None, new_tokens: int) -> SamplingParams:
    return SamplingParams(
        temperature=0,
        max_tokens=new_tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args=None if tau is None else {"tau": tau},
    )


def _seconds(
    llm: LLM, args: argparse.Namespace, tau: float | None, batch: int, new_tokens: int, prompt_tokens: int | None = None
) -> float:
    """Seconds for a batch of fresh prompts, greedy."""
    tokens = _fresh_prompts(llm, args, batch, prompt_tokens or args.input_len)
    begin = time.perf_counter()
    llm.generate([{"prompt_token_ids": prompt} for prompt in tokens], _greedy(tau, new_tokens), use_tqdm=False)
    return time.perf_counter() - begin


@contextmanager
def turn(lock: str | None, *, alone: bool) -> Iterator[None]:
    """Hold `lock` with others that start engines, or alone, to measure. A lock of None is always free."""
    if lock is None:
        yield
        return
    with open(lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        try:
            yield
        finally:
            # By hand: processes forked meanwhile hold the file open.
            fcntl.flock(file, fcntl.LOCK_UN)


def run_engine(args: argparse.Namespace) -> dict[str, Any]:
    """Start, check and measure the engine that ``args.engine`` names, in this process."""
    with turn(args.lock, alone=False):
        llm, facts = start_engine(args, args.engine)
    points: list[Point] = [{"tau": None, "share": None}]
    if args.engine == "sparse":
        points = operating_points(args)
    with turn(args.lock, alone=True):
        return {**facts, **measure(llm, args, points)}


def run(argv: Sequence[str]) -> int:
    """The command: every engine in a process of its own, then one table, JSON and plot."""
    args = parse(argv)
    if args.engine:
        Path(args.part).write_text(json.dumps(run_engine(args)))
        return 0
    operating_points(args)  # a bad checkpoint is named before an engine starts, as is a bad text
    if args.dense:
        options.check_dense(args.dense)
    if args.text:
        text_tokens(args.text, load_tokenizer(args.tokenizer or args.checkpoint), _longest(args))
    engines = ["dense", "sparse"] if args.shape or args.dense else ["sparse"]
    with tempfile.TemporaryDirectory() as folder:
        parts = {engine: Path(folder) / f"{engine}.json" for engine in engines}
        if code := _run_engines(argv, parts, together=bool(args.lock)):
            return code
        measured = {engine: json.loads(part.read_text()) for engine, part in parts.items()}
    result = {
        "model": args.shape or args.checkpoint,
        **({"expert_size": args.expert_size, "router_input": args.router_input} if args.shape else {}),
        "mode": _policy(args.additional_config).get("mode", OperatorPolicy.mode),
        "input_len": args.input_len,
        "output_len": args.output_len,
        "text": args.text,
        "expert_dtype": args.expert_dtype,
        "linears": args.linears,
        "dense_quantization": args.dense_quantization,
        **measured,
        "versions": report.versions(),
    }
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    print(tables(result))
    if args.plot:
        report.plot_speedups(args.plot, f"decode step, {os.path.basename(result['model'])}", speedups(result))
    return 0


def _run_engines(argv: Sequence[str], parts: dict[str, Path], *, together: bool) -> int:
    """Run this command for each engine, its figures into a file; the exit code of the first that failed, or 0."""
    processes: list[subprocess.Popen] = []
    try:
        for engine, part in parts.items():
            command = [sys.executable, "-m", "prunepath_vllm.entrypoints.cli", "bench", "latency", *argv]
            # The engine logs to stdout, which is for results.
            processes.append(
                subprocess.Popen([*command, "--engine", engine, "--part", str(part)], stdout=sys.stderr.fileno())
            )
            if not together and processes[-1].wait():
                break
        return next((code for process in processes if (code := process.wait())), 0)
    finally:
        for process in processes:
            process.terminate()  # one that still runs: we were interrupted


def tables(result: dict[str, Any]) -> str:
    """Decode steps, average latencies and prefill: a line for dense and one a tau."""
    sparse, dense = result["sparse"], result.get("dense", {"rows": [], "prefill": []})
    model = report.named(result["model"], result.get("expert_dtype"))
    if result.get("dense_quantization"):
        model += f", dense with {result['dense_quantization']}"
    parts = [f"{model}: routed layer within {sparse['layer_error']:.1e} (relative RMS) of float32"]
    batches = [f"batch {batch}" for batch in dict.fromkeys(row["batch_size"] for row in sparse["rows"])]
    for key, title, unit in [("decode_step_ms", "decode step", 1.0), ("avg_latency", "average latency", 1e3)]:
        if key in sparse["rows"][0]:
            shown = _compared(dense["rows"], sparse["rows"], key, "batch_size", unit, 3)
            parts.append(f"{title}, ms\n{report.table(['tau', 'share', *batches], shown)}")
    if sparse["prefill"]:
        lengths = dict.fromkeys(row["tokens"] for row in sparse["prefill"])
        shown = _compared(dense["prefill"], sparse["prefill"], "prefill_ms", "tokens", 1.0, 1)
        parts.append(report.table(["tau", "share", *(f"prefill of {tokens}, ms" for tokens in lengths)], shown))
    return "\n\n".join(parts)


def _compared(
    dense: list[dict[str, Any]], sparse: list[dict[str, Any]], key: str, column: str, unit: float, digits: int
) -> list[list[str]]:
    """A line for the dense engine's rows, if any, and one a tau, with ratios to the dense row of the same `column`."""
    known = {row[column]: row[key] for row in dense}
    lines = [dense] if dense else []
    lines += [[row for row in sparse if row["tau"] == tau] for tau in dict.fromkeys(row["tau"] for row in sparse)]
    shown = []
    for line in lines:
        cells = [_label(line[0]), _share(line[0])]
        for row in line:
            reference = None if row["tau"] is None else known.get(row[column])
            cells.append(f"{unit * row[key]:.{digits}f}{report.ratio(reference, row[key])}")
        shown.append(cells)
    return shown


def _label(row: dict[str, Any]) -> str:
    return "dense" if row["tau"] is None else f"{row['tau']:.3g}"


def _share(row: dict[str, Any]) -> str:
    return "" if row["share"] is None else f"{row['share']:.2f}"


def speedups(result: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Decode-step speed-up over dense against active share, a line a batch size."""
    dense = {row["batch_size"]: row["decode_step_ms"] for row in result.get("dense", {"rows": []})["rows"]}
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in result["sparse"]["rows"]:
        batch = row["batch_size"]
        if batch in dense and row["share"] is not None:
            lines.setdefault(f"batch {batch}", []).append((row["share"], dense[batch] / row["decode_step_ms"]))
    return lines
