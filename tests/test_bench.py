"""``prunepath bench``: the arithmetic of its tables and dials, and what it refuses. Engines: test_bench_engine.py."""

import argparse
import json
import math
from pathlib import Path

import pytest
import torch
from test_cli import assert_one_line, prunepath

from prunepath_vllm.activations import Activation
from prunepath_vllm.benchmarks import kernel, latency, layer, options, report, serve, server, shapes
from prunepath_vllm.benchmarks.report import BenchmarkError
from prunepath_vllm.benchmarks.tile_search import Bench, paths_for, start_choice
from prunepath_vllm.checkpoint import validate_checkpoint
from prunepath_vllm.config import EXPERT_DTYPES
from prunepath_vllm.entrypoints import cli
from prunepath_vllm.errors import ConfigError, UsageError
from prunepath_vllm.kernels import ffn, reference
from prunepath_vllm.kernels.layer import LayerSpec

TINY = dict(
    model_type="qwen2", hidden_size=32, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, vocab_size=320, max_position_embeddings=128,
)  # fmt: skip


@pytest.mark.parametrize(("uses", "share"), [(0.78, 0.2), (0.89, 0.1)])
def test_a_bias_gives_half_of_the_experts_most_uses(uses, share):
    bias = shapes.bias_of_uses(uses, share, 128)
    tau = shapes.tau_of_share(share, 128, bias)
    logits = torch.randn(2000, 128, generator=torch.Generator().manual_seed(1))
    logits[:, :64] += bias
    active = reference.select_cumulative_mass(logits, torch.tensor(tau))
    assert active.float().mean() == pytest.approx(share, abs=0.01)
    assert active[:, :64].sum() / active.sum() == pytest.approx(uses, abs=0.01)


def test_vllms_own_offload_is_the_dense_engines_beside_experts_in_host_memory():
    policy = '{"prunepath": {"host_experts": 0.5}}'
    args = latency.parse(["--shape", "smollm2", "--share", "0.2", "--additional-config", policy])
    assert latency.has_host_experts(args.additional_config)
    assert not latency.has_host_experts({"prunepath": {"min_tau": 0.5}})
    assert not latency.has_host_experts({"prunepath": {"host_experts": 0}})
    with pytest.raises(UsageError, match=r"--hottest-half 0\.8: expected with --share"):
        latency.parse(["--shape", "smollm2", "--hottest-half", "0.8"])


@pytest.mark.parametrize("quantization", [None, "fp8_per_channel"])
@pytest.mark.parametrize("own", [None, "fp8"])
def test_the_dense_engine_alone_is_quantised_by_vllm(monkeypatch, quantization, own):
    """--dense-quantization stands before vLLM's own --quantization, which is for both engines."""
    started: list = []

    class Engine:
        """Starts nothing."""

        @classmethod
        def from_engine_args(cls, args):
            started.append((args.model, args.quantization))
            return cls()

        def collective_rpc(self, method):
            return [None]

    monkeypatch.setattr(latency, "LLM", Engine)
    given = (("--dense-quantization", quantization), ("--quantization", own))
    more = [word for option, value in given if value is not None for word in (option, value)]
    args = latency.parse(["quantised", "--dense", "dense", *more])
    for engine in ("dense", "sparse"):
        assert latency.start_engine(args, engine)[1]["layer_error"] is None
    assert started == [("dense", quantization or own), ("quantised", own)]
    assert args.quantization == own  # the caller's arguments stay


@pytest.mark.parametrize("num_experts", [48, 592])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_tau_of_share_selects_that_share_of_gaussian_logits(share, num_experts):
    tau = shapes.tau_of_share(share, num_experts)
    logits = torch.randn(2000, num_experts, generator=torch.Generator().manual_seed(7))
    active = reference.select_cumulative_mass(logits, torch.tensor(tau))
    assert active.float().mean().item() == pytest.approx(share, abs=0.01)
    assert shapes.share_of_tau(tau, num_experts) == pytest.approx(share, abs=0.005)


