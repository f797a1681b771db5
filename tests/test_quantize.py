"""Quantised experts: format version 2, from ``prunepath quantize`` to transformers and the engine, on a CPU."""

import json
import re
import shutil

import pytest
import torch
from naive import load_naive, naive_generate, naive_logits
from refusals import refused_changes
from safetensors.torch import load_file, save_file
from test_engine import assert_naive, run_engine
from tiny_models import FAMILY_NAMES, HIDDEN, INTERMEDIATE, LAYERS, block, block_fields, tokens
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prunepath_vllm.checkpoint import INDEX_FILE, validate_checkpoint
from prunepath_vllm.config import EXPERT_DTYPES, PrunePathConfig
from prunepath_vllm.conversion import writing
from prunepath_vllm.conversion.costs import output_rows
from prunepath_vllm.conversion.quantize import quantize
from prunepath_vllm.conversion.rewrite import rewrite_checkpoint
from prunepath_vllm.entrypoints import cli
from prunepath_vllm.errors import CheckpointError, ConfigError, UsageError
from prunepath_vllm.families import FAMILIES
from prunepath_vllm.kernels import cpu
from prunepath_vllm.modeling import inference
from prunepath_vllm.training.model import family_of_model

pytestmark = pytest.mark.usefixtures("registered")

LARGEST = {"int8": 127, "float8_e4m3fn": 448}
TAUS = (0.3, 0.6, 0.9, 1.0)


def load(path, **options):
    family = json.loads((path / "config.json").read_text())["model_type"]
    auto = AutoModelForSequenceClassification if family == "prunepath_roberta" else AutoModelForCausalLM
    return auto.from_pretrained(path, **options)


def linears(names):
    """Names of the linears that have scales."""
    return sorted(name.removesuffix(".weight_scale") for name in names if name.endswith(".weight_scale"))


# --- the format ------------------------------------------------------------------------------------------------------


def test_the_lowest_format_that_says_everything_is_written():
    assert "expert_dtype" not in PrunePathConfig.parse(block_fields(router=dict(rank=3))).to_json()
    plain = PrunePathConfig.parse(block_fields(expert_dtype=None)).to_json()
    assert (plain["format_version"], "expert_dtype" in plain) == (1, False)
    for dtype in EXPERT_DTYPES:
        written = PrunePathConfig.parse(block_fields(expert_dtype=dtype)).to_json()
        assert (written["format_version"], written["expert_dtype"], "router" in written) == (2, dtype, False)
        assert PrunePathConfig.parse(written).to_json() == written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(format_version=1, expert_dtype="int8"), "expert_dtype: Extra inputs .*got 'int8'; .*format_version 2"),
        (dict(format_version=1, expert_dtype=None), "expert_dtype: Extra inputs .*got None; .*format_version 2"),
        (dict(expert_dtype="int4"), "expert_dtype: .*'float8_e4m3fn' or 'int8'.*got 'int4'"),
        (dict(expert_dtype=8), "expert_dtype: .*got 8"),
    ],
)
def test_a_bad_dtype_is_named(changes, message):
    with pytest.raises(ConfigError, match=f"prunepath_config.{message}"):
        PrunePathConfig.parse(block_fields(**changes))


def scale(change):
    """A change of the tensors: that of one linear's scales."""
    return lambda tensors, name: tensors.update({f"{name}.weight_scale": change(tensors[f"{name}.weight_scale"])})


def first(value):
    return lambda old: old.index_fill(0, torch.tensor([3]), value)


def nan_byte(tensors, name):
    tensors[f"{name}.weight"].view(torch.uint8)[0, 5] = 0xFF


