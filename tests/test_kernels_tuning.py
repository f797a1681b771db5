"""Which path a batch size takes, and tables in JSON. Triton launches nothing here."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.jit import JITFunction

from prunepath_vllm.benchmarks.tile_search import pick, taus_for, write_table
from prunepath_vllm.errors import ConfigError
from prunepath_vllm.kernels import common, ffn, quantised, reference
from prunepath_vllm.kernels.decode import FusedConfig, UpConfig
from prunepath_vllm.kernels.ffn import Choice, Tuning, heuristic_tuning, load_tuning, tuning_from_json, tuning_to_json
from prunepath_vllm.kernels.grouped import GroupedConfig
from prunepath_vllm.kernels.layer import Counters, LayerSpec, RouterWeights, RoutingRule, Weights, dtype_name
from prunepath_vllm.kernels.routing import RouterConfig


def spec(hidden, num_experts, expert_size=32, *, glu=True, dtype=torch.bfloat16):
    return LayerSpec(hidden, num_experts, expert_size, dtype, glu=glu)


TABLE = Tuning(
    (
        (1, Choice("fused", 1, RouterConfig(select="pairwise"), fused=FusedConfig(1, 8, 2, 2))),
        (16, Choice("split", 2, RouterConfig(split_k=7), up=UpConfig(32, 64, 8, 3, 2))),
        (64, Choice("dense", 0, RouterConfig(split_k=4))),
        (8192, Choice("grouped", 0, grouped=GroupedConfig(256, 64, 8, 3, 4))),
    )
)


@pytest.mark.parametrize(
    ("tokens", "path"),
    [(1, "fused"), (2, "split"), (16, "split"), (17, "dense"), (64, "dense"), (65, "grouped"), (9000, "grouped")],
)
def test_choice_by_batch_size(tokens, path):
    assert TABLE.choice(tokens).path == path


def test_json_round_trip():
    assert tuning_from_json(json.loads(json.dumps(tuning_to_json(TABLE)))) == TABLE


def test_unknown_path_is_named():
    with pytest.raises(AssertionError, match="unknown path 'magic'"):
        tuning_from_json([{"max_tokens": 1, "path": "magic", "pdl": 0}])


def test_tables_are_added_to_a_file(tmp_path):
    file = str(tmp_path / "table.json")
    write_table(file, spec(64, 4, 8), TABLE)
    write_table(file, spec(64, 4, 8, glu=False), heuristic_tuning(spec(64, 4, 8, glu=False)))
    write_table(file, spec(64, 4, 8, dtype=torch.float16), TABLE)
    tables = json.loads((tmp_path / "table.json").read_text())
    write_table(file, replace(spec(64, 4, 8), expert_dtype=torch.int8), TABLE)
    assert json.loads((tmp_path / "table.json").read_text()).keys() - tables == {"H64_E4_D8_glu_bfloat16_int8"}
    assert set(tables) == {"H64_E4_D8_glu_bfloat16", "H64_E4_D8_plain_bfloat16", "H64_E4_D8_glu_float16"}
    assert tuning_from_json(tables["H64_E4_D8_glu_bfloat16"]) == TABLE


def test_shipped_tables_load():
    qwen = spec(3584, 592)
    shipped = load_tuning("NVIDIA H200", qwen)
    assert shipped != heuristic_tuning(qwen)
    assert load_tuning("NVIDIA H200", replace(qwen, dtype=torch.float16)) == shipped
    limits = [limit for limit, _ in shipped.choices]
    assert limits == sorted(limits)
    assert load_tuning("Some other GPU", qwen) == heuristic_tuning(qwen)


@pytest.mark.parametrize(
    ("hidden", "experts", "glu", "paths"),
    [
        (3584, 592, True, {1: "fused", 2: "split", 8: "split", 9: "dense", 4095: "dense", 4096: "grouped"}),
        (5120, 864, True, {1: "fused", 2: "split", 8: "split", 9: "dense", 4095: "dense", 4096: "grouped"}),
        (1024, 128, False, {1: "fused", 2: "dense", 4096: "dense", 1 << 20: "dense"}),
    ],
    ids=["qwen2-7b", "qwen2.5-32b", "gpt2-medium"],
)
def test_shipped_paths(hidden, experts, glu, paths):
    tuning = load_tuning("NVIDIA H200", spec(hidden, experts, glu=glu))
    assert {tokens: tuning.choice(tokens).path for tokens in paths} == paths
    assert tuning.choice(1).router.select == "pairwise"
    assert tuning.choice(64).router.select == "radix"
    if glu:
        assert {t: heuristic_tuning(spec(hidden, experts)).choice(t).path for t in paths} == paths
        assert tuning.choice(4).router.select == "pairwise"


@pytest.mark.parametrize(
    ("hidden", "experts", "glu"), [(576, 48, True), (1536, 280, True), (1024, 128, False)], ids=["135m", "1.5b", "gpt2"]
)
def test_small_layers_without_a_table_are_dense(hidden, experts, glu):
    tuning = load_tuning("Some other GPU", spec(hidden, experts, glu=glu))
    assert {tuning.choice(tokens).path for tokens in (1, 4, 64, 4095, 9000)} == {"dense"}
    exact = load_tuning("Some other GPU", spec(hidden, experts, glu=glu, dtype=torch.float32))
    assert [exact.choice(tokens).path for tokens in (1, 4, 64, 9000)] == ["fused", "split", "dense", "dense"]


@pytest.mark.parametrize(
    ("hidden", "experts", "size"), [(4096, 896, 16), (5120, 1728, 16), (4096, 1792, 8), (5120, 3456, 8)]
)
def test_small_experts_are_sparse_for_one_token(hidden, experts, size):
    """Llama-3-8B and Qwen2.5-32B, with their shipped tables and without."""
    small = LayerSpec(hidden, experts, size, torch.bfloat16)
    for gpu in ("NVIDIA H200", "Some other GPU"):
        tuning = load_tuning(gpu, small)
        assert tuning.choice(1).path == "fused"
        assert tuning.choice(1).router.select == "pairwise"
        assert {tuning.choice(tokens).path for tokens in (16, 64, 4095, 9000)} == {"dense"}
        sparse = gpu == "NVIDIA H200" and (hidden, size) == (5120, 8)
        assert tuning.choice(4).path == ("split" if sparse else "dense")
    on_host = load_tuning("Some other GPU", replace(small, resident=experts // 2))
    assert on_host.choice(4).path == "split"


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_quantised_layers_have_tables_of_their_own(stored):
    """One is shipped in float8; a layer's size is what is stored."""
    qwen, llama = spec(3584, 592), spec(4096, 448)
    small, large = (replace(one, expert_dtype=stored) for one in (llama, spec(5120, 864)))
    quantised = replace(qwen, expert_dtype=stored)
    found = load_tuning("NVIDIA H200", quantised)
    assert found != load_tuning("NVIDIA H200", qwen)
    assert (found == heuristic_tuning(quantised)) == (stored == torch.int8)
    assert small.weight_bytes * 2 == llama.weight_bytes < 400_000_000
    assert {load_tuning("Some other GPU", small).choice(tokens).path for tokens in (1, 4, 9000)} == {"dense"}
    assert load_tuning("Some other GPU", llama).choice(1).path == "fused"
    for one, rows, stages in ((small, 4, 2), (large, 2, 2)):
        found = heuristic_tuning(one).choice(1).fused
        assert (found.rows, found.num_stages, found.num_warps, found.programs_per_sm) == (rows, stages, 8, 2)