def test_share_1_is_tau_1_and_a_tiny_share_is_one_expert():
    assert shapes.tau_of_share(1.0, 64) == 1.0
    tau = shapes.tau_of_share(1 / 64, 64)
    assert 0 < tau < 1
    assert shapes.share_of_tau(tau, 64) == pytest.approx(1 / 64, rel=0.1)


def test_share_on_curve_interpolates_and_does_not_guess_beyond():
    curve = [(0.4, 0.8), (0.8, 0.4), (1.0, 0.0)]
    assert shapes.share_on_curve(curve, 0.6) == pytest.approx(0.4)
    assert shapes.share_on_curve(curve, 0.9) == pytest.approx(0.8)
    assert shapes.share_on_curve(curve, 1.05) == 1.0
    assert shapes.share_on_curve(curve, 0.3) is None
    assert shapes.share_on_curve(None, 0.5) is None


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_published_shapes_are_valid_configurations(name, tmp_path):
    sparse = json.loads((shapes.write_config(name, tmp_path / "sparse", sparse=True) / "config.json").read_text())
    dense = json.loads((shapes.write_config(name, tmp_path / "dense", sparse=False) / "config.json").read_text())
    assert sparse["model_type"] == f"prunepath_{dense['model_type']}"
    assert sparse["architectures"] == [f"PrunePath{dense['architectures'][0]}"]
    d_ff = sparse.get("n_inner") or sparse["intermediate_size"]
    assert sparse["prunepath_config"]["num_experts"] * 32 == d_ff
    assert layer.spec_of(name).neurons == d_ff
    assert layer.spec_of(name, expert_dtype="int8").weight_bytes * 2 == layer.spec_of(name).weight_bytes


@pytest.mark.parametrize("stored", [None, *EXPERT_DTYPES])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_written_weights_make_a_checkpoint_whose_logits_have_unit_variance(family, stored, tmp_path, monkeypatch):
    gpt2 = dict(model_type="gpt2", n_embd=32, n_inner=256, n_layer=2, n_head=2, vocab_size=320, n_positions=128)
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY if family == "qwen2" else gpt2)
    folder = shapes.write_config("tiny", tmp_path / "model", sparse=True, expert_size=8, expert_dtype=stored)
    shapes.write_weights(folder)
    found = validate_checkpoint(folder, check_values=True)
    assert (found.family.name, found.prunepath.num_experts, found.prunepath.expert_dtype) == (family, 32, stored)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    routers = [module.router.weight for module in model.modules() if hasattr(module, "router")]
    x = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    for weight in routers:
        assert (x @ weight.float().T).std().item() == pytest.approx(1, abs=0.15)
    experts = [module.dequantised() for module in model.modules() if hasattr(module, "dequantised")]
    assert len(experts) == (0 if stored is None else 6 if family == "qwen2" else 4)
    assert all(weight.std().item() == pytest.approx(0.02, rel=0.1) for weight in experts)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_shape_of_a_checkpoint(prunepath_checkpoint, family):
    found = layer.spec_of(str(prunepath_checkpoint(family, expert_size=16)))
    assert (found.hidden, found.num_experts, found.expert_size) == (64, 16, 16)
    assert (found.glu, found.activation) == ((True, "silu") if family == "llama" else (False, "gelu_tanh"))


@pytest.mark.parametrize(
    ("kind", "text"), [("int", "1,,2"), ("int", "0"), ("int", "1.5"), ("float", "nan"), ("float", "-1"), ("float", "")]
)
def test_lists_of_numbers_name_what_is_wrong(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match="positive numbers separated by commas"):
        options.numbers(int if kind == "int" else float)(text)


