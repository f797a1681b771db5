"""Routers that read the attention's input, and routers of low rank: format version 2, from conversion to the engine."""

import json
import shutil

import pytest
import torch
from naive import load_naive, naive_generate, naive_logits, naive_sparsity
from safetensors.torch import load_file, save_file
from test_engine import assert_naive, run_engine
from tiny_models import FAMILY_NAMES, HIDDEN, LAYERS, block, block_fields, build_dense, save_dense, tokens
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prunepath_vllm.checkpoint import validate_checkpoint
from prunepath_vllm.config import PrunePathConfig
from prunepath_vllm.conversion.calibrate import calibrate, factor_router
from prunepath_vllm.conversion.convert import convert
from prunepath_vllm.entrypoints import cli
from prunepath_vllm.errors import CheckpointError, ConfigError, UsageError
from prunepath_vllm.kernels import cpu, native, reference
from prunepath_vllm.kernels.layer import LayerSpec, RouterWeights, Weights
from prunepath_vllm.modeling.routing import Router
from prunepath_vllm.training.adapter import merge_adapter, neuron_order, save_adapter
from prunepath_vllm.training.low_rank import add_low_rank, merge_low_rank

pytestmark = pytest.mark.usefixtures("registered")

ROUTERS = {
    "attention": dict(router_input="attention"),
    "attention, rank 6": dict(router_input="attention", router_rank=6),
    "rank 20": dict(router_rank=20),  # more than experts
}
TAUS = (0.3, 0.6, 0.9, 1.0)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    letters = torch.randint(32, 127, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(map(chr, letters)))
    return path


def load(path, family, **options):
    auto = AutoModelForSequenceClassification if family == "roberta" else AutoModelForCausalLM
    return auto.from_pretrained(path, **options)


# --- the format ------------------------------------------------------------------------------------------------------


def test_the_lowest_format_that_says_everything_is_written():
    default = PrunePathConfig.parse(block_fields())
    assert (default.router.input, default.router.rank) == ("ffn", None)
    assert default.to_json() == PrunePathConfig.parse(block_fields(format_version=1)).to_json()
    assert "router" not in default.to_json()
    assert default.to_json()["format_version"] == 1
    router = dict(input="attention", rank=None)
    assert PrunePathConfig.parse(block_fields(router=dict(input="attention"))).to_json()["router"] == router
    written = PrunePathConfig.parse(block_fields(router=dict(input="ffn", rank=3))).to_json()
    assert written["format_version"] == 2
    assert PrunePathConfig.parse(written).to_json() == written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(format_version=1, router=dict(input="ffn", rank=None)), "router: Extra inputs .*got .*format_version 2"),
        (dict(format_version=3), "format_version: 3 .*expected 1 or 2"),
        (dict(router="attention"), "router: .*got 'attention'"),
        (dict(router=None), "router: .*got None"),
        (dict(router=dict(input="norm")), "router.input: .*got 'norm'"),
        (dict(router=dict(rank=0)), "router.rank: .*got 0"),
        (dict(router=dict(rank=2.5)), r"router.rank: .*got 2\.5"),
        (dict(router=dict(depth=2)), "router.depth: Extra inputs"),
    ],
)
def test_a_bad_router_block_is_named(changes, message):
    with pytest.raises(ConfigError, match=f"prunepath_config.{message}"):
        PrunePathConfig.parse(block_fields(**changes))


def test_a_rank_above_the_hidden_size_is_refused(prunepath_checkpoint, tmp_path):
    path = shutil.copytree(prunepath_checkpoint("llama", router_rank=HIDDEN), tmp_path / "copy")
    validate_checkpoint(path)
    content = json.loads((path / "config.json").read_text())
    content["prunepath_config"]["router"]["rank"] = HIDDEN + 1
    (path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=f"router.rank: {HIDDEN + 1}; expected 1 to {HIDDEN}"):
        validate_checkpoint(path)


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        (dict(router_rank=6), lambda t, n: t.pop(f"{n}.down.weight"), r"down.weight is missing; .*\[6, 64\]"),
        (dict(router_rank=6), lambda t, n: t.update({f"{n}.weight": torch.ones(8, 64)}), r"\[8, 64\]; .*\[8, 6\]"),
        (
            dict(router_rank=6),
            lambda t, n: t.update({f"{n}.down.weight": torch.ones(5, 64)}),
            r"\[5, 64\]; .*\[6, 64\]",
        ),
        (dict(), lambda t, n: t.update({f"{n}.down.weight": torch.ones(6, 64)}), "down.weight is unexpected"),
    ],
    ids=["missing", "second factor", "first factor", "extra"],
)
@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_a_wrong_router_tensor_is_named(prunepath_checkpoint, tmp_path, family, options, change, message):
    path = shutil.copytree(prunepath_checkpoint(family, **options), tmp_path / "copy")
    tensors = load_file(path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("router.weight")).removesuffix(".weight")
    change(tensors, name)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name}\..*{message}"):
        validate_checkpoint(path)