HEADERS = {
    "missing": (
        lambda t, n: t.pop(f"{n}.weight_scale"),
        rf"weight_scale is missing; expected .*{INTERMEDIATE}",
    ),
    "extra": (lambda t, n: t.update({f"{n}.bias_scale": torch.ones(1)}), "bias_scale is unexpected; .* their scales"),
    "shape": (scale(lambda old: old[:, None]), rf"\[{INTERMEDIATE}, 1\]; expected \[{INTERMEDIATE}\]"),
    "dtype": (scale(lambda old: old.half()), "dtype F16; expected F32"),
    "weight": (lambda t, n: t.update({f"{n}.weight": t[f"{n}.weight"].float()}), "dtype F32; expected {}"),
}
VALUES = {
    "nan": (scale(first(torch.nan)), f"weight_scale: 1 of {INTERMEDIATE} values are NaN or infinite; expected finite"),
    "infinity": (scale(first(torch.inf)), "weight_scale: 1 of .* NaN or infinite"),
    "zero": (scale(first(0.0)), f"weight_scale: 1 of {INTERMEDIATE} scales are zero or negative; expected positive"),
    "negative": (scale(first(-1.0)), "weight_scale: 1 of .* scales are zero or negative"),
    "weight": (nan_byte, r"\.weight: 1 of \d+ values are NaN or infinite; expected finite"),
}


def changed(path, destination, change):
    """A copy with another tensor, and the linear that is about."""
    shutil.copytree(path, destination)
    tensors = load_file(destination / "model.safetensors")
    name = linears(tensors)[1]
    change(tensors, name)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, destination / "model.safetensors", {"format": "pt"})
    return name


@pytest.mark.parametrize("case", HEADERS)
@pytest.mark.parametrize(("family", "dtype"), [("llama", "int8"), ("gpt2", "float8_e4m3fn"), ("roberta", "int8")])
def test_a_wrong_tensor_is_named(quantised, tmp_path, family, dtype, case):
    change, message = HEADERS[case]
    name = changed(quantised(family, dtype), tmp_path / "copy", change)
    message = message.replace("{}", {"int8": "I8", "float8_e4m3fn": "F8_E4M3"}[dtype])
    with pytest.raises(CheckpointError, match=rf"tensor {re.escape(name)}\..*{message}"):
        validate_checkpoint(tmp_path / "copy")


@pytest.mark.parametrize("case", VALUES)
def test_a_wrong_value_is_named_by_every_reader(quantised, tmp_path, case):
    change, message = VALUES[case]
    name = changed(quantised("llama", "float8_e4m3fn"), tmp_path / "copy", change)
    validate_checkpoint(tmp_path / "copy")
    for read in (lambda path: validate_checkpoint(path, check_values=True), load):
        with pytest.raises(CheckpointError, match=rf"{re.escape(name)}.*{message}"):
            read(tmp_path / "copy")


def test_scales_without_the_field_are_unexpected(quantised, tmp_path):
    path = shutil.copytree(quantised("llama", "int8"), tmp_path / "copy")
    content = json.loads((path / "config.json").read_text())
    del content["prunepath_config"]["expert_dtype"]
    (path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="weight_scale is unexpected"):
        validate_checkpoint(path)


# --- prunepath quantize ----------------------------------------------------------------------------------------------


def reference_tensors(path, dtype):
    """What quantisation makes of a checkpoint's tensors, a neuron at a time."""
    tensors = load_file(path / "model.safetensors")
    ffn = r"(mlp\.(gate_proj|up_proj|down_proj|c_fc|c_proj)|layer\.\d+\.(intermediate|output)\.dense)\.weight"
    for name in [name for name in tensors if re.search(rf"(^|\.){ffn}$", name)]:
        weight = tensors[name].float()
        output = re.search(r"(down_proj|c_proj|output\.dense)\.weight$", name) is not None
        rows = weight.T if output != ("c_fc" in name or "c_proj" in name) else weight
        assert rows.shape == (INTERMEDIATE, HIDDEN)
        scales, stored = [], []
        for row in rows:
            amax = row.abs().max()
            scales.append(torch.tensor(1.0) if amax == 0 else amax / LARGEST[dtype])
            narrow = row / scales[-1]
            stored.append((narrow.round() if dtype == "int8" else narrow).to(getattr(torch, dtype)))
        stored = torch.stack(stored)
        tensors[name] = (stored if rows.shape == weight.shape and rows is weight else stored.T).contiguous()
        tensors[f"{name}_scale"] = torch.stack(scales)
    return tensors