def test_lists():
    assert options.numbers(int)("1,4,16") == [1, 4, 16]
    assert options.taus("1.0,0.5") == [1.0, 0.5]
    assert options.shares("1,0.2") == [1.0, 0.2]
    with pytest.raises(argparse.ArgumentTypeError, match=r"tau.*2\.0"):
        options.taus("0.5,2.0")
    with pytest.raises(argparse.ArgumentTypeError, match=r"shares in \(0, 1\]"):
        options.shares("1.5")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "a checkpoint or --shape"),
        (["x", "--shape", "smollm2"], "a checkpoint or --shape"),
        (["x", "--share", "0.5"], "--share"),
        (["--shape", "smollm2", "--share", "0.5", "--tau", "0.5"], "--share"),
        (["--shape", "smollm2", "--dense", "y"], "--dense"),
        (["x", "--use-beam-search"], "--use-beam-search"),
        (["x", "--output-len", "1"], "--output-len"),
        (["x", "--plot", "z.png"], "--dense"),
        (["x", "--dense-quantization", "fp8_per_channel"], "--dense-quantization: expected with --shape or --dense"),
    ],
)
def test_latency_refuses_arguments_that_make_no_sense(argv, said):
    with pytest.raises(UsageError, match=said):
        latency.parse(argv)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["x", "--model", "y"], "--model"),
        (["x", "--dense-url", "http://y"], "--dense-url"),
        (["x", "--extra-body", '{"tau": 0.5}'], "--extra-body"),
        (["x", "--extra-body", "[1]"], r"--extra-body: \[1\]; expected a JSON object"),
        (["x", "--plot", "z.png"], "--dense"),
    ],
)
def test_serve_refuses_arguments_that_make_no_sense(argv, said):
    with pytest.raises(UsageError, match=said):
        serve.parse(argv)


def test_an_encoder_is_refused(prunepath_checkpoint):
    with pytest.raises(UsageError, match=r"causal language model, got PrunePathRoberta"):
        options.causal_checkpoint(str(prunepath_checkpoint("roberta")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [("kernel",), ("tune", "qwen2-7b")], ids=lambda c: c[0])
def test_without_a_gpu_one_line_and_exit_code_1(command):
    process = prunepath("bench", *command)
    assert_one_line(process, 1, "expected one, found none")
    assert process.stdout == ""


def test_a_bad_tau_or_checkpoint_is_named_before_anything_starts(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "latency", str(tmp_path), "--tau", "3"])
    assert stopped.value.code == 2
    assert "tau must be a number in (0, 1.05], got 3.0" in capsys.readouterr().err
    for benchmark in ("latency", "serve"):
        assert cli.main(["bench", benchmark, str(tmp_path)]) == 1
        said = capsys.readouterr()
        assert "config.json" in said.err.strip().splitlines()[-1]
        assert said.out == ""


