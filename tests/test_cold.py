"""Cold experts: format version 2's kept_experts, from ``prunepath prune --method cold`` to transformers and the engine.

What is right: the checkpoint as it was, with the second linear's weights of every dropped expert zeroed. A token still
selects such an expert, and it adds nothing.
"""

import json
import re
import shutil
from dataclasses import replace

import naive
import pytest
import torch
import torch.nn.functional as F
from naive import NaiveFFN, load_naive, naive_generate, naive_logits
from refusals import refused_changes
from safetensors.torch import load_file, save_file
from test_engine import assert_naive, run_engine
from tiny_models import LAYERS, block, block_fields, tokens
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prunepath_vllm.checkpoint import validate_checkpoint
from prunepath_vllm.config import PrunePathConfig
from prunepath_vllm.conversion.cold import prune_cold_experts
from prunepath_vllm.conversion.quantize import quantize
from prunepath_vllm.entrypoints import cli
from prunepath_vllm.errors import CheckpointError, ConfigError, TauError, UsageError
from prunepath_vllm.families import FAMILIES
from prunepath_vllm.kernels import cpu, native
from prunepath_vllm.kernels.layer import Counters, LayerSpec, RouterWeights, Weights

pytestmark = pytest.mark.usefixtures("registered")

SIZE, EXPERTS, MAX_TAU, SHARE = 16, 16, 0.6, 0.25
TAUS = (0.6, 0.3, 0.05)
CURVE = ((0.2, 0.9), (0.5, 0.6), (0.7, 0.4), (1.0, 0.0))


@pytest.fixture(scope="module")
def cold(prunepath_checkpoint, text, tmp_path_factory):
    """``cold(family, **options)``: a checkpoint, the pruned one, and the one with zeros that it has to equal."""
    made = {}

    def get(family, expert_dtype=None, **options):
        key = (family, expert_dtype, *sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("cold")
            source = prunepath_checkpoint(family, expert_size=SIZE, router_scale=0.1, **options)
            if expert_dtype is not None:
                quantize(source, folder / "quantised", expert_dtype)
                source = folder / "quantised"
            prune_cold_experts(source, folder / "cold", max_tau=MAX_TAU, text=text, share=SHARE, sequences=1)
            shutil.copytree(source, folder / "zeros")
            tensors, row = load_file(source / "model.safetensors"), next(r for r in FAMILIES if r.name == family)
            for layer, dropped in enumerate(dropped_experts(source, folder / "cold", row)):
                name = f"{row.output(layer)}.weight"
                weight = tensors[name].view(torch.uint8) if expert_dtype else tensors[name]
                rows = weight if row.conv1d else weight.t()
                for expert in dropped:
                    rows[expert * SIZE : (expert + 1) * SIZE] = 0
            save_file(tensors, folder / "zeros" / "model.safetensors", {"format": "pt"})
            made[key] = (source, folder / "cold", folder / "zeros")
        return made[key]

    return get


def order_of(source, path, row):
    """Per layer the old number of each new expert, told by the routers' rows."""
    before, after = (load_file(folder / "model.safetensors") for folder in (source, path))
    for layer in range(LAYERS):
        old, new = (tensors[f"{row.router(layer)}.weight"] for tensors in (before, after))
        yield [int((old == one).all(1).nonzero()) for one in new]


def dropped_experts(source, path, row):
    kept = block(path)["kept_experts"]
    return [order[len(kept[layer]) :] for layer, order in enumerate(order_of(source, path, row))]


def load(path, **options):
    family = json.loads((path / "config.json").read_text())["model_type"]
    auto = AutoModelForSequenceClassification if family == "prunepath_roberta" else AutoModelForCausalLM
    return auto.from_pretrained(path, **options)


# --- the format ------------------------------------------------------------------------------------------------------


def usage(**changes):
    return dict(text="a.txt", tokens=9, tau=0.4, shares=[[0.5] * 8] * 3) | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(format_version=1, max_tau=0.5), "max_tau: Extra inputs .*format_version 2"),
        (dict(kept_experts=[[0, 1]] * 3), "max_tau is None; expected a number with kept_experts"),
        (dict(max_tau=0.4, default_tau=0.4), "max_tau is 0.4; expected .* null without"),
        (dict(kept_experts=[[0], [1, 0], [0]], max_tau=0.4), r"kept_experts\[1\]: \[1, 0\]; expected 0, 1, 2"),
        (dict(kept_experts=[[0], [0], []], max_tau=0.4), r"kept_experts\[2\]: \[\]; expected .* 1 to 8"),
        (dict(kept_experts=[[*range(9)]] * 3, max_tau=0.4), r"kept_experts\[0\]: .*; expected .* 1 to 8"),
        (dict(kept_experts=[[0]] * 3, max_tau=1.0), "max_tau: .*less than 1"),
        (dict(kept_experts=[[0]] * 3, max_tau=1 - 1e-9), r"max_tau is 0.99.*; expected .* in float32 too"),
        (dict(kept_experts=[[0]] * 3, max_tau=0.4), r"max_tau is 0.4; expected at least 1.0, of default_tau"),
        (dict(kept_experts=[[0]], max_tau=0.4, default_tau=0.1, tau_curve=[[0.5, 0.5]]), "expected at least 0.5"),
        (dict(expert_usage=usage(shares=[[0.5] * 7])), r"expert_usage.shares: expected 8 shares \(num_experts\)"),
        (dict(expert_usage=usage(shares=[[1.5] * 8])), "expert_usage.shares.0.0: .*less than or equal to 1"),
    ],
)
def test_a_bad_field_is_named(changes, message):
    with pytest.raises(ConfigError, match=f"prunepath_config.*{message}"):
        PrunePathConfig.parse(block_fields(**changes))