@pytest.mark.parametrize("dtype", EXPERT_DTYPES)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family_equals_the_reference(prunepath_checkpoint, quantised, family, dtype):
    source, path = prunepath_checkpoint(family), quantised(family, dtype)
    expected, got = reference_tensors(source, dtype), load_file(path / "model.safetensors")
    assert got.keys() == expected.keys()
    assert len(linears(got)) == LAYERS * (2 if family in ("gpt2", "roberta") else 3)
    for name, tensor in got.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor.float(), expected[name].float()), name
    assert block(path) == block(source) | dict(format_version=2, expert_dtype=dtype)
    assert dtype in (path / "README.md").read_text()
    assert (path / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("dtype", EXPERT_DTYPES)
def test_neurons_of_zeros_and_of_tiny_weights(prunepath_checkpoint, tmp_path, dtype):
    path = shutil.copytree(prunepath_checkpoint("llama"), tmp_path / "copy")
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    tensors[f"{name}.weight"][4] = 0
    tensors[f"{name}.weight"][5] = 1e-42
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    quantize(path, tmp_path / "out", dtype)
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got[f"{name}.weight_scale"][4] == 1
    assert not got[f"{name}.weight"][4].float().any()
    validate_checkpoint(tmp_path / "out", check_values=True)


@pytest.mark.parametrize("dtype", EXPERT_DTYPES)
def test_a_weight_far_larger_than_the_others_costs_its_own_neuron_alone(
    prunepath_checkpoint, quantised, tmp_path, dtype
):
    """1,000 times the others: it is kept, and its neuron's others are right within a step of its scale."""
    path = shutil.copytree(prunepath_checkpoint("llama"), tmp_path / "copy")
    tensors = load_file(path / "model.safetensors")
    changes = {"model.layers.1.mlp.up_proj": (4, 7), "model.layers.0.mlp.down_proj": (7, 4)}  # neuron 4 of both
    for name, at in changes.items():
        weight = tensors[f"{name}.weight"]
        weight[at] = 1000 * weight.abs().max()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    quantize(path, tmp_path / "out", dtype)
    plain, got = (load_file(one / "model.safetensors") for one in (quantised("llama", dtype), tmp_path / "out"))
    for name, at in changes.items():
        is_output = "down_proj" in name
        was, stored, before = (one[f"{name}.weight"].float() for one in (tensors, got, plain))
        if is_output:
            was, stored, before = was.T, stored.T, before.T
        scale = got[f"{name}.weight_scale"]
        now = stored * scale[:, None]
        assert now[4, 7] == pytest.approx(was[4, 7].item(), rel=1e-6), at
        assert scale[4] == pytest.approx(was[4, 7].abs().item() / LARGEST[dtype])
        # int8's steps are the scale, float8_e4m3fn's 2^-3 of the power of two below, and 2^-9 of the scale at least.
        half_step = 0.5 * scale[:, None]
        if dtype == "float8_e4m3fn":
            half_step = torch.maximum(was.abs() / 16, half_step / 512)
        assert ((now - was).abs() <= half_step * (1 + 1e-5)).all()
        others = torch.arange(len(was)) != 4
        assert torch.equal(scale[others], plain[f"{name}.weight_scale"][others])
        assert torch.equal(stored[others], before[others])
        # What is left of the neuron's other weights: nothing in int8, all but a rounding in float8.
        assert stored[4].count_nonzero() == 1 if dtype == "int8" else stored[4].count_nonzero() > 0.9 * HIDDEN
    model, naive, ids = load(tmp_path / "out"), load_naive(tmp_path / "out"), tokens(1, 10)
    with torch.no_grad():
        logits = model(ids, tau=0.6).logits[0]
    torch.testing.assert_close(logits, naive_logits(naive, ids[0].tolist(), 0.6), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "most"), [("int8", 0.01), ("float8_e4m3fn", 0.04)])
