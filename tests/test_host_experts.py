"""Experts in host memory: where what lies, the copy ahead, the order of use, the policy. On a GPU: test_gpu.py."""

import contextlib
import gc
import itertools
import re
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import naive
import pytest
import torch
from fake_driver import FakeDriver, Result
from naive import load_naive, naive_logits
from safetensors.torch import load_file
from test_engine import assert_naive, run_engine
from tiny_models import LAYERS, block

from prunepath_vllm.checkpoint import validate_checkpoint
from prunepath_vllm.config import PrunePathConfig
from prunepath_vllm.conversion.cold import record_usage
from prunepath_vllm.conversion.text import read_sequences
from prunepath_vllm.entrypoints import cli
from prunepath_vllm.entrypoints.commands import check
from prunepath_vllm.errors import ConfigError, TauError, UnsupportedFeatureError, UsageError
from prunepath_vllm.kernels import ffn, split_memory
from prunepath_vllm.kernels.host_experts import HostExperts
from prunepath_vllm.kernels.layer import LayerSpec, Weights
from prunepath_vllm.kernels.split_memory import GRAIN, Grains, Range, Staging, resident_grains, split_range
from prunepath_vllm.modeling import load_tokenizer

pytestmark = pytest.mark.usefixtures("registered")

SIZE, EXPERTS, TAU = 16, 16, 0.3


@pytest.fixture
def driver(monkeypatch):
    """A driver whose GPU memory is this process's."""
    fake = FakeDriver()
    monkeypatch.setattr(split_memory, "_driver", lambda: fake)
    monkeypatch.setattr(Range, "bytes", lambda part: fake.bytes_of(part))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    yield fake
    gc.collect()
    assert not fake.physical
    assert not fake.reserved


@pytest.mark.parametrize(
    ("nbytes", "parts", "resident", "grains"),
    [
        (4 * GRAIN, 1, 2 * GRAIN, [True, True, False, False]),
        (4 * GRAIN, 1, 2 * GRAIN + 1, [True, True, True, False]),
        (4 * GRAIN - 1, 1, 0, [False] * 4),
        (4 * GRAIN, 1, 4 * GRAIN, [True] * 4),
        (8 * GRAIN, 2, GRAIN, [True, False, False, False, True, False, False, False]),
        (7 * GRAIN, 2, GRAIN, [True, False, False, True, True, False, False]),  # a part begins within a grain
        (100, 2, 10, [True]),
    ],
)
def test_a_grain_that_holds_a_resident_expert_lies_on_the_gpu(nbytes, parts, resident, grains):
    assert resident_grains(nbytes, parts, resident) == grains