def test_the_format_is_2_only_where_it_is_needed():
    plain = PrunePathConfig.parse(block_fields(kept_experts=None, max_tau=None, expert_usage=None)).to_json()
    assert (plain["format_version"], {"kept_experts", "max_tau", "expert_usage"} & set(plain)) == (1, set())
    fields = block_fields(kept_experts=[[0], [0, 1], [0]], max_tau=0.4, default_tau=0.4, expert_usage=usage())
    parsed = PrunePathConfig.parse(fields)
    assert PrunePathConfig.parse(parsed.to_json()) == parsed
    assert ([parsed.kept(i) for i in range(3)], [parsed.neurons(i) for i in range(3)]) == ([1, 2, 1], [32, 64, 32])
    with pytest.raises(ConfigError, match="kept_experts: 3 layers; expected 4"):
        parsed.model_copy(update=dict(expert_usage=None)).check_layers(4)


def test_a_layer_of_another_size_is_named(cold, tmp_path):
    path = shutil.copytree(cold("llama")[1], tmp_path / "copy")
    content = json.loads((path / "config.json").read_text())
    kept = content["prunepath_config"]["kept_experts"]
    del kept[1][-1]
    (path / "config.json").write_text(json.dumps(content))
    wanted = SIZE * len(kept[1])
    with pytest.raises(CheckpointError, match=rf"layers.1.mlp.*\[{wanted + SIZE}, 64\]; expected \[{wanted}, 64\]"):
        validate_checkpoint(path)