# --- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ROUTERS.values(), ids=ROUTERS)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_models_equal_the_equations_and_at_tau_1_the_dense_model(prunepath_checkpoint, family, options):
    path = prunepath_checkpoint(family, **options)
    model, naive, ids = load(path, family), load_naive(path), tokens(len(TAUS), 10)
    with torch.no_grad():
        together = model(ids, tau=list(TAUS), output_router_logits=True)
        dense = build_dense(family)(ids).logits
    for index, tau in enumerate(TAUS):
        expected = naive_logits(naive, ids[index].tolist(), tau)
        torch.testing.assert_close(together.logits[index], expected, rtol=0, atol=2e-5)
        torch.testing.assert_close(together.ffn_sparsity[:, index], naive_sparsity(naive), rtol=0, atol=1e-6)
    torch.testing.assert_close(together.logits[-1], dense[-1], rtol=0, atol=1e-5)
    assert together.ffn_sparsity[:, 0].mean() > together.ffn_sparsity[:, 2].mean() + 0.05


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_with_a_cache_equals_greedy_without(prunepath_checkpoint, family):
    path = prunepath_checkpoint(family, **ROUTERS["attention, rank 6"])
    ids = tokens(1, 8)
    got = load(path, family).generate(ids, tau=0.6, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert got[0, 8:].tolist() == naive_generate(load_naive(path), ids[0].tolist(), 0.6, 6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta"])
def test_checkpointed_and_compiled_trainings_learn_the_same_routers(prunepath_checkpoint, family):
    path = prunepath_checkpoint(family, gate="sigmoid", **ROUTERS["attention, rank 6"])
    ids = tokens(2, 8)
    labels = torch.tensor([0, 2]) if family == "roberta" else ids
    found = []
    for how in ("plain", "checkpointed", "compiled"):
        model = load(path, family).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if how == "checkpointed":
            model.gradient_checkpointing_enable()
        run = torch.compile(model, backend="eager", dynamic=False) if how == "compiled" else model
        torch.manual_seed(0)
        outputs = run(ids, labels=labels, tau=[0.4, 0.9], output_router_logits=how != "compiled")
        outputs.loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
        routers = [module for module in model.modules() if isinstance(module, Router)]
        assert len(routers) == LAYERS
        assert all(router.down.weight.grad.abs().max() > 0 for router in routers)
    for other in found[1:]:
        for name, expected in found[0].items():
            torch.testing.assert_close(other[name], expected, rtol=1e-4, atol=1e-6)


def test_an_adapter_keeps_the_routers(tmp_path, dense_checkpoint):
    dense, start = dense_checkpoint("llama"), tmp_path / "start"
    convert(dense, start, router_input="attention", router_rank=6)
    model = load(start, "llama")
    assert not any(".router." in name for name in add_low_rank(model, 2))
    down = model.model.layers[1].mlp.router.down.weight
    assert down.requires_grad
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_((parameter + 0.01).bfloat16())
    trained = {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}
    merge_low_rank(model.base_model)
    model.save_pretrained(tmp_path / "trained")
    orders = neuron_order(dense, start)
    adapter = save_adapter(dense, tmp_path / "trained", orders, trained, destination=tmp_path / "adapter.safetensors")
    merged = merge_adapter(dense, adapter, tmp_path / "merged")
    assert block(merged)["router"] == dict(input="attention", rank=6)
    expected, got = (load_file(path / "model.safetensors") for path in (tmp_path / "trained", merged))
    assert torch.equal(got["model.layers.1.mlp.router.down.weight"], down)
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


# --- conversion and calibration --------------------------------------------------------------------------------------


def test_zero_routers_of_low_rank_can_be_trained(dense_checkpoint, tmp_path):
    path = convert(dense_checkpoint("qwen3"), tmp_path / "out", router_input="attention", router_rank=6, split="random")
    assert block(path)["format_version"] == 2
    model = load(path, "qwen3")
    assert not any(logits.any() for logits in model(tokens(1, 4), output_router_logits=True).router_logits)
    router = model.model.layers[0].mlp.router
    assert 0.5 < router.down.weight.square().sum(1).mean() < 2
    ids = tokens(1, 12)
    dense = AutoModelForCausalLM.from_pretrained(dense_checkpoint("qwen3"))
    torch.testing.assert_close(model(ids, tau=1.0).logits, dense(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(router_input="norm"), UsageError, "router input: 'norm'; expected one of ffn, attention"),
        (dict(router_rank=0), UsageError, "router rank: 0; expected 1 to 64"),
        (dict(router_rank=65), UsageError, "router rank: 65; expected 1 to 64"),
    ],
)
def test_conversion_refuses_before_any_work(dense_checkpoint, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        convert(dense_checkpoint("llama"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta", "gemma3_text"])
def test_convert_calibrates_what_the_routers_read(family, text, tmp_path, capsys):
    src = save_dense(family, tmp_path / "dense")
    command = ["convert", str(src), str(tmp_path / "out"), "--expert-size", "16", "--split", "random"]
    command += ["--router-input", "attention", "--router-rank", "6", "--calibration-text", str(text)]
    assert cli.main(command) == 0
    path = tmp_path / "out"
    assert block(path)["router"] == dict(input="attention", rank=6)
    sparsities = [sparsity for _, sparsity in block(path)["tau_curve"]]
    assert sparsities[0] > 0.5
    capsys.readouterr()
    assert cli.main(["inspect", str(path)]) == 0
    assert f"fitted, {'no'} bias, rank 6, read the attention's input" in capsys.readouterr().out
    model, ids = load(path, family), tokens(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, tau=1.0).logits, build_dense(family)(ids).logits, rtol=0, atol=1e-4)
    # Fitted to the attention's inputs: a router that is fitted to the feed-forward layer's is another.
    other = convert(src, tmp_path / "other", expert_size=16, split="random", router_rank=6)
    calibrate(other, text)
    name = next(name for name in load_file(path / "model.safetensors") if name.endswith("router.down.weight"))
    first, second = (load_file(one / "model.safetensors")[name] for one in (path, other))
    assert (first - second).norm() > 0.1 * first.norm()


def test_static_pruning_leaves_no_part_of_a_router(prunepath_checkpoint, text, tmp_path):
    source = prunepath_checkpoint("llama", **ROUTERS["attention, rank 6"])
    command = ["prune", str(source), str(tmp_path / "pruned"), "--method", "static", "--sparsity", "0.4"]
    assert cli.main([*command, "--text", str(text)]) == 0
    assert not any(".router." in name for name in load_file(tmp_path / "pruned" / "model.safetensors"))


def test_the_factors_are_the_nearest_of_their_rank():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 12, generator=generator) * torch.logspace(0, -2, 12)
    weight = torch.randn(8, 12, generator=generator)
    logits = inputs @ weight.T
    for rank in (1, 3, 8, 12):
        up, down = factor_router(weight, inputs, rank)
        assert (up.shape, down.shape) == ((8, rank), (rank, 12))
        left_out = torch.linalg.svdvals(logits)[rank:].square().sum()
        torch.testing.assert_close((inputs @ down.T @ up.T - logits).square().sum(), left_out, rtol=1e-3, atol=1e-4)


# --- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_paths_route_by_their_own_input(num_tokens, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    spec = LayerSpec(32, 12, 8, dtype)
    weights = Weights(rand(192, 32) / 6, None, rand(96, 32) / 10, rand(32))
    router = RouterWeights(rand(12, 5) / 2, rand(12), rand(5, 32) / 4)
    x, seen = rand(num_tokens, 32), rand(num_tokens, 32)
    tau = torch.tensor([0.3, 0.7, 1.0]).repeat(num_tokens)[:num_tokens]
    logits = (seen.double() @ router.down.double().t() @ router.weight.double().t() + router.bias.double()).float()
    gates = reference.expert_weights(logits, tau, selection="cumulative_mass", threshold=None, gate="none")
    gate, up = (x.float() @ weights.w_in.float().t()).chunk(2, -1)
    neurons = torch.nn.functional.silu(gate) * up
    expected = reference.scale_neurons(neurons, gates) @ weights.w_out_t.float() + weights.b_out.float()
    results = [cpu.routed_ffn(x, tau, router, weights, spec, router_input=seen, gather=gather) for gather in (1, 0)]
    if not native.unavailable():
        monkeypatch.setattr(cpu, "native_tokens", lambda *_, **__: 0)
        results.append(cpu.routed_ffn(x, tau, router, weights, spec, router_input=seen))
    for y in results:
        assert (y.float() - expected).norm() / expected.norm() < (1e-5 if dtype == torch.float32 else 0.02)
    with pytest.raises(ConfigError, match=r"router.input.*\[2, 32\]"):
        cpu.routed_ffn(x, tau, router, weights, spec, router_input=seen[:2])


@pytest.mark.parametrize("rank", [None, 6])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_low_ranks_second_factor_is_widened_once_on_a_gpu(rank, device):
    """Which no CPU has; a device of no memory stands for it."""
    from prunepath_vllm.model_executor.layers.routed_ffn import ExpertRouter

    prunepath = PrunePathConfig.parse(block_fields(router=dict(input="attention", rank=rank)))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            router = ExpertRouter(HIDDEN, prunepath, 0)
    finally:
        torch.set_default_dtype(default)
    assert router.weight.dtype == (torch.float32 if device == "meta" and rank else torch.bfloat16)
    assert {one.dtype for one in router.tensors()[1:] if one is not None} == {torch.bfloat16}
    loaded = torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.nn.Parameter(torch.empty_like(router.weight, device="cpu"), requires_grad=False)
    router.weight.weight_loader(weight, loaded)
    assert torch.equal(weight.float(), loaded.float())


# --- the engine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options", "runner", "eager", "engine"),
    [
        ("llama", ROUTERS["attention"], "v1", False, {}),
        ("gpt2", ROUTERS["attention, rank 6"], "v2", True, {}),
        ("qwen3", ROUTERS["attention, rank 6"], "v1", False, {"tensor_parallel_size": 2, "disable_log_stats": False}),
        # V1's eager CPU worker of vLLM 0.32.0 has no pipelines.
        ("llama", ROUTERS["attention"], "v2", True, {"pipeline_parallel_size": 2, "disable_log_stats": False}),
    ],
    ids=["llama-compiled", "gpt2-v2", "qwen3-compiled-two-ranks", "llama-v2-two-stages"],
)
def test_the_engine_equals_the_naive_model(prunepath_checkpoint, family, options, runner, eager, engine):
    """Mixed taus in one batch and alone, chunked prefill, prefix cache."""
    checkpoint = prunepath_checkpoint(family, default_tau=0.6, **options)
    result = run_engine("decoder", checkpoint, runner, eager=eager, engine=engine)
    assert_naive([*result["mixed"], *result["shared_prefix"]], checkpoint)
    assert [row["tokens"] for row in result["mixed"]] == [row["tokens"] for row in result["lone"]]
    assert any(row["cached"] for row in result["shared_prefix"])


CASES = {
    "gemma2": ROUTERS["attention"],
    "granite": ROUTERS["attention, rank 6"],
    "gpt2": ROUTERS["rank 20"],
}


@pytest.fixture(scope="module")
def engines(prunepath_checkpoint, dense_checkpoint):
    cases = {
        name: dict(sparse=str(prunepath_checkpoint(name, **options)), dense=str(dense_checkpoint(name)))
        for name, options in CASES.items()
    }
    return run_engine("families", "", cases=cases)


@pytest.mark.parametrize("family", CASES)
def test_other_families_equal_the_naive_model_and_at_tau_1_the_dense_engine(engines, prunepath_checkpoint, family):
    result = engines[family]
    assert_naive(result["sparse"]["mixed"], prunepath_checkpoint(family, **CASES[family]))
    assert len({tuple(row["tokens"][0]) for row in result["sparse"]["mixed"]}) >= 3
    assert result["sparse"]["tau 1"] == result["dense"]["tau 1"]


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_a_classifier_in_the_engine_equals_the_naive_model(prunepath_checkpoint, runner):
    checkpoint = prunepath_checkpoint("roberta", **ROUTERS["attention, rank 6" if runner == "v1" else "attention"])
    result = run_engine("encoder", checkpoint, runner)
    model = load_naive(checkpoint)
    pairs = zip(result["prompts"], result["taus"], strict=True)
    expected = torch.stack([naive_logits(model, ids, tau).softmax(-1) for ids, tau in pairs])
    for how in ("mixed", "lone"):
        torch.testing.assert_close(torch.tensor(result[how]), expected, atol=1e-5, rtol=1e-4)