@pytest.mark.parametrize("benchmark", ["latency", "serve"])
def test_a_bad_dense_model_is_named_before_anything_starts(benchmark, prunepath_checkpoint, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for dense, named, code in (
        ("none", "no such directory", 2),
        ("file", "no such directory", 2),
        ("folder", "config.json: no such", 1),
    ):
        line = ["bench", benchmark, prunepath_checkpoint("llama"), "--dense", tmp_path / dense]
        assert cli.main([*map(str, line)]) == code
        (said,) = capsys.readouterr().err.splitlines()
        assert str(tmp_path / dense) in said
        assert named in said


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "0 tokens; expected more than 32"),
        (b"\xff\xfe", "expected a UTF-8 text file"),
        (b"word " * 40, "expected more than 512"),
    ],
)
def test_a_bad_text_is_named_before_anything_starts(content, named, prunepath_checkpoint, tmp_path, capsys):
    (tmp_path / "text.txt").write_bytes(content)
    more = ["--prefill", "512"] if b"word" in content else []
    line = ["bench", "latency", prunepath_checkpoint("llama"), "--text", tmp_path / "text.txt", *more]
    assert cli.main([*map(str, line)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert f"--text {tmp_path}/text.txt: " in said
    assert named in said


@pytest.mark.parametrize("command", ["kernel", "tune"])
def test_every_model_is_looked_at_before_any_is_measured(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(layer, "require_gpu", lambda: pytest.fail("work was begun"))
    monkeypatch.chdir(tmp_path)
    for line, named, code in (
        (["qwen2-7b", str(tmp_path / "none")], f"{tmp_path}/none: no such directory", 2),
        (["qwen2-7b", "--expert-size", "7"], "expert_size 7 does not divide the feed-forward size 18944", 1),
    ):
        assert cli.main(["bench", command, *line]) == code
        (said,) = capsys.readouterr().err.splitlines()
        assert named in said
    assert list(tmp_path.iterdir()) == []


def test_an_expert_size_of_a_shape_divides_it(capsys):
    assert cli.main(["bench", "latency", "--shape", "qwen2-7b", "--expert-size", "7"]) == 1
    assert "expert_size 7 does not divide the feed-forward size 18944" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["nonsense", "http://127.0.0.1:9/a b", "http://127.0.0.1:9"])
def test_a_server_that_is_not_there_is_named(url, prunepath_checkpoint, capsys):
    assert cli.main(["bench", "serve", str(prunepath_checkpoint("llama")), "--base-url", url]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"prunepath bench: {url}/v1/models: ")
    assert said.endswith("; expected a server there")


@pytest.mark.parametrize(("error", "dtype"), [(2e-2, "bfloat16"), (2e-3, "float32"), (math.inf, "float16")])
def test_a_wrong_layer_gives_no_speed(error, dtype):
    with pytest.raises(BenchmarkError, match="no speed is reported"):
        report.judge_layer([[[1e-4, dtype]], None, [[1e-2, "float8"], [error, dtype]]])


def test_the_worst_worker_counts():
    assert report.judge_layer([[[1e-4, "float32"]], [[3e-4, "float32"]]]) == 3e-4
    assert report.judge_layer([None]) is None


def test_no_server_is_named():
    with pytest.raises(BenchmarkError, match=r"http://127.0.0.1:9/v1/models: .*expected a server there"):
        server.ask("http://127.0.0.1:9", "/v1/models")


def row(tau: float | None, batch: int, step: float, share: float | None = None) -> dict:
    return dict(tau=tau, share=share, batch_size=batch, decode_step_ms=step, avg_latency=step / 10)


def latency_result() -> dict:
    return {
        "model": "m",
        "dense": {
            "rows": [row(None, 1, 4.0), row(None, 4, 5.0)],
            "prefill": [dict(tau=None, share=None, prefill_ms=9, tokens=99)],
        },
        "sparse": {
            "layer_error": 1e-3,
            "rows": [row(1.0, 1, 5.0, 1.0), row(1.0, 4, 5.0, 1.0), row(0.5, 1, 2.0, 0.3), row(0.5, 4, 4.0, 0.3)],
            "prefill": [dict(tau=0.5, share=0.3, prefill_ms=3.0, tokens=99)],
        },
    }


@pytest.mark.parametrize(
    ("policy", "mode"),
    [(None, "exact"), ({"min_tau": 0.5}, "exact"), ({"mode": "at_least"}, "at_least")],
)
def test_latency_writes_what_it_measured(policy, mode, tmp_path, monkeypatch):
    def engines(argv, parts, *, together):
        for engine, part in parts.items():
            part.write_text(json.dumps(latency_result()[engine]))
        return 0

    monkeypatch.setattr(latency, "_run_engines", engines)
    file = tmp_path / "out.json"
    line = ["--shape", "smollm2", "--expert-size", "8", "--router-input", "attention", "--output", str(file)]
    more = [] if policy is None else ["--additional-config", json.dumps({"prunepath": policy})]
    assert latency.run([*line, *more]) == 0
    written = json.loads(file.read_text())
    found = {name: written[name] for name in ("model", "expert_size", "router_input", "mode")}
    assert found == dict(model="smollm2", expert_size=8, router_input="attention", mode=mode)


def test_latency_tables():
    lines = latency.tables(latency_result()).splitlines()
    assert lines[0] == "m: routed layer within 1.0e-03 (relative RMS) of float32"
    i = lines.index("decode step, ms")
    assert [line.split() for line in lines[i + 1 : i + 5]] == [
        ["tau", "share", "batch", "1", "batch", "4"],
        ["dense", "4.000", "5.000"],
        ["1", "1.00", "5.000", "0.80x", "5.000", "1.00x"],
        ["0.5", "0.30", "2.000", "2.00x", "4.000", "1.25x"],
    ]
    assert lines[-1].split() == ["0.5", "0.30", "3.0", "3.00x"]
    assert "400.000" in lines[lines.index("average latency, ms") + 2]


def test_latency_tables_without_a_dense_model():
    result = latency_result()
    del result["dense"]
    assert "x" not in latency.tables(result).split("decode step, ms")[1].replace("prefill", "")
    assert latency.speedups(result) == {}


def test_latency_speedups():
    assert latency.speedups(latency_result()) == {
        "batch 1": [(1.0, 0.8), (0.3, 2.0)],
        "batch 4": [(1.0, 1.0), (0.3, 1.25)],
    }


def test_serve_table_ratios_above_1_are_better_than_dense():
    dense = dict.fromkeys(serve.METRICS, 10.0)
    ours = {**dense, "output_throughput": 20.0, "median_tpot_ms": 5.0, "p99_ttft_ms": 40.0}
    lines = serve.table([dict(tau=None, result=dense), dict(tau=0.5, result=ours)]).splitlines()
    assert lines[0].split() == ["dense", "tau", "0.5"]
    cells = {line.split("  ")[0]: line.split()[-2:] for line in lines[1:]}
    assert cells["output tokens/s"] == ["20.00", "2.00x"]
    assert cells["TPOT median, ms"] == ["5.00", "2.00x"]
    assert cells["TTFT p99, ms"] == ["40.00", "0.25x"]


def test_kernel_table():
    rows = [dict(tokens=1, share=s, path="fused", us=us, dense_us=100.0) for s, us in [(1.0, 100.0), (0.2, 40.0)]]
    assert kernel.table(rows).splitlines()[1].split() == ["1", "fused", "100.0", "100.0", "1.00x", "40.0", "2.50x"]


def test_versions_say_what_figures_depend_on():
    found = report.versions()
    assert {"torch", "triton", "vllm", "prunepath_vllm"} <= found.keys()
    assert (found["vllm"] or "").startswith("0.32")
    assert ("gpu" in found) == torch.cuda.is_available()
    assert found.get("gpu") or found["cpu"]


def test_plot_is_a_png(tmp_path):
    report.plot_speedups(tmp_path / "plot.png", "title", {"batch 1": [(1.0, 1.0), (0.2, 1.7)]})
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_own_tables_come_before_the_shipped_ones(tmp_path: Path, monkeypatch):
    rows = ffn.tuning_to_json(ffn.heuristic_tuning(LayerSpec(64, 4, 8, torch.bfloat16)))[:1]
    qwen, larger = (LayerSpec(*shape, 32, torch.bfloat16) for shape in ((3584, 592), (5120, 864)))
    file = tmp_path / ffn.table_name("NVIDIA H200")
    file.write_text(json.dumps({ffn.shape_key(qwen): rows}))
    monkeypatch.setenv(ffn.TUNING_DIR, str(tmp_path))
    load = ffn.load_tuning.__wrapped__
    assert ffn.tuning_to_json(load("NVIDIA H200", qwen)) == rows
    shipped = load("NVIDIA H200", larger)  # a shape that our file does not have
    file.write_text(json.dumps({"H3584_E592_D32_glu": rows}))
    with pytest.raises(ConfigError, match="H3584_E592_D32_glu: a table without a dtype"):
        load("NVIDIA H200", qwen)
    monkeypatch.delenv(ffn.TUNING_DIR)
    assert shipped == load("NVIDIA H200", larger)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    "spec",
    [
        *(LayerSpec(1024, 96, size, torch.bfloat16) for size in (8, 16, 64)),
        LayerSpec(768, 40, 4, torch.bfloat16, Activation.RELU, glu=False),
        LayerSpec(1024, 96, 32, torch.bfloat16, expert_dtype=torch.int8),
        LayerSpec(1024, 96, 32, torch.bfloat16, expert_dtype=torch.float8_e4m3fn),
    ],
    ids=["size8", "size16", "size64", "size4-relu-bias", "int8", "float8"],
)
def test_every_path_is_right_at_other_expert_sizes(spec):
    """CPU counterpart: test_kernels_interpreted.py."""
    bench = Bench(spec, 2)
    for tokens in (1, 5, 64, 1500):
        choices = {path: start_choice(spec, tokens, path) for path in paths_for(tokens)}
        checks: list[dict] = []
        assert layer.check_all(bench, choices, tokens, checks).keys() == choices.keys(), checks