def test_a_layer_as_a_string_is_that_layer_again():
    for layer in (
        spec(64, 4),
        replace(spec(64, 4, glu=False, dtype=torch.float16), expert_dtype=torch.int8, quantise_activations=False),
        replace(spec(64, 4), rule=RoutingRule("threshold", 0.5, "sigmoid"), at_least=True),
    ):
        assert LayerSpec.decode(layer.encode()) == layer


@pytest.mark.parametrize(("hidden", "stages"), [(576, 4), (3584, 4), (5120, 2), (8192, 2)])
def test_heuristic_fits_shared_memory(hidden, stages):
    assert heuristic_tuning(spec(hidden, 592)).choice(1).fused.num_stages == stages


ADA = 99 * 1024


@pytest.mark.parametrize(
    ("layer", "stages"),
    [
        (spec(3584, 592), (3, 6, 9, 3)),
        (spec(3584, 592, dtype=torch.float16), (3, 6, 9, 3)),
        (spec(5120, 864), (2, 6, 9, 3)),
        (spec(3584, 592, dtype=torch.float32), (2, 3, 4, 3)),
        (spec(2048, 256, dtype=torch.float32), (3, 3, 4, 3)),
        (replace(spec(3584, 592), expert_dtype=torch.float8_e4m3fn), (2, 6, 9, 3)),
    ],
)
def test_heuristic_fits_the_shared_memory_of_the_gpu(layer, stages):
    """Compiled with this much in test_kernels_compiled.py."""
    tuning = heuristic_tuning(layer, ADA)
    one, few, many = tuning.choice(1), tuning.choice(2), tuning.choices[-1][1]
    got = (one.fused.num_stages, few.up.num_stages, few.down.num_stages, many.grouped.num_stages)
    assert got[:3] == stages[:3]
    assert many.path != "grouped" or got[3] == stages[3]
    name = "A GPU without a table"
    assert load_tuning(name, layer, ADA) == tuning
    assert load_tuning(name, layer, 1 << 15).choice(1).fused.num_stages == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("stored", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("glu", [True, False])
def test_heuristic_is_the_same_from_an_a100_on(dtype, stored, glu):
    """Whose shared memory is the least that nothing is cut for, as it was before anything was."""
    for hidden in (64, 576, 1024, 2048, 3584, 5120, 8192, 16384, 20000):
        for size in (1, 8, 32, 48, 64):
            layer = replace(spec(hidden, 128, size, glu=glu, dtype=dtype), expert_dtype=stored)
            room = 1 << 30
            uncut = heuristic_tuning(layer, room)
            assert all(heuristic_tuning(layer, kib * 1024) == uncut for kib in (163, 227))
            wide = 1 if dtype.itemsize == 2 else 2
            few = uncut.choice(4)
            assert (few.up.num_stages, few.down.num_stages) == (6 // wide, 9 // wide)


def test_a_gpus_choices_depend_on_its_shared_memory(monkeypatch):
    def properties(device):
        return SimpleNamespace(shared_memory_per_block_optin=ADA)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L40S")
    common.shared_memory.cache_clear()
    layer, device = spec(3584, 592), torch.device("cuda")
    assert ffn.tuning_for(device, layer) == heuristic_tuning(layer, ADA)
    assert ffn.tuning_for(device, layer) != heuristic_tuning(layer)
    common.shared_memory.cache_clear()


def test_a_table_that_does_not_fit_is_named_at_the_start(monkeypatch):
    """Of another GPU: the engine's first call of each kernel fails, and says which."""
    from prunepath_vllm.model_executor.layers import routed_ffn

    class Layer:
        """An engine's routed layer, whose kernels for one token are too large."""

        spec, dense_step = spec(64, 4), torch.zeros(1)
        tau = SimpleNamespace(is_cuda=True, device="cpu")

        def __call__(self, x, *_):
            if len(x) == 1:
                raise ffn.OutOfResources(147612, ADA, "shared memory")

    layer, router = Layer(), SimpleNamespace(routes_by_attention=False)
    monkeypatch.setattr(routed_ffn, "first_layer", lambda model: [layer, router, None, None])
    monkeypatch.setattr(ffn, "tuning_for", lambda device, layer: TABLE)
    message = "of the fused path at 1 tokens: 147612 of shared memory; expected at most this GPU's 101376: make its"
    with pytest.raises(ConfigError, match=message):
        routed_ffn.compile_kernels(None, 8)


def test_pick_is_never_much_slower_than_dense():
    assert pick({"split": [103.0, 50.0, 40.0], "dense": [101.0, 101.0, 101.0]}, 100.0) == "split"
    assert pick({"split": [120.0, 50.0, 40.0], "dense": [101.0, 101.0, 101.0]}, 100.0) == "dense"
    assert pick({"split": [120.0, 50.0, 40.0], "dense": [106.0, 106.0, 106.0]}, 100.0) == "dense"


def test_host_dense_skips_routing(monkeypatch):
    """All tokens dense and no gate: no router, and every expert counted and read."""
    monkeypatch.setattr(ffn, "dense_ffn", lambda x, weights, spec: x + 1)
    weights = Weights(torch.empty(80, 16), None, torch.empty(40, 16), None)
    counts, read = torch.tensor([1, 2], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    x = torch.zeros(2, 16)
    y = ffn.routed_ffn(
        x, torch.ones(2), RouterWeights(torch.zeros(5, 16)), weights, spec(16, 5, 8, dtype=torch.float32),
        tuning=TABLE, counters=Counters(counts, read), host_dense=True,
    )  # fmt: skip
    assert torch.equal(y, x + 1)
    assert counts.tolist() == [6, 7]
    assert read.tolist() == [8]


@pytest.mark.parametrize(
    "layer",
    [
        spec(3584, 592),
        spec(5120, 864),
        spec(1024, 128, glu=False),
        spec(576, 384, 4),
        spec(64, 12, 3, dtype=torch.float32),
        replace(spec(3584, 592), expert_dtype=torch.int8),
        replace(spec(1024, 128, glu=False), expert_dtype=torch.float8_e4m3fn),
    ],
    ids=["qwen2-7b", "qwen2.5-32b", "gpt2-medium", "smollm2", "float32", "int8", "float8"],
)
@pytest.mark.parametrize("gate", ["none", "sigmoid"])
@pytest.mark.parametrize("at_least", [False, True], ids=["exact", "at-least"])
def test_warm_up_compiles_the_kernels_of_every_batch_size(monkeypatch, layer, gate, at_least):
    """GPU counterpart: test_gpu.py, where the engine tells of kernels compiled while it serves."""
    compiled: set = set()

    def record(self, *args, grid, warmup, **options):
        compiled.add((self.fn.__name__, specialised(self, args, options)))

    monkeypatch.setattr(JITFunction, "run", record)
    monkeypatch.setattr(quantised, "num_sms", lambda device: 132)
    layer = replace(layer, rule=RoutingRule(gate=gate), at_least=at_least)
    tuning = load_tuning("NVIDIA H200", layer)

    def run(sizes) -> set:
        compiled.clear()
        for size in sizes:
            for host_dense in (True, False):
                run_on_nothing(layer, tuning, size, host_dense)
        return set(compiled)

    warm_up = ffn.warm_up_tokens(tuning, 8192)
    assert len(warm_up) < 20
    assert run([*range(1, 300), 511, 2048, 2049, 4095, 4096, 5000, 8191, 8192]) == run(warm_up)
    assert all(size <= 5 for size in ffn.warm_up_tokens(tuning, 5))
    assert run(range(1, 6)) == run(ffn.warm_up_tokens(tuning, 5))


def specialised(kernel: JITFunction, args: tuple, options: dict) -> tuple:
    """What of a call Triton compiles a kernel for."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | options
    key: list = []
    for parameter in kernel.params:
        value = values.pop(parameter.name)
        if parameter.is_constexpr or value is None:
            key.append(value)
        elif isinstance(value, torch.Tensor):
            key.append(value.dtype)
        elif isinstance(value, int) and not parameter.do_not_specialize:
            key.append((value == 1, value % 16 == 0))
    return (*key, *sorted(values.items()))


def run_on_nothing(layer: LayerSpec, tuning: Tuning, num_tokens: int, host_dense: bool) -> None:
    def empty(*sizes, dtype=layer.dtype):
        return torch.empty(*sizes, dtype=dtype, device="meta")

    rows, stored = (layer.input_rows, layer.neurons), layer.expert_dtype or layer.dtype
    scales = [empty(size, dtype=torch.float32) for size in rows] if layer.expert_dtype else [None, None]
    w_in, w_out_t = (empty(size, layer.hidden, dtype=stored) for size in rows)
    weights = Weights(w_in, None, w_out_t, None, *scales)
    ffn.routed_ffn(
        empty(num_tokens, layer.hidden),
        empty(num_tokens, dtype=torch.float32),
        RouterWeights(empty(layer.num_experts, layer.hidden)),
        weights,
        layer,
        tuning=tuning,
        counters=Counters(empty(num_tokens, dtype=torch.int32), empty(1, dtype=torch.int64)),
        host_dense=host_dense,
    )


def test_taus_of_a_share_leave_nothing_to_rounding():
    generator = torch.Generator().manual_seed(0)
    x, router = torch.randn(256, 64, generator=generator), torch.randn(1184, 64, generator=generator) / 8
    logits = x @ router.T
    taus = taus_for(x, router, 237)
    active = reference.select_cumulative_mass(logits, taus)
    assert (active.sum(dim=-1) - 237).abs().max() <= 11
    for _ in range(20):
        rounded = logits + 2e-6 * torch.randn(logits.shape, generator=generator)
        assert torch.equal(reference.select_cumulative_mass(rounded, taus), active)
    few = taus_for(x, router[:40], 8)
    assert (reference.select_cumulative_mass(logits[:, :40], few).sum(dim=-1) == 8).all()
    assert (taus_for(x, router, 1184) == 1).all()
