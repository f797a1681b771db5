"""Tables of the documentation, made from the raw results: ``python -m prunepath_vllm.benchmarks.tables``.

A page asks for a table in a comment, and what stands between it and the next ``<!-- end -->`` is replaced:

    <!-- table: latency h200/latency_qwen2-7b.json --batch=1,4 -->
    <!-- end -->

The first word is the kind, one of ``KINDS``; the others are written as in a shell. Files are named as they lie below
benchmarks/results. ``--check`` writes nothing and fails where a page does not say what the files do.
"""

import argparse
import difflib
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prunepath_vllm.benchmarks.report import markdown
from prunepath_vllm.benchmarks.training_curves import Curve, perplexity_at, read_curve, read_models
from prunepath_vllm.checkpoint import read_json
from prunepath_vllm.errors import PrunePathError, UsageError
from prunepath_vllm.evaluation.figures import split_label

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/*.md")
BLOCK = re.compile(r"(<!-- table: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
SERVED = {
    "output tokens/s": ("output_throughput", "{:.3g}", False),
    "time per output token, median": ("median_tpot_ms", "{:.3g} ms", True),
    "time per output token, p99": ("p99_tpot_ms", "{:.3g} ms", True),
    "time to first token, median": ("median_ttft_ms", "{:.3g} ms", True),
}
"""Rows of a ``serve`` table: vLLM's field, how to write it, whether less is better."""


def share(value: float | None) -> str:
    """A row's label: of a dense model, of every expert, or of the share that is active."""
    if value is None:
        return "dense"
    return "every expert" if value == 1 else f"{value:.2g} of the experts".replace("0.", ".")


def speedup(dense: float, ours: float) -> str:
    """How many times faster, "1.36x"."""
    return f"{dense / ours:.2f}x"


def latency(file: str, *, batch: str = "1", prefill: str = "", base: str = "") -> str:
    """Decode steps of ``prunepath bench latency``: a row an active share, a column a batch size, with the ratio.

    Args:
        file: its --output.
        batch: batch sizes.
        prefill: lengths of prompts, each a column with the time to its first token.
        base: the file whose dense model the ratios are to, where it is not this one's, which may then have none.
    """
    result = _read(file)
    parts = [part for part in ("dense", "sparse") if part in result]
    sizes = [int(size) for size in batch.split(",")]
    reference = _read(base or file)["dense"]
    dense = {row["batch_size"]: row["decode_step_ms"] for row in reference["rows"]}
    lengths = [int(tokens) for tokens in prefill.split(",")] if prefill else []
    dense_prompts = {row["tokens"]: row["prefill_ms"] for row in reference["prefill"]}
    prompts = {(row["share"], row["tokens"]): row["prefill_ms"] for part in parts for row in result[part]["prefill"]}
    rows = []
    shares = list(dict.fromkeys(row["share"] for part in parts for row in result[part]["rows"]))
    for one in shares:
        part = result["dense" if one is None else "sparse"]["rows"]
        steps = {row["batch_size"]: row["decode_step_ms"] for row in part if row["share"] == one}
        plain = one is None and not base
        cells = [_milliseconds(steps[size], None if plain else dense[size]) for size in sizes]
        for tokens in lengths:
            cells.append(_milliseconds(prompts[one, tokens], None if plain else dense_prompts[tokens]))
        rows.append([share(one), *cells])
    header = ["active", *(f"batch {size}" for size in sizes), *(f"prefill of {tokens:,}" for tokens in lengths)]
    return markdown(header, rows)


def _milliseconds(value: float, dense: float | None) -> str:
    text = f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
    return f"{text} ms" if dense is None else f"{text} ms ({speedup(dense, value)})"


def serve(file: str) -> str:
    """``prunepath bench serve``: a row a measure of vLLM's, a column dense and each active share, with the ratio."""
    runs = _read(file)["runs"]
    dense = next(run["result"] for run in runs if run["tau"] is None)
    table = []
    for name, (field, form, less) in SERVED.items():
        cells = []
        for run in runs:
            value = run["result"][field]
            better = speedup(dense[field], value) if less else speedup(value, dense[field])
            cells.append(form.format(value) + ("" if run["tau"] is None else f" ({better})"))
        table.append([name, *cells])
    return markdown(["", *(share(None if run["tau"] is None else run["share"]) for run in runs)], table)


def kernel(file: str, *, model: str) -> str:
    """``prunepath bench kernel``: a row a number of tokens, a column an active share, microseconds and ratio."""
    rows = _read(file)["models"][model]["rows"]
    shares = list(dict.fromkeys(row["share"] for row in rows))
    table = []
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        cells = {row["share"]: row for row in rows if row["tokens"] == tokens}
        first = next(iter(cells.values()))
        values = [f"{cells[s]['us']:,.0f} ({speedup(cells[s]['dense_us'], cells[s]['us'])})" for s in shares]
        table.append([f"{tokens:,}", f"{first['dense_us']:,.0f}", *values, first["path"]])
    return markdown(["tokens", "dense, us", *(share(one) for one in shares), "path"], table)


def perplexity(*curves: str, at: str, dense: str = "") -> str:
    """Perplexity by FFN sparsity, between measured points as ``training_curves`` interpolates.

    Args:
        curves: LABEL=FILE, or LABEL=FILE@SPARSITY,... for a model a sparsity.
        at: FFN sparsities.
        dense: a file whose perplexity the ratios in brackets are over; no ratios without it.
    """
    sparsities = [float(one) for one in at.split(",")]
    base = read_curve(str(RESULTS / dense))[0][1] if dense else None
    rows = []
    for label, files in map(split_label, curves):
        curve = _curve(files)
        cells = [_perplexity(perplexity_at(curve, one), base) for one in sparsities]
        rows.append([label, *cells])
    return markdown(["FFN sparsity", *(f"{one:g}" for one in sparsities)], rows)


def _curve(files: str) -> Curve:
    paths = ",".join(str(RESULTS / one) for one in files.split(","))
    return read_models(paths) if "@" in files or "," in files else read_curve(paths)


def _perplexity(value: float | None, dense: float | None) -> str:
    if value is None:
        return "-"
    text = f"{value:.1f}" if value < 100 else f"{value:,.0f}"
    return text if dense is None else f"{text} ({value / dense:.2f})"


def scores(*models: str, metric: str, at: str = "") -> str:
    """What ``prunepath eval`` or a training measured: a row a model, "value at sparsity" for each of its points.

    Args:
        models: LABEL=FILE.
        metric: accuracy, accuracy_norm, rouge_l, recall or perplexity.
        at: the points nearest to these FFN sparsities alone.
    """
    rows = []
    for label, file in map(split_label, models):
        result = _read(file)
        points = sorted(result["points"], key=lambda point: point["ffn_sparsity"])
        if at:
            nearest = [min(points, key=lambda point: abs(point["ffn_sparsity"] - float(one))) for one in at.split(",")]
            points = [point for point in points if point in nearest]
        form = "{:.1f}" if metric == "perplexity" else "{:.3f}"
        cells = [
            form.format(point[metric]) + ("" if point["tau"] is None else f" at {abs(point['ffn_sparsity']):.2f}")
            for point in points
        ]
        rows.append([label, f"{result['items']:,}" if "items" in result else "", ", ".join(cells)])
    return markdown(["", "items", f"{metric} at FFN sparsity"], rows)


def checkpoint(*measures: str, at: str, tau: str) -> str:
    """One checkpoint at many taus: a row a measure, a column its dense model and each FFN sparsity, with the ratio.

    Args:
        measures: LABEL=METRIC:FILE,DENSE of results of ``prunepath eval`` or a training, or LABEL=tokens/s:FILE of
            ``prunepath bench latency``, of one request. What was measured at a tau stands under its sparsity, from
            which that of other texts differs by hundredths; perplexity, of more taus, is interpolated at the sparsity.
        at: FFN sparsities, the columns.
        tau: theirs.

    Raises:
        ValueError: not as many taus as sparsities, or several dense points.
        UsageError: a file without one of the taus.
    """
    columns = list(zip(_numbers(at), _numbers(tau), strict=True))
    rows = []
    values: Sequence[float | None]
    for label, request in map(split_label, measures):
        metric, _, files = request.partition(":")
        if metric == "tokens/s":
            base, found = _tokens_per_second(files)
            values = [_at(files, found, one) for _, one in columns]
        else:
            file, dense = files.split(",")
            ((_, base),) = read_curve(str(RESULTS / dense), metric)
            if metric == "perplexity":
                curve = read_curve(str(RESULTS / file))
                values = [perplexity_at(curve, sparsity) for sparsity, _ in columns]
            else:
                found = {point["tau"]: point[metric] for point in _read(file)["points"]}
                values = [_at(file, found, one) for _, one in columns]
        form = {"perplexity": "{:.2f}", "tokens/s": "{:.1f}"}.get(metric, "{:.3f}")
        cells = ["-" if value is None else f"{form.format(value)} ({value / base:.2f})" for value in values]
        rows.append([label, form.format(base), *cells])
    return markdown(["FFN sparsity", "dense", *(f"{sparsity:g}" for sparsity, _ in columns)], rows)


def _numbers(text: str) -> list[float]:
    return [float(one) for one in text.split(",")]


def _at(file: str, found: Mapping[float, float], tau: float) -> float:
    if tau not in found:
        raise UsageError(f"{file}: no point at tau {tau}; expected one of {', '.join(map(str, found))}")
    return found[tau]


def _tokens_per_second(file: str) -> tuple[float, dict[float, float]]:
    """The dense model's, and ours by tau."""
    result = _read(file)
    dense, sparse = ([row for row in result[part]["rows"] if row["batch_size"] == 1] for part in ("dense", "sparse"))
    return 1000 / dense[0]["decode_step_ms"], {row["tau"]: 1000 / row["decode_step_ms"] for row in sparse}


def host_experts(file: str, *, batch: str = "1", base: str) -> str:
    """Decode steps with experts in host memory: a row a run, a column what is active, with the ratio to one run.

    Args:
        file: {"runs"}: of each the label, GiB on GPU and host, and rows of label, batch and milliseconds.
        batch: the batch size.
        base: label of the run that ratios are to.
    """
    runs = _read(file)["runs"]
    steps = {
        run["label"]: {row["label"]: row["ms"] for row in run["rows"] if row.get("batch") == int(batch)} for run in runs
    }
    (reference,) = steps[base].values()
    columns = list(steps[runs[-1]["label"]])
    table = []
    for run in runs:
        values = list(steps[run["label"]].values())  # of a dense model one, and else one for each column
        cells = [f"{value:.3g} ms ({speedup(reference, value)})" for value in values]
        memory = f"{run['gib']['gpu']:.1f}", f"{run['gib']['host']:.1f}" if run["kind"] == "sparse" else ""
        table.append([run["label"], *memory, *cells, *[""] * (len(columns) - len(cells))])
    return markdown(["", "GiB on the GPU", "on the host", *columns], table)


def unions(file: str, *, taus: str) -> str:
    """``benchmarks.unions``: the share of a layer's experts that a batch reads on real text."""
    result = _read(file)
    wanted = [float(tau) for tau in taus.split(",")]
    rows = []
    for row in result["rows"]:
        if row["tau"] in wanted:
            sizes = list(row["different"])
            cells = [" / ".join(f"{row[kind][size]:.2f}" for size in sizes) for kind in ("different", "consecutive")]
            rows.append([f"{row['tau']:g}", f"{row['active']:.2f}", *cells])
    batch = " / ".join(sizes)
    return markdown(["tau", "one token", f"{batch} tokens of different places", f"{batch} consecutive tokens"], rows)


def exactness(file: str) -> str:
    """Greedy tokens of a batch of mixed taus that are those of lone requests, by CUDA graph mode and dtype."""
    result = _read(file)
    engines = list(dict.fromkeys(row["vllm"] for row in result["rows"]))
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in result["rows"]:
        kind = row["graphs"], row["dtype"], row["attention"]
        cells.setdefault(kind, {})[row["vllm"]] = f"{row['tokens_as_alone']} of {result['of']}"
    rows = [[*kind, *(found[engine] for engine in engines)] for kind, found in cells.items()]
    return markdown(["graphs", "dtype", "attention", *(f"vLLM {engine}" for engine in engines)], rows)


def float8_steps(file: str) -> str:
    """``benchmarks.float8_steps``: a row a kind of step, a column a tau: how far from W8A16, and perplexity."""
    rows = _read(file)["rows"]
    table = []
    for name in rows[0]["perplexity"]:
        cells = []
        for row in rows:
            distance = row["from_w8a16"].get(name)
            text = "{same_argmax:.1%}, {kl_mean:.2g} ({kl_p99:.2g}), ".format_map(distance) if distance else ""
            cells.append(f"{text}{row['perplexity'][name]:.2f}")
        table.append([name, *cells])
    return markdown(["", *(f"tau {row['tau']:g}" for row in rows)], table)


KINDS: Mapping[str, Callable[..., str]] = {
    function.__name__: function
    for function in (
        latency,
        serve,
        kernel,
        perplexity,
        scores,
        checkpoint,
        host_experts,
        unions,
        exactness,
        float8_steps,
    )
}


def render(request: str) -> str:
    """The table of one comment.

    Raises:
        UsageError: an unknown kind, an option that it does not have, or a file without what it shows.
    """
    kind, *words = shlex.split(request)
    if kind not in KINDS:
        raise UsageError(f"table: {kind!r}; expected one of {', '.join(KINDS)}")
    options = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
    try:
        return KINDS[kind](*(word for word in words if not word.startswith("--")), **options)
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise UsageError(f"table: {request}: {type(error).__name__}: {error}") from None


def rewrite(text: str) -> str:
    """A page with its tables made anew."""
    return BLOCK.sub(lambda block: f"{block[1]}{render(block[2])}\n{block[3]}", text)


def pages() -> list[Path]:
    """Every page that may hold tables."""
    return sorted(path for pattern in PAGES for path in ROOT.glob(pattern))


def differences() -> str:
    """What the pages say and the files do not, as a diff; empty where they agree."""
    found: list[str] = []
    for path in pages():
        text = path.read_text(encoding="utf-8")
        old, new = (one.splitlines(keepends=True) for one in (text, rewrite(text)))
        found += difflib.unified_diff(old, new, str(path.relative_to(ROOT)), "from the results")
    return "".join(found)


def _read(file: str) -> Any:
    return read_json(RESULTS / file)


def run(argv: Sequence[str] | None = None) -> None:
    """Write every page's tables, or say where they differ."""
    parser = argparse.ArgumentParser(prog="tables", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page differs")
    if parser.parse_args(argv).check:
        if found := differences():
            raise UsageError(f"these tables are not those of benchmarks/results:\n{found}")
        return
    for path in pages():
        text = path.read_text(encoding="utf-8")
        if (new := rewrite(text)) != text:
            path.write_text(new, encoding="utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    try:
        run()
    except PrunePathError as error:
        raise SystemExit(f"tables: {error}") from None