# --- prunepath prune --method cold -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dense_positions", [0, 2])
def test_uses_are_those_of_the_naive_model(prunepath_checkpoint, text, tmp_path, monkeypatch, dense_positions):
    source = prunepath_checkpoint("llama", expert_size=SIZE, router_scale=0.1, dense_positions=dense_positions)
    prune_cold_experts(source, tmp_path / "out", max_tau=MAX_TAU, text=text, share=SHARE, sequences=1)
    chosen, original = [], naive.active_experts

    def watched(*args, **options):
        chosen.append(original(*args, **options))
        return chosen[-1]

    monkeypatch.setattr(naive, "active_experts", watched)
    ids = list(text.read_bytes())
    tokenizer = naive.transformers.AutoTokenizer.from_pretrained(source)
    ids = tokenizer(text.read_text())["input_ids"][:512]
    naive_logits(load_naive(source), ids, MAX_TAU)
    counts = torch.zeros(LAYERS, EXPERTS)
    for call, active in enumerate(chosen):  # layer by layer, token by token
        if call % 512 >= dense_positions:
            counts[call // 512, active] += 1
    shares = counts / (512 - dense_positions)
    written = block(tmp_path / "out")
    row = next(row for row in FAMILIES if row.name == "llama")
    assert len({len(kept) for kept in written["kept_experts"]}) > 1
    for layer, order in enumerate(order_of(source, tmp_path / "out", row)):
        kept = [e for e in range(EXPERTS) if shares[layer, e] > SHARE]
        assert order == kept + [e for e in range(EXPERTS) if e not in kept]
        assert written["kept_experts"][layer] == list(range(len(kept)))
        torch.testing.assert_close(
            torch.tensor(written["expert_usage"]["shares"][layer]), shares[layer, order], atol=1e-4, rtol=1e-3
        )
    told = {name: value for name, value in written["expert_usage"].items() if name != "shares"}
    assert told == dict(text="fox.txt", tokens=512 - dense_positions, tau=MAX_TAU)


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", dict(router_bias=True)), ("gpt2", dict(router_rank=6)), ("roberta", dict(expert_dtype="int8"))],
)
def test_only_expert_weights_leave(cold, family, options):
    source, path, _ = cold(family, **options)
    row = next(row for row in FAMILIES if row.name == family)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, path))
    assert before.keys() == after.keys()
    left = dict(after)
    for layer, order in enumerate(order_of(source, path, row)):
        kept = len(block(path)["kept_experts"][layer])
        neurons = torch.tensor([e * SIZE + d for e in order[:kept] for d in range(SIZE)])
        axes = {name: axis for name, axis in row.neuron_axes(layer).items() if name in before}
        axes |= {
            f"{name}.weight_scale": 0 for name in (*row.inputs(layer), row.output(layer)) if options.get("expert_dtype")
        }
        for name, axis in axes.items():
            assert torch.equal(left.pop(name), before[name].index_select(axis, neurons)), name
        for kind in ("weight", "bias"):
            if (name := f"{row.router(layer)}.{kind}") in before:
                assert torch.equal(left.pop(name), before[name][order])
    assert all(torch.equal(tensor, before[name]) for name, tensor in left.items())