def test_the_command_tells_every_layers_error(prunepath_checkpoint, tmp_path, capsys, dtype, most):
    source, path = prunepath_checkpoint("qwen2"), tmp_path / "out"
    assert cli.main(["quantize", str(source), str(path), "--expert-dtype", dtype]) == 0
    rows = re.findall(r"^ +(\d+) +([\d.]+)% +([\d.]+)%$", capsys.readouterr().out, re.MULTILINE)
    assert [int(layer) for layer, *_ in rows] == list(range(LAYERS))
    before, after = load_file(source / "model.safetensors"), load_file(path / "model.safetensors")
    for layer, weights, function in rows:
        names = [name for name in linears(after) if f".{layer}.mlp." in name]
        was = [before[f"{name}.weight"] for name in names]
        scales = [after[f"{n}.weight_scale"] for n in names]
        now = [
            after[f"{n}.weight"].float() * (s[None] if "down" in n else s[:, None])
            for n, s in zip(names, scales, strict=True)
        ]
        off = sum((a - b).square().sum() for a, b in zip(was, now, strict=True)) / sum(a.square().sum() for a in was)
        assert abs(off**0.5 - float(weights) / 100) < 1e-4
        assert 0.0005 < off**0.5 < float(function) / 100 < 2.5 * most
    assert off**0.5 < most
    assert cli.main(["inspect", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["expert_dtype"] == dtype
    assert cli.main(["inspect", str(path)]) == 0
    assert f"{dtype}, a scale per neuron" in capsys.readouterr().out


def test_the_errors_on_given_inputs(prunepath_checkpoint, tmp_path):
    source = prunepath_checkpoint("gpt2")
    drawn, given = (
        quantize(source, tmp_path / str(index), "int8", inputs=inputs)
        for index, inputs in enumerate((None, torch.zeros(2, HIDDEN)))
    )
    assert [one.weights for one in drawn] == [one.weights for one in given]
    assert all(a.function != b.function for a, b in zip(drawn, given, strict=True))
    with pytest.raises(UsageError, match=r"inputs: shape \[3\]; expected \[tokens, 64\]"):
        quantize(source, tmp_path / "out", "int8", inputs=torch.zeros(3))


def test_shards(prunepath_checkpoint, quantised, tmp_path, monkeypatch):
    whole = load_file(quantised("llama", "int8") / "model.safetensors")
    monkeypatch.setattr(writing, "MAX_SHARD_BYTES", 100_000)
    quantize(prunepath_checkpoint("llama"), tmp_path / "out", "int8")
    files = {info.file for info in validate_checkpoint(tmp_path / "out", check_values=True).tensors.values()}
    assert len(files) > 2
    assert (tmp_path / "out" / INDEX_FILE).exists()
    parts = {name: one for file in files for name, one in load_file(tmp_path / "out" / file).items()}
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_quantisation_refuses_before_any_work(prunepath_checkpoint, dense_checkpoint, quantised, tmp_path, monkeypatch):
    source, done, path = prunepath_checkpoint("llama"), quantised("llama", "int8"), tmp_path / "out"
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.inf
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    monkeypatch.setattr("prunepath_vllm.conversion.quantize.new_directory", None)
    for src, dst, dtype, error, message in (
        (source, path, "int4", UsageError, "expert dtype: 'int4'; expected one of float8_e4m3fn, int8"),
        (source, tmp_path / "there", "int8", UsageError, "there: already there and not an empty directory"),
        (done, path, "int8", UsageError, "expert_dtype 'int8': already quantised; expected"),
        (broken, path, "int8", CheckpointError, "up_proj.weight: 1 of .* NaN or infinite"),
        (dense_checkpoint("llama"), path, "int8", ConfigError, "model_type: 'llama' is not a PrunePath family"),
        (tmp_path / "none", path, "int8", UsageError, "no such directory"),
    ):
        with pytest.raises(error, match=message):
            quantize(src, dst, dtype)
        assert not path.exists()
    assert cli.main(["quantize", str(source), str(path), "--expert-dtype", "int4"]) == 2


def test_the_configuration_of_a_quantised_checkpoint_can_be_rewritten(quantised, tmp_path):
    """As `prunepath sweep` does."""
    path = shutil.copytree(quantised("gpt2", "float8_e4m3fn"), tmp_path / "copy")
    before = (path / "model.safetensors").read_bytes()
    rewrite_checkpoint(validate_checkpoint(path), {}, tau_curve=[[0.5, 0.4], [1.0, 0.0]])
    assert (path / "model.safetensors").read_bytes() == before
    summary = validate_checkpoint(path, check_values=True)
    assert (summary.prunepath.expert_dtype, len(summary.prunepath.tau_curve)) == ("float8_e4m3fn", 2)


def test_a_failure_leaves_nothing_behind(prunepath_checkpoint, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("in the middle")

    monkeypatch.setattr("prunepath_vllm.conversion.quantize.write_model_card", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        quantize(prunepath_checkpoint("llama"), tmp_path / "out", "int8")
    assert not list(tmp_path.iterdir())


def test_what_changes_weights_refuses_quantised_ones(quantised, tmp_path, capsys):
    path = quantised("llama", "int8")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 100)
    calibration, pruning, training = refused_changes(path, text, tmp_path, capsys)
    assert re.search(r"expert_dtype 'int8': its experts are .*quantise after calibrating", calibration)
    assert "its experts are quantised; expected ones that are not: quantise after pruning" in pruning
    assert "quantise after training" in training


# --- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("native", [True, False], ids=["native", "pytorch"])
@pytest.mark.parametrize("dtype", EXPERT_DTYPES)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_models_equal_the_equations(quantised, monkeypatch, family, dtype, native):
    if not native:
        monkeypatch.setattr(cpu, "native_tokens", lambda *_, **__: 0)
    path = quantised(family, dtype)
    model, naive, ids = load(path), load_naive(path), tokens(len(TAUS), 10)
    with torch.no_grad():
        logits = model(ids, tau=list(TAUS)).logits
    for index, tau in enumerate(TAUS):
        expected = naive_logits(naive, ids[index].tolist(), tau)
        torch.testing.assert_close(logits[index], expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize(
    "options", [dict(gate="sigmoid", router_bias=True), dict(router_input="attention", router_rank=6)]
)
@pytest.mark.parametrize(("family", "dtype"), [("llama", "float8_e4m3fn"), ("gpt2", "int8")])
def test_generation_equals_greedy_without_a_cache(quantised, family, dtype, options):
    path = quantised(family, dtype, **options)
    ids = tokens(1, 8)
    got = load(path).generate(ids, tau=0.6, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert got[0, 8:].tolist() == naive_generate(load_naive(path), ids[0].tolist(), 0.6, 6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_inference_takes_the_native_kernel_in_place(quantised, monkeypatch, family):
    model, calls = load(quantised(family, "int8")), []
    ready = inference.native.ready
    monkeypatch.setattr(inference.native, "ready", lambda *made: calls.append(made[1]) or ready(*made))
    with torch.no_grad():
        model(tokens(1, 40), tau=0.5)
        again = len(calls)
        model(tokens(1, 40), tau=0.5)
    assert again == LAYERS
    for first, second in zip(calls[:LAYERS], calls[LAYERS:], strict=True):
        assert first.w_out_t.dtype == torch.int8
        assert first.w_out_t.data_ptr() == second.w_out_t.data_ptr()
    memory = {tensor.data_ptr() for tensor in model.state_dict().values()}
    kept = (one.data_ptr() for weights in calls[LAYERS:] for one in vars(weights).values() if one is not None)
    assert set(kept) <= memory


@pytest.mark.parametrize("cast", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", "int8"), ("gpt2", "float8_e4m3fn"), ("roberta", "float8_e4m3fn")]
)
def test_weights_and_scales_keep_their_dtypes(quantised, tmp_path, family, dtype, cast):
    path = quantised(family, dtype)
    stored = load_file(path / "model.safetensors")
    ids = tokens(1, 6)
    for model in (load(path).to(cast), load(path).to(cast).float().to(cast), load(path, dtype=cast)):
        with torch.no_grad():
            before = model(ids, tau=0.6).logits
        assert before.dtype == cast
        model.save_pretrained(tmp_path / "saved")
        saved = load_file(tmp_path / "saved" / "model.safetensors")
        for name in linears(stored):
            for kind in ("weight", "weight_scale"):
                assert saved[f"{name}.{kind}"].dtype == stored[f"{name}.{kind}"].dtype
                assert torch.equal(saved[f"{name}.{kind}"].float(), stored[f"{name}.{kind}"].float())
        assert validate_checkpoint(tmp_path / "saved", check_values=True).prunepath.expert_dtype == dtype
    with torch.no_grad():  # a cast rounds the rotary embedding's buffers, too; loading does not
        assert torch.equal(load(tmp_path / "saved", dtype=cast)(ids, tau=0.6).logits, before)


@pytest.mark.parametrize("dtype", EXPERT_DTYPES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_quantised_weights_get_no_gradient(quantised, family, dtype):
    model, ids = load(quantised(family, dtype)).train(), tokens(1, 6)
    model(ids, labels=ids, tau=0.9).loss.backward()
    parameters = dict(model.named_parameters())
    for name in linears(model.state_dict()):
        assert not {f"{name}.weight", f"{name}.weight_scale"} & set(parameters)
    assert parameters["lm_head.weight" if family == "llama" else "transformer.wte.weight"].grad.abs().max() > 0


def test_figures_read_the_weights_with_their_scales(quantised):
    model = load(quantised("gpt2", "int8"))
    expected = load_naive(quantised("gpt2", "int8"))
    for layer in range(LAYERS):
        rows = output_rows(model, family_of_model(model), layer)
        assert torch.equal(rows, expected.transformer.h[layer].mlp.down["weight"].t())


# --- the engine ------------------------------------------------------------------------------------------------------


class Loaded(torch.Tensor):
    """A tensor that vLLM's weight mapper has marked as a part of a merged linear."""

    shard_id: int


@pytest.mark.parametrize("dtype", EXPERT_DTYPES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_two_ranks_hold_the_halves_of_every_expert(quantised, monkeypatch, family, dtype):
    from prunepath_vllm.model_executor.layers import routed_ffn

    path = quantised(family, dtype)
    row, tensors = next(row for row in FAMILIES if row.name == family), load_file(path / "model.safetensors")
    prunepath = validate_checkpoint(path).prunepath
    monkeypatch.setattr(routed_ffn, "get_tensor_model_parallel_world_size", lambda: 2)
    held = []
    for rank in (0, 1):
        monkeypatch.setattr(routed_ffn, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        inputs = routed_ffn.ExpertInputs(HIDDEN, prunepath, 1, glu=row.gate is not None, bias=False)
        outputs = routed_ffn.ExpertOutputs(HIDDEN, prunepath, 1, bias=False)
        for shard, name in enumerate(row.inputs(1)):
            for kind in ("weight", "weight_scale"):
                tensor = tensors[f"{name}.{kind}"]
                part = (tensor.t() if row.conv1d and kind == "weight" else tensor).as_subclass(Loaded)
                part.shard_id = shard
                parameter = getattr(inputs, kind)
                parameter.weight_loader(parameter, part)
        for kind in ("weight", "weight_scale"):
            tensor = tensors[f"{row.output(1)}.{kind}"]
            parameter = getattr(outputs, kind)
            parameter.weight_loader(parameter, tensor.t() if row.conv1d and kind == "weight" else tensor)
        assert inputs.weight.dtype == outputs.weight.dtype == getattr(torch, dtype)
        held.append((inputs, outputs))
    shape = (prunepath.num_experts, 2, prunepath.expert_size // 2)
    for kind in ("weight", "weight_scale"):
        wanted = [tensors[f"{name}.{kind}"].float() for name in (*row.inputs(1), row.output(1))]
        if kind == "weight":
            wanted = [rows if len(rows) == INTERMEDIATE else rows.t() for rows in wanted]
        for rank, (inputs, outputs) in enumerate(held):
            first, second = getattr(inputs, kind).float(), getattr(outputs, kind).float()
            for got, whole in zip((*first.chunk(len(wanted) - 1), second), wanted, strict=True):
                assert torch.equal(got, whole.unflatten(0, shape)[:, rank].flatten(0, 1))


@pytest.mark.parametrize(
    ("family", "dtype", "runner"),
    [("llama", "int8", "v1"), ("llama", "float8_e4m3fn", "v2"), ("gpt2", "int8", "v1")],
)
def test_the_engine_equals_the_naive_model(quantised, family, dtype, runner):
    """Mixed taus in one batch and alone, chunked prefill, prefix cache; GPT-2 compiled."""
    checkpoint = quantised(family, dtype, default_tau=0.6)
    result = run_engine("decoder", checkpoint, runner, eager=family != "gpt2")
    assert_naive([*result["mixed"], *result["shared_prefix"]], checkpoint)
    assert [row["tokens"] for row in result["mixed"]] == [row["tokens"] for row in result["lone"]]
    assert len({tuple(row["tokens"][0]) for row in result["mixed"]}) > 6