def test_a_split_range_is_one_tensor_and_a_second_view_shares_what_is_resident(driver):
    source = split_range([True, False, False, True], 0)
    assert [(one.size // GRAIN, one.on_host) for one in source.grains] == [(1, False), (2, True), (1, False)]
    assert Grains.held(on_host=True) == 2 * GRAIN
    content = torch.randint(256, (4 * GRAIN,), dtype=torch.uint8)
    source.bytes().copy_(content)
    staging = Staging(0)
    (view,) = staging.resident([source])
    assert Grains.held(on_host=False) == 4 * GRAIN  # two resident, two that stand in
    assert torch.equal(view.bytes()[:GRAIN], content[:GRAIN])
    assert torch.equal(view.bytes()[3 * GRAIN :], content[3 * GRAIN :])
    for place in source.host_places():
        view.bytes()[place].copy_(source.bytes()[place])
    assert torch.equal(view.bytes(), content)
    source.bytes()[0] += 1  # the same memory
    assert view.bytes()[0] == source.bytes()[0]
    kept = source.tensor((2, GRAIN // 2), torch.bfloat16)
    del source, view, staging
    gc.collect()
    assert len(driver.reserved) == 1  # the tensor keeps its own
    assert kept.shape == (2, GRAIN // 2)


def test_too_little_memory_and_a_driver_without_it_are_one_error_each(driver, monkeypatch):
    driver.host_limit = 3 * GRAIN
    with pytest.raises(ConfigError, match=r"0\.01 GiB of pinned host memory for experts: the driver has not so much"):
        split_range([True] + [False] * 4, 0)
    monkeypatch.setattr(FakeDriver, "cuMemCreate", lambda *_: (Result.CUDA_ERROR_NOT_SUPPORTED, None))
    with pytest.raises(UnsupportedFeatureError, match=r"cuMemCreate failed \(CUDA_ERROR_NOT_SUPPORTED\)"):
        split_range([True], 0)


def make_layers(host: HostExperts, count: int) -> list[tuple[Weights, list[torch.Tensor]]]:
    """Layers of GLUs with 16 experts of 32 neurons of 4,096 hidden units, and what was written to them."""
    layers = []
    for _ in range(count):
        rows, resident = 16 * 32, host.resident(16) * 32
        w_in = host.empty((2 * rows, 4096), torch.bfloat16, parts=2, resident_rows=resident)
        w_out = host.empty((rows, 4096), torch.bfloat16, parts=1, resident_rows=resident, first=w_in)
        content = [torch.randn(one.shape).bfloat16() for one in (w_in, w_out)]
        for weight, drawn in zip((w_in, w_out), content, strict=True):
            weight.copy_(drawn)
        layers.append((Weights(w_in, None, w_out, None), content))
    return layers


@pytest.mark.parametrize("share", [0.5, 0.8, 1.0])
def test_layers_are_brought_whole_in_any_mixture_of_steps(driver, share):
    host = HostExperts(share)
    layers = make_layers(host, 5)
    on_host = Grains.held(on_host=True)
    assert on_host == 5 * 3 * GRAIN * {0.5: 1, 0.8: 1, 1.0: 2}[share]  # 4 MiB a part, of which whole grains
    assert all(HostExperts.of(weights.w_in) is host for weights, _ in layers)
    assert HostExperts.of(torch.zeros(1)) is None
    # Steps with the copy ahead and without, the first layer alone (as kernels are compiled), and ones cut short.
    for ahead, count in [(True, 5), (True, 1), (False, 5), (True, 5), (True, 3), (False, 1), (True, 5)]:
        for weights, content in itertools.islice(layers, count):
            brought = host.bring(weights, ahead=ahead)
            assert torch.equal(brought.w_in, content[0])
            assert torch.equal(brought.w_out_t, content[1])
            assert torch.equal(weights.w_in, content[0])
    assert Grains.held(on_host=True) == on_host
    # Two layers' worth of GPU memory stands in for what all have on the host.
    assert Grains.held(on_host=False) == 5 * 6 * GRAIN - on_host + on_host * 2 // 5


def test_a_copy_is_begun_once_a_layer_and_a_step(driver, monkeypatch):
    host, begun = HostExperts(0.5), []
    layers = make_layers(host, 3)
    order = {id(layer): number for number, layer in enumerate(host._layers)}
    copy = HostExperts._begin_copy
    monkeypatch.setattr(HostExperts, "_begin_copy", staticmethod(lambda *a: begun.append(order[id(a[0])]) or copy(*a)))
    for _ in range(2):
        for weights, _ in layers:
            host.bring(weights, ahead=True)
    assert begun == [0, 1, 2] * 2


@pytest.fixture(scope="module")
def used(prunepath_checkpoint, text, tmp_path_factory):
    """``used(family, **options)``: a checkpoint, and a copy that knows how its experts are used."""

    def get(family, **options):
        source = prunepath_checkpoint(family, expert_size=SIZE, router_scale=0.1, **options)
        folder = tmp_path_factory.mktemp("used") / family
        shutil.copytree(source, folder)
        record_usage(folder, text, tau=TAU, max_tokens=512)
        return source, folder

    return get


def test_usage_is_what_the_naive_model_counts_and_changes_no_tensor(used, text, monkeypatch):
    source, path = used("llama", dense_positions=2)
    before, after = (load_file(one / "model.safetensors") for one in (source, path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert block(source)["format_version"] == 1
    assert block(path)["format_version"] == 2
    assert {name: block(path)[name] for name in block(source)} | {"format_version": 1} == block(source)
    usage = validate_checkpoint(path).prunepath.expert_usage
    assert (usage.text, usage.tau) == (text.name, TAU)
    assert len(usage.shares) == LAYERS
    assert all(len(row) == EXPERTS for row in usage.shares)
    assert usage.hottest(1.0) == pytest.approx(1.0)
    assert 0.5 < usage.hottest(0.5) <= 1
    model, seen = load_naive(source), []
    choose = naive.active_experts
    monkeypatch.setattr(naive, "active_experts", lambda *a, **k: seen.append(choose(*a, **k)) or seen[-1])
    sequences = read_sequences(load_tokenizer(source), text, length=512, max_tokens=512)
    counts = torch.zeros(LAYERS, EXPERTS)
    for sequence in sequences:
        seen.clear()
        naive_logits(model, sequence.tolist(), TAU)
        for call, active in enumerate(seen):
            layer, position = divmod(call, len(sequence))
            if position >= 2:
                counts[layer, active] += 1
    assert usage.tokens == sequences[:, 2:].numel()
    torch.testing.assert_close(torch.tensor(usage.shares), counts / usage.tokens, atol=2e-2, rtol=0)


def test_the_engine_holds_the_most_used_experts_first_and_gives_the_same_tokens(used):
    _, path = used("qwen2", router_bias=True)
    prunepath = validate_checkpoint(path).prunepath
    orders = [prunepath.order_by_use(layer) for layer in range(LAYERS)]
    for order, shares in zip(orders, prunepath.expert_usage.shares, strict=True):
        assert order != sorted(order)
        assert [shares[expert] for expert in order] == sorted(shares, reverse=True)
    result = run_engine("decoder", path)
    assert_naive(result["mixed"], path, default_tau=prunepath.default_tau)
    assert [row["tokens"] for row in result["mixed"]] == [row["tokens"] for row in result["lone"]]


def test_those_that_are_kept_come_first():
    usage = dict(text="a", tokens=4, tau=0.5, shares=[[0.25, 0.5, 0.5, 0.75, 0.0]])
    prunepath = PrunePathConfig.parse(
        dict(
            format_version=2, num_experts=5, expert_size=2, gate="none", split=dict(method="random", seed=0),
            default_tau=0.5, expert_usage=usage, kept_experts=[[0, 1, 2]], max_tau=0.5,
        )
    )  # fmt: skip
    assert prunepath.order_by_use(0) == [1, 2, 0, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (dict(tau=1.0), UsageError, "usage tau: 1.0; expected a number in (0, 1)"),
        (dict(tau=0.0), TauError, "usage tau"),
        (dict(tau=0.5, text="missing.txt"), UsageError, "missing.txt"),
        (dict(tau=0.5, max_tokens=100), UsageError, "max tokens: 100; expected at least 512"),
    ],
    ids=str,
)
def test_usage_is_refused_before_anything_is_written(prunepath_checkpoint, text, tmp_path, arguments, error, said):
    path = prunepath_checkpoint("llama", expert_size=SIZE, router_scale=0.1)
    before = (path / "config.json").read_text()
    with pytest.raises(error, match=re.escape(said)):
        record_usage(path, **{"text": text, **arguments})
    assert (path / "config.json").read_text() == before


def test_the_command_records_and_says_how_uneven_uses_are(prunepath_checkpoint, text, tmp_path, capsys):
    path = tmp_path / "checkpoint"
    shutil.copytree(prunepath_checkpoint("llama", expert_size=SIZE, router_scale=0.1), path)
    assert cli.main(["calibrate", str(path), "--text", str(text), "--usage-at", "0.3", "--max-tokens", "512"]) == 0
    said = capsys.readouterr().out
    usage = validate_checkpoint(path).prunepath.expert_usage
    assert f"{text.name}, {usage.tokens} tokens at tau 0.3" in said
    assert f"50%  {usage.hottest(0.5):.1%}" in said
    assert cli.main(["calibrate", str(path), "--text", str(text), "--usage-at", "0.3", "--context", "64"]) == 2
    assert "--context 64: expected none with --usage-at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ({"host_experts": 1.5}, "host_experts: expected a share from 0 to 1, got 1.5"),
        ({"host_experts": True}, "host_experts: expected a share from 0 to 1, got True"),
        ({"host_experts": "half"}, "host_experts: expected a share from 0 to 1, got 'half'"),
        ({"gpu_expert_gib": 0}, "gpu_expert_gib: expected a number of GiB above 0, got 0"),
        ({"gpu_expert_gib": 4, "host_experts": 0.5}, "gpu_expert_gib: 4 with host_experts 0.5; expected one"),
        ({"host_experts": 0.5}, "do not go with a cpu: its memory is the host's"),
        ({"gpu_expert_gib": 4.0}, "do not go with a cpu: its memory is the host's"),
    ],
    ids=str,
)
def test_a_policy_that_cannot_be_kept_is_refused_by_name(prunepath_checkpoint, policy, said):
    from vllm.engine.arg_utils import EngineArgs

    path = prunepath_checkpoint("llama", default_tau=0.6)
    with pytest.raises(ValueError, match=re.escape(said)):
        EngineArgs(model=str(path), additional_config={"prunepath": policy}).create_engine_config()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config: setattr(config.model_config, "enable_sleep_mode", True), "sleep mode (--enable-sleep-mode)"),
        (lambda config: setattr(config.offload_config.uva, "cpu_offload_gb", 4), "vLLM's own offload"),
        (lambda config: setattr(config.offload_config.prefetch, "offload_group_size", 4), "vLLM's own offload"),
    ],
    ids=["sleep", "uva", "prefetch"],
)
def test_other_ways_of_moving_weights_are_refused_by_name(monkeypatch, prunepath_checkpoint, change, said):
    from vllm.engine.arg_utils import EngineArgs

    from prunepath_vllm.model_executor import engine_config

    config = EngineArgs(model=str(prunepath_checkpoint("llama", default_tau=0.6))).create_engine_config()
    monkeypatch.setattr(engine_config, "current_platform", SimpleNamespace(device_type="cuda"))
    engine_config._refuse_with_host_experts(config)
    change(config)
    with pytest.raises(UnsupportedFeatureError, match=re.escape(said)):
        engine_config._refuse_with_host_experts(config)


def test_small_layers_stay_sparse_where_what_they_read_comes_from_the_host():
    spec = LayerSpec(512, 64, 32, torch.bfloat16)
    assert spec.weight_bytes < ffn.SMALL_LAYER
    paths = [
        [ffn.load_tuning("a GPU without a table", one).choice(tokens).path for tokens in (1, 4, 16, 8192)]
        for one in (spec, replace(spec, resident=32))
    ]
    assert paths == [["dense"] * 4, ["fused", "split", "dense", "grouped"]]


def test_a_memory_target_becomes_a_share():
    from prunepath_vllm.model_executor.operator_policy import OperatorPolicy

    policy = OperatorPolicy(default_tau=1.0, full_queue=1, gpu_expert_gib=3)
    assert policy.host_share(12 << 30) == 0.75
    assert policy.host_share(2 << 30) == 0
    assert OperatorPolicy(default_tau=1.0, full_queue=1, host_experts=0.5).host_share(12 << 30) == 0.5


def test_check_says_how_fast_a_gpu_reads_the_host(monkeypatch, tmp_path):
    for number, (speed, width) in enumerate([("32.0 GT/s PCIe", 16), ("16.0 GT/s PCIe", 8), (None, None)]):
        bus = f"0000:4{number}:00.0"
        (tmp_path / "driver" / bus).mkdir(parents=True)
        (tmp_path / "driver" / bus / "information").write_text("Model: \t NVIDIA H200\n")
        if speed is not None:
            (tmp_path / "pci" / bus).mkdir(parents=True)
            (tmp_path / "pci" / bus / "max_link_speed").write_text(f"{speed}\n")
            (tmp_path / "pci" / bus / "max_link_width").write_text(f"{width}\n")
    monkeypatch.setattr(check, "_DRIVER", tmp_path / "driver")
    monkeypatch.setattr(check, "_PCI", tmp_path / "pci")
    monkeypatch.setattr(check, "_version", lambda package: "13.0.3")
    assert check._gpus() == ["NVIDIA H200"] * 3
    links = "PCIe 32.0 GT/s x16, about 55 GB/s, PCIe 16.0 GT/s x8, about 14 GB/s, PCIe unknown"
    assert check._host_links() == f"{links} (cuda-bindings 13.0.3)"
    monkeypatch.setattr(check, "_version", lambda package: check._ABSENT)
    assert check._host_links() == "not here: cuda-bindings is not installed"


def test_the_module_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    split_memory._driver.cache_clear()
    with pytest.raises(UnsupportedFeatureError, match="needs the package cuda-bindings"):
        split_memory._driver()