def test_the_configuration_and_what_tells_of_it(cold, capsys):
    _, path, _ = cold("llama", tau_curve=CURVE)
    written = block(path)
    assert (written["format_version"], written["max_tau"], written["default_tau"]) == (2, MAX_TAU, MAX_TAU)
    assert written["tau_curve"] == [[0.2, 0.9], [0.5, 0.6], [0.6, 0.5]]
    share = sum(map(len, written["kept_experts"])) / (LAYERS * EXPERTS)
    assert 0.2 < share < 0.9
    card = (path / "README.md").read_text()
    assert f"| experts kept | {share:.1%}, for tau up to 0.6; counted on 512 tokens of fox.txt |" in card
    assert '"tau": 0.6}' in card
    assert cli.main(["inspect", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["kept_share"], told["max_tau"], told["kept_experts"]) == (share, MAX_TAU, written["kept_experts"])
    assert cli.main(["inspect", str(path)]) == 0
    assert re.search(rf"kept experts +{share:.1%}, \d+ to \d+ per layer, for tau up to 0.6", capsys.readouterr().out)


def test_the_command(prunepath_checkpoint, text, tmp_path, capsys):
    source, path = prunepath_checkpoint("gpt2", expert_size=SIZE, router_scale=0.1), tmp_path / "out"
    command = ["prune", str(source), str(path), "--text", str(text), "--sequences", "1", "--method"]
    for more, message in (
        (["cold"], "--max-tau is missing; expected it with --method cold"),
        (["cold", "--max-tau", "0.5", "--sparsity", "0.5"], "--sparsity 0.5: expected none with --method cold"),
        (["static"], "--sparsity is missing"),
        (["static", "--sparsity", "0.5", "--share", "0.1"], "--share 0.1: expected none with --method static"),
        (["cold", "--max-tau", "1"], "max tau: 1.0; expected a number in (0, 1)"),
        (["cold", "--max-tau", "0.5", "--share", "1"], "share: 1.0; expected a number in [0, 1)"),
    ):
        assert cli.main([*command, *more]) == 2
        assert message in capsys.readouterr().err
    assert cli.main([*command, "cold", "--max-tau", "0.4", "--share", "0.1"]) == 0
    told = capsys.readouterr().out
    sizes = [sum(t.nbytes for t in load_file(p / "model.safetensors").values()) / 1e6 for p in (source, path)]
    assert f"{sizes[0]:,.1f} MB before, {sizes[1]:,.1f} MB after" in told
    assert sizes[1] < sizes[0]
    assert "refuses requests above tau 0.4" in told


def test_nothing_cold_is_said(prunepath_checkpoint, text, tmp_path):
    source = prunepath_checkpoint("llama", expert_size=SIZE, router_scale=0.01)
    with pytest.raises(
        UsageError, match=r"at tau 0.95 every expert is used by more than the share 0.0 .*lower max tau"
    ):
        prune_cold_experts(source, tmp_path / "out", max_tau=0.95, text=text, sequences=1)
    assert not (tmp_path / "out").exists()


def test_what_needs_every_expert_refuses(cold, text, tmp_path, capsys):
    _, path, _ = cold("llama")
    calibration, pruning, training = refused_changes(path, text, tmp_path, capsys)
    assert re.search(r"kept_experts: .*% of its experts are there.*cold experts after calibrating", calibration)
    assert "prune cold experts after pruning" in pruning
    assert "prune cold experts after training" in training
    with pytest.raises(UsageError, match="prune cold experts after pruning"):
        prune_cold_experts(path, tmp_path / "out", max_tau=0.3, text=text)


# --- transformers ----------------------------------------------------------------------------------------------------

VARIANTS = [
    ("llama", dict(dense_positions=1)),
    ("llama", dict(gate="sigmoid", router_bias=True)),
    ("llama", dict(selection="threshold", threshold=0.6)),
    ("llama", dict(expert_dtype="int8")),
    ("gemma2", dict(router_input="attention", router_rank=6)),
    ("gpt2", dict(dense_positions=2)),
    ("gpt2", dict(expert_dtype="float8_e4m3fn")),
    ("roberta", {}),
    ("roberta", dict(expert_dtype="int8")),
]


@pytest.mark.parametrize("native_kernel", [True, False], ids=["native", "pytorch"])
@pytest.mark.parametrize(("family", "options"), VARIANTS)
def test_models_equal_the_equations(cold, monkeypatch, family, options, native_kernel):
    if not native_kernel:
        monkeypatch.setattr(cpu, "native_tokens", lambda *_, **__: 0)
    source, path, zeros = cold(family, **options)
    model, expected, ids = load(path), load_naive(zeros), tokens(len(TAUS), 10)
    with torch.no_grad():
        logits = model(ids, tau=list(TAUS)).logits
    full = load_naive(source)
    differs = False
    for index, tau in enumerate(TAUS):
        torch.testing.assert_close(logits[index], naive_logits(expected, ids[index].tolist(), tau), rtol=0, atol=3e-5)
        differs |= not torch.allclose(logits[index], naive_logits(full, ids[index].tolist(), tau), atol=1e-3)
    assert differs  # some token chose a dropped expert


def test_statistics_tell_of_computed_experts_alone(cold):
    source, path, zeros = cold("llama", dense_positions=1)
    row = next(row for row in FAMILIES if row.name == "llama")
    ids = tokens(2, 10)
    with torch.no_grad():
        got, whole = (load(p)(ids, tau=0.5, output_router_logits=True) for p in (path, zeros))
    for layer, order in enumerate(order_of(source, path, row)):
        kept = len(block(path)["kept_experts"][layer])
        active = got.active_experts[layer]
        assert torch.equal(active[..., :kept], whole.active_experts[layer][..., order[:kept]])
        assert not active[..., kept:].any()
        assert whole.active_experts[layer][..., order[kept:]].any()
        assert active[:, 0].sum(-1).tolist() == [kept, kept]  # the dense position
    assert torch.equal(got.ffn_sparsity, torch.stack([1 - a.float().mean(-1) for a in got.active_experts]))


def test_requests_above_max_tau_are_refused(cold, tmp_path):
    model, ids = load(cold("llama")[1]), tokens(2, 5)
    model(ids, tau=torch.tensor([MAX_TAU, 0.1]))  # float32, whose 0.6 is above float64's
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids, tau=MAX_TAU).logits)  # the default was 1
    for call in (lambda tau: model(ids, tau=tau), lambda tau: model.generate(ids, tau=tau, max_new_tokens=2)):
        with pytest.raises(TauError, match=r"^tau must be a number in \(0, 0.6\].* checkpoint's max_tau.*, got 0.7"):
            call(0.7)
        with pytest.raises(TauError, match=r"^tau\[1\] must be a number in \(0, 0.6\].*, got 1.0"):
            call([0.5, 1.0])
    model.save_pretrained(tmp_path / "saved")
    assert block(tmp_path / "saved") == block(cold("llama")[1])
    validate_checkpoint(tmp_path / "saved", check_values=True)


def test_generation_equals_greedy_without_a_cache(cold):
    _, path, zeros = cold("gpt2", dense_positions=2)
    ids = tokens(1, 8)
    got = load(path).generate(ids, tau=0.5, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert got[0, 8:].tolist() == naive_generate(load_naive(zeros), ids[0].tolist(), 0.5, 6)


def test_a_cold_checkpoint_can_be_quantised(cold, tmp_path):
    _, path, _ = cold("gpt2", dense_positions=2)
    quantize(path, tmp_path / "out", "int8")
    ids = tokens(1, 6)
    with torch.no_grad():
        before, after = (load(p)(ids, tau=0.5).logits for p in (path, tmp_path / "out"))
    assert (before - after).norm() < 0.05 * before.norm()
    assert block(tmp_path / "out") == block(path) | dict(expert_dtype="int8")


# --- kernels ---------------------------------------------------------------------------------------------------------


def cold_layer(*, glu=True):
    """A layer of 12 experts of 4 neurons, 5 of them kept, and the same whole, the others' outputs zeroed."""
    generator = torch.Generator().manual_seed(0)
    hidden, experts, size, kept = 24, 12, 4, 5
    halves = 2 if glu else 1
    w_in, w_out = torch.randn(halves, experts * size, hidden, generator=generator), torch.randn(experts * size, hidden)
    b_in = torch.randn(halves, experts * size, generator=generator)
    w_out[kept * size :] = 0
    whole = Weights(w_in.flatten(0, 1), b_in.flatten(), w_out, torch.randn(hidden, generator=generator))
    rows = slice(kept * size)
    part = Weights(
        w_in[:, rows].flatten(0, 1).contiguous(), b_in[:, rows].flatten().contiguous(), w_out[rows].clone(), whole.b_out
    )
    router = RouterWeights(torch.randn(experts, hidden, generator=generator) * 0.4)
    spec = LayerSpec(hidden, experts, size, torch.float32, glu=glu)
    return router, whole, part, spec, replace(spec, kept=kept)


def chosen(router, x, tau, kept):
    """bool [T, K] by the equations: naive's choice, the first K of it."""
    picks = [
        naive.active_experts(router.weight @ x[t], float(tau[t]), selection="cumulative_mass", threshold=None)
        for t in range(len(x))
    ]
    return torch.tensor([[e in pick for e in range(kept)] for pick in picks])


@pytest.mark.parametrize("path", ["native", "pytorch", "no-host-reads"])
@pytest.mark.parametrize("glu", [True, False])
def test_paths_of_a_cpu_and_their_counters(monkeypatch, glu, path):
    if path != "native":
        monkeypatch.setattr(cpu, "native_tokens", lambda *_, **__: 0)
    router, whole, part, spec, cold_spec = cold_layer(glu=glu)
    for taus in ([0.3], [1.0], [0.02] * 3, [0.3, 1.0, 0.9, 0.0, 0.05]):
        x, tau = torch.randn(len(taus), spec.hidden, generator=torch.Generator().manual_seed(2)), torch.tensor(taus)
        active = torch.full((len(taus),), 3, dtype=torch.int32)
        read, full = torch.zeros(1, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
        got = cpu.routed_ffn(
            x, tau, router, part, cold_spec, gather=path != "no-host-reads", counters=Counters(active, read, full)
        )
        h = F.linear(x, whole.w_in, whole.b_in)
        h = F.silu(h[:, : spec.neurons]) * h[:, spec.neurons :] if glu else F.silu(h)
        used = chosen(router, x, tau, 5) & (tau > 0)[:, None]
        gates = F.pad(used, (0, 7)).repeat_interleave(4, dim=1)
        torch.testing.assert_close(got, (h * gates) @ whole.w_out_t + whole.b_out, atol=1e-4, rtol=1e-4)
        assert (active - 3).tolist() == used.sum(1).tolist()
        touched = int(used.any(0).sum())
        assert read.item() in ((touched,) if path == "native" else (touched, 5))
        assert full.item() == int(read.item() == 5)


def test_a_top_expert_that_is_gone_adds_nothing():
    router, _, part, _, spec = cold_layer()
    router = RouterWeights(router.weight, torch.tensor([0.0] * 9 + [50.0] + [0.0] * 2))
    x = torch.randn(2, spec.hidden)
    for gather in (True, False):
        y = cpu.routed_ffn(x, torch.tensor([0.4, 0.9]), router, part, spec, gather=gather)
        torch.testing.assert_close(y, part.b_out.expand_as(y))
    assert torch.equal(native.routed_ffn(x, torch.tensor([0.4, 0.9]), router, part, spec), part.b_out.expand_as(x))


def test_weights_of_another_number_of_experts_are_refused():
    router, whole, _, spec, cold_spec = cold_layer()
    with pytest.raises(ConfigError, match=r"second linear, transposed is \[48, 24\].*expected \[20, 24\]"):
        native.RoutedFFN(router, whole, cold_spec)
    with pytest.raises(ConfigError, match=r"first linear: shape \[96, 24\]; expected \[40, 24\]"):
        cold_spec.check(torch.zeros(1, 24), torch.ones(1), router, whole)
    with pytest.raises(ConfigError, match="kept 13; expected None or 1 to 12"):
        replace(spec, kept=13)
    assert LayerSpec.decode(cold_spec.encode()) == cold_spec


# --- the engine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options", "runner"),
    [
        ("llama", dict(dense_positions=1), "v1"),
        ("llama", dict(expert_dtype="int8"), "v2"),
        ("gpt2", dict(dense_positions=2), "v1"),
    ],
)
def test_the_engine_equals_the_naive_model(cold, family, options, runner):
    """Mixed taus in one batch and alone, chunked prefill; a tau above the checkpoint's is refused; GPT-2 compiled."""
    _, path, zeros = cold(family, **options)
    result = run_engine("cold", path, runner, eager=family != "gpt2", taus=TAUS)
    assert_naive(result["mixed"], zeros, default_tau=MAX_TAU)
    assert [row["tokens"] for row in result["mixed"]] == [row["tokens"] for row in result["lone"]]
    assert re.search(
        r"tau must be a number in \(0, 0.6\], up to this checkpoint's max_tau.* got 0.7", result["refused"]
    )
    naive_model = load_naive(zeros)
    for answer, counted in zip(result["mixed"], result["reports"], strict=True):
        ids = [*answer["prompt"], *answer["tokens"][0][:-1]]
        naive_logits(naive_model, ids, MAX_TAU if answer["tau"] is None else answer["tau"])
        layers = [module for module in naive_model.modules() if isinstance(module, NaiveFFN)]
        assert all(
            0 < active <= sum(layer.active_counts) for active, layer in zip(counted["active"], layers, strict=True)
        )
        assert counted["possible"] == len(ids) * EXPERTS
    assert any(sum(c["active"]) for c in result["reports"])


def test_the_front_end_refuses_by_name(monkeypatch):
    from types import SimpleNamespace

    from prunepath_vllm.entrypoints.server import knob
    from prunepath_vllm.model_executor.operator_policy import operator_policy
    from prunepath_vllm.model_executor.tau_resolution import TauResolver

    fields = block_fields(kept_experts=[[0]] * 3, max_tau=0.6, default_tau=0.6, tau_curve=[[0.2, 0.9], [0.6, 0.5]])
    prunepath = PrunePathConfig.parse(fields)
    model = SimpleNamespace(hf_config=SimpleNamespace(prunepath=prunepath), runner_type="generate")

    def policy(**given):
        scheduler = SimpleNamespace(max_num_seqs=4)
        config = SimpleNamespace(
            additional_config={"prunepath": given}, scheduler_config=scheduler, model_config=model
        )  # fmt: skip
        return operator_policy(config)

    for name in ("max_tau", "prefill_tau"):
        with pytest.raises(ConfigError, match=rf"prunepath.{name}: 0.7 is above the checkpoint's max_tau 0.6"):
            policy(**{name: 0.7})
    with pytest.raises(ConfigError, match=r"prunepath.default_tau: 0.7 is outside \[0.0, 0.6\]"):
        policy(default_tau=0.7)
    resolver = TauResolver(prunepath, policy())
    assert resolver.policy.max_tau == 0.6
    assert [resolver.tau_of(asked) for asked in ({}, {"tau": 0.6}, {"sparsity": 0.5})] == [0.6] * 3
    assert resolver.tau_of({"tau": "auto"}) == 0.6
    monkeypatch.setattr(knob, "waiting_requests", lambda _: 0)
    for asked, message in (
        ({"tau": 0.7}, r"^tau must be a number in \(0, 0.6\], .*, got 0.7$"),
        ({"vllm_xargs": {"tau": 1}}, r"^tau must be a number in \(0, 0.6\], .*, got 1$"),
        ({"sparsity": 0.4}, r"^sparsity must be at least 0.5, what .* leaves out at its max_tau 0.6, got 0.4$"),
    ):
        with pytest.raises(TauError, match=message) as caught:
            knob.settled_knob(asked, resolver, None)
        assert knob.refusal(caught.value).status_code == 400


class Loaded(torch.Tensor):
    """A tensor that vLLM's weight mapper has marked as a part of a merged linear."""

    shard_id: int


def test_two_ranks_hold_the_halves_of_every_kept_expert(cold, monkeypatch):
    from prunepath_vllm.model_executor.layers import routed_ffn

    path = cold("llama", dense_positions=1)[1]
    prunepath, tensors = validate_checkpoint(path).prunepath, load_file(path / "model.safetensors")
    monkeypatch.setattr(routed_ffn, "get_tensor_model_parallel_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(routed_ffn, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        for layer in range(LAYERS):
            kept = len(block(path)["kept_experts"][layer])
            inputs = routed_ffn.ExpertInputs(64, prunepath, layer, glu=True, bias=False)
            outputs = routed_ffn.ExpertOutputs(64, prunepath, layer, bias=False)
            parts = [tensors[f"model.layers.{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")]
            for shard, part in enumerate(parts[:2]):
                marked = part.as_subclass(Loaded)
                marked.shard_id = shard
                inputs.weight.weight_loader(inputs.weight, marked)
            outputs.weight.weight_loader(outputs.weight, parts[2])
            half = SIZE // 2
            shares = block(path)["expert_usage"]["shares"][layer]
            order = sorted(range(kept), key=lambda e, shares=shares: -shares[e])
            mine = [e * SIZE + rank * half + d for e in order for d in range(half)]
            assert torch.equal(inputs.weight, torch.cat([parts[0][mine], parts[1][mine]]))
            assert torch.equal(outputs.weight, parts[2].t()[mine])
