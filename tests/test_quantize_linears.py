"""``prunepath quantize --linears``: attention in compressed-tensors' form, from the command to the engine."""

import json
import re
import shutil

import pytest
import torch
from naive import load_naive, logits_of_answer, naive_generate, naive_logits
from safetensors.torch import load_file, save_file
from test_engine import run_engine
from tiny_models import GLU_MODELS, LAYERS, tokens
from transformers import AutoConfig, AutoModelForCausalLM

from prunepath_vllm.benchmarks import shapes
from prunepath_vllm.checkpoint import validate_checkpoint
from prunepath_vllm.conversion.quantize import quantize
from prunepath_vllm.conversion.rewrite import rewrite_checkpoint
from prunepath_vllm.entrypoints import cli
from prunepath_vllm.errors import CheckpointError, ConfigError, UsageError
from prunepath_vllm.linears import LINEAR_DTYPES

pytestmark = pytest.mark.usefixtures("registered")

LARGEST = {"int8": 127, "float8_e4m3fn": 448}
STORED = {"int8": "I8", "float8_e4m3fn": "F8_E4M3"}
Q_PROJ = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def quantised(quantised):
    """``quantised(family, dtype, **options)``: experts in int8, the attention's linears in `dtype`."""
    return lambda family, dtype, **options: quantised(family, "int8", linears=dtype, **options)


def attention_weights(tensors):
    return sorted(name for name in tensors if re.search(r"self_attn\.\w+_proj\.weight$", name))


def edited(path, destination, edit=None, change=None):
    """A copy with another config.json or other tensors."""
    shutil.copytree(path, destination)
    if edit is not None:
        config = json.loads((destination / "config.json").read_text())
        edit(config)
        (destination / "config.json").write_text(json.dumps(config))
    if change is not None:
        tensors = load_file(destination / "model.safetensors")
        change(tensors)
        save_file(tensors, destination / "model.safetensors", {"format": "pt"})
    return destination


# --- the format ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LINEAR_DTYPES)
@pytest.mark.parametrize("family", GLU_MODELS)
def test_every_family_equals_the_reference(prunepath_checkpoint, quantised, family, dtype):
    source, path = prunepath_checkpoint(family), quantised(family, dtype)
    before, after = load_file(source / "model.safetensors"), load_file(path / "model.safetensors")
    weights = attention_weights(before)
    assert len(weights) == LAYERS * (2 if family == "phi3" else 4)
    for name in weights:
        stored, scale = after.pop(name), after.pop(f"{name}_scale")
        rows, amax = before[name].float(), before[name].float().abs().amax(1, keepdim=True)
        assert (scale.dtype, scale.shape) == (torch.float32, (len(rows), 1))
        assert torch.equal(scale, amax / LARGEST[dtype])
        narrow = rows / scale
        expected = (narrow.round() if dtype == "int8" else narrow).to(getattr(torch, dtype))
        assert stored.dtype == expected.dtype
        assert torch.equal(stored.float(), expected.float()), name
    for name in after:  # biases, norms, embeddings, head and routers
        if "mlp" not in name or "router" in name:
            assert torch.equal(after[name], before[name]), name
    assert validate_checkpoint(path, check_values=True).linear_dtype == dtype
    assert f"{dtype}, a scale per output channel" in (path / "README.md").read_text()


@pytest.mark.parametrize("dtype", LINEAR_DTYPES)
def test_compressed_tensors_own_reader_takes_the_configuration(quantised, dtype):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    settings = json.loads((quantised("llama", dtype) / "config.json").read_text())["quantization_config"]
    parsed = quantization.QuantizationConfig.model_validate(settings)
    (group,) = parsed.config_groups.values()
    kind = {"int8": "int", "float8_e4m3fn": "float"}[dtype]
    assert (parsed.format, group.targets) == (f"{kind}-quantized", ["Linear"])
    for arguments, strategy, dynamic in ((group.weights, "channel", False), (group.input_activations, "token", True)):
        assert (arguments.num_bits, arguments.type, arguments.symmetric) == (8, kind, True)
        assert (arguments.strategy, arguments.dynamic) == (strategy, dynamic)
    for module in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.router"):
        assert f"model.layers.{LAYERS - 1}.{module}" in parsed.ignore
    assert "lm_head" in parsed.ignore
    assert not any("self_attn" in name for name in parsed.ignore)


def settings(**changes):
    return lambda config: config["quantization_config"].update(changes)


def in_group(part, **changes):
    return lambda config: config["quantization_config"]["config_groups"]["group_0"][part].update(changes)


OTHER_FORMS = {
    "fp8": (settings(quant_method="fp8"), "quantization_config.quant_method: 'fp8'; expected 'compressed-tensors'"),
    "packed": (settings(format="pack-quantized"), "quantization_config.format: 'pack-quantized'; expected "),
    "list": (settings(format=["int-quantized"]), r"quantization_config.format: \['int-quantized'\]; expected "),
    "cache": (settings(kv_cache_scheme=dict(num_bits=8)), "kv_cache_scheme: .*; expected none"),
    "groups": (settings(config_groups={}), "config_groups.group_0: None; expected an object"),
    "bits": (in_group("weights", num_bits=4), r"group_0.weights.num_bits: 4; expected 8"),
    "strategy": (in_group("weights", strategy="tensor"), r"weights.strategy: 'tensor'; expected 'channel'"),
    "static": (in_group("input_activations", dynamic=False), r"input_activations.dynamic: False; expected True"),
    "order": (in_group("weights", actorder="group"), r"weights.actorder: 'group'; expected none"),
    "ignored": (
        lambda config: config["quantization_config"]["ignore"].append(Q_PROJ),
        f"quantization_config.ignore: '{Q_PROJ}' is there",
    ),
    "router": (
        lambda config: config["quantization_config"]["ignore"].remove("model.layers.2.mlp.router"),
        "quantization_config.ignore: 'model.layers.2.mlp.router' is missing",
    ),
    "layers": (
        lambda config: config.update(num_hidden_layers=10**12),
        r"quantization_config.ignore: .*; expected names in each of 1000000000000 layers",
    ),
    "experts": (
        lambda config: config["prunepath_config"].pop("expert_dtype"),
        "quantization_config: 'compressed-tensors'; expected none without prunepath_config.expert_dtype",
    ),
}


@pytest.mark.parametrize("case", OTHER_FORMS)
def test_another_form_is_refused_by_every_reader(quantised, tmp_path, case):
    from vllm.engine.arg_utils import EngineArgs

    edit, message = OTHER_FORMS[case]
    path = edited(quantised("llama", "int8"), tmp_path / "copy", edit)
    for read in (validate_checkpoint, AutoConfig.from_pretrained):
        with pytest.raises(ConfigError, match=message):
            read(path)
    with pytest.raises(ValueError, match=message):  # vLLM wraps it
        EngineArgs(str(path)).create_model_config()


def test_what_transformers_adds_to_the_configuration_changes_nothing(quantised, tmp_path):
    def edit(config):
        found = config["quantization_config"]
        found |= dict(kv_cache_scheme=None, sparsity_config={}, global_compression_ratio=1.2, version="0.17.0")
        found["ignore"].reverse()
        found["config_groups"]["group_0"]["weights"] |= dict(group_size=None, observer="minmax")

    path = edited(quantised("llama", "int8"), tmp_path / "copy", edit)
    assert validate_checkpoint(path).linear_dtype == "int8"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q_PROJ}.weight_scale"), rf"{Q_PROJ}.weight_scale is missing; expected shape \[64, 1\]"),
        (lambda t: t.pop(f"{Q_PROJ}.weight"), rf"{Q_PROJ}.weight is missing; expected \[outputs, inputs\] in int8"),
        (
            lambda t: t.update({f"{Q_PROJ}.weight_scale": torch.ones(64)}),
            rf"{Q_PROJ}.weight_scale has shape \[64\]; expected \[64, 1\]",
        ),
        (
            lambda t: t.update({f"{Q_PROJ}.weight_scale": torch.ones(64, 1).half()}),
            f"{Q_PROJ}.weight_scale has dtype F16; expected F32",
        ),
        (lambda t: t.update({f"{Q_PROJ}.weight": torch.ones(64, 64)}), f"{Q_PROJ}.weight has dtype F32; expected I8"),
        (
            lambda t: t.update({"model.norm.weight_scale": torch.ones(1)}),
            "model.norm.weight_scale is unexpected; expected scales only of",
        ),
    ],
    ids=["scale", "weight", "shape", "dtype", "plain", "extra"],
)
def test_a_wrong_tensor_is_named(quantised, tmp_path, change, message):
    path = edited(quantised("llama", "int8"), tmp_path / "copy", change=change)
    for read in (validate_checkpoint, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=f"tensor {message}"):
            read(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.nan, "of 64 values are NaN or infinite"),
        (0.0, "of 64 scales are zero"),
        (-1.0, "of 64 scales are zero or neg"),
    ],
)
def test_a_wrong_scale_is_named_by_every_reader(quantised, tmp_path, value, message):
    path = edited(
        quantised("llama", "float8_e4m3fn"),
        tmp_path / "copy",
        change=lambda tensors: tensors[f"{Q_PROJ}.weight_scale"][3].fill_(value),
    )
    for read in (lambda path: validate_checkpoint(path, check_values=True), AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=f"{Q_PROJ}.weight_scale: 1 {message}"):
            read(path)


def test_scales_without_the_configuration_are_unexpected(quantised, tmp_path):
    path = edited(quantised("llama", "int8"), tmp_path / "copy", lambda config: config.pop("quantization_config"))
    with pytest.raises(CheckpointError, match="weight_scale is unexpected"):
        validate_checkpoint(path)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "least", "most"), [("int8", 0.002, 0.02), ("float8_e4m3fn", 0.015, 0.06)])
def test_the_command_tells_every_linears_error(prunepath_checkpoint, tmp_path, capsys, dtype, least, most):
    source, path = prunepath_checkpoint("qwen3"), tmp_path / "out"
    assert cli.main(["quantize", str(source), str(path), "--expert-dtype", "int8", "--linears", dtype]) == 0
    rows = re.findall(r"^ +([\d.]+)% +([\d.]+)%  (\S+)$", capsys.readouterr().out, re.MULTILINE)
    before, after = load_file(source / "model.safetensors"), load_file(path / "model.safetensors")
    assert sorted(f"{name}.weight" for *_, name in rows) == attention_weights(before)
    for weights, function, name in rows:
        was = before[f"{name}.weight"].float()
        off = (after[f"{name}.weight"].float() * after[f"{name}.weight_scale"] - was).norm() / was.norm()
        assert abs(off - float(weights) / 100) < 1e-4
        assert least < off < float(function) / 100 < most
    assert cli.main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["linear_dtype"] == dtype
    assert cli.main(["inspect", str(path)]) == 0
    assert f"{dtype}, a scale per output" in capsys.readouterr().out


def test_quantisation_refuses_before_any_work(prunepath_checkpoint, quantised, tmp_path, monkeypatch):
    monkeypatch.setattr("prunepath_vllm.conversion.quantize.new_directory", None)
    for src, linears, message in (
        (prunepath_checkpoint("llama"), "int4", "linears: 'int4'; expected one of float8_e4m3fn, int8"),
        (prunepath_checkpoint("gpt2"), "int8", "linears: 'int8' for gpt2; expected no such option, or a family"),
        (prunepath_checkpoint("roberta"), "int8", "linears: 'int8' for roberta; expected no such option"),
        (quantised("llama", "int8"), "int8", "expert_dtype 'int8': already quantised; expected"),
    ):
        with pytest.raises(UsageError, match=message):
            quantize(src, tmp_path / "out", "int8", linears=linears)
        assert not (tmp_path / "out").exists()


def test_the_configuration_of_such_a_checkpoint_can_be_rewritten(quantised, tmp_path):
    path = shutil.copytree(quantised("llama", "int8"), tmp_path / "copy")
    rewrite_checkpoint(validate_checkpoint(path), {}, tau_curve=[[0.5, 0.4], [1.0, 0.0]])
    assert validate_checkpoint(path, check_values=True).linear_dtype == "int8"


# --- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LINEAR_DTYPES)
@pytest.mark.parametrize("family", GLU_MODELS)
def test_models_equal_the_dequantised_weights(quantised, family, dtype):
    path = quantised(family, dtype)
    model, naive, ids = AutoModelForCausalLM.from_pretrained(path), load_naive(path), tokens(2, 9)
    with torch.no_grad():
        logits = model(ids, tau=[0.5, 1.0]).logits
    for index, tau in enumerate((0.5, 1.0)):
        expected = naive_logits(naive, ids[index].tolist(), tau)
        torch.testing.assert_close(logits[index], expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("dtype", LINEAR_DTYPES)
def test_generation_and_saving(quantised, tmp_path, dtype):
    path, ids = quantised("qwen2", dtype), tokens(1, 8)
    model = AutoModelForCausalLM.from_pretrained(path)
    got = model.generate(ids, tau=0.6, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert got[0, 8:].tolist() == naive_generate(load_naive(path), ids[0].tolist(), 0.6, 6)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "saved")
    before, after = (load_file(one / "model.safetensors") for one in (path, tmp_path / "saved"))
    for name in attention_weights(before):
        for tensor in (name, f"{name}_scale"):
            assert after[tensor].dtype == before[tensor].dtype
            assert torch.equal(after[tensor].float(), before[tensor].float())
    assert validate_checkpoint(tmp_path / "saved", check_values=True).linear_dtype == dtype
    # The class itself, and a field of its configuration.
    again = type(model).from_pretrained(tmp_path / "saved", dtype=torch.bfloat16, use_cache=False)
    assert (again.dtype, again.config.use_cache) == (torch.bfloat16, False)


# --- the engine ------------------------------------------------------------------------------------------------------


def quantise_activations(model, dtype):
    """Make a naive model quantise what enters its attention's linears, a token at a time."""

    def narrow(_, args):
        (x,) = args
        scale = (x.abs().amax(-1, keepdim=True) / LARGEST[dtype]).clamp(min=1e-12)
        if dtype == "int8":
            return ((x / scale).round() * scale,)
        return ((x / scale).to(torch.float8_e4m3fn).float() * scale,)

    for layer in model.model.layers:
        for linear in (module for module in layer.self_attn.modules() if isinstance(module, torch.nn.Linear)):
            linear.register_forward_pre_hook(narrow)
    return model


def below_the_best(rows, model):
    """How far a generated token's logit lies below the model's best, at most."""
    worst = 0.0
    for row in rows:
        for new in row["tokens"]:
            logits = logits_of_answer(model, row["prompt"], new, row["tau"])
            chosen = logits.gather(1, torch.tensor(new).unsqueeze(1)).squeeze(1)
            worst = max(worst, float((logits.max(-1).values - chosen).max()))
    return worst


@pytest.mark.parametrize(
    ("family", "dtype", "runner"), [("llama", "int8", "v1"), ("qwen2", "float8_e4m3fn", "v2"), ("phi3", "int8", "v1")]
)
def test_the_engine_equals_the_naive_model(quantised, family, dtype, runner):
    """Mixed taus in one batch and alone: the naive model with dequantised weights and quantised activations.

    Phi-3 is compiled. Logits have a standard deviation of 1.2. Without the quantisation of activations tokens lie up to
    1.8 below the best; with it nothing but an activation that rounds the other way leaves one below.
    """
    checkpoint = quantised(family, dtype, default_tau=0.6)
    result = run_engine("decoder", checkpoint, runner, eager=family != "phi3")
    model = quantise_activations(load_naive(checkpoint), dtype)
    assert below_the_best([*result["mixed"], *result["shared_prefix"]], model) < 0.05
    assert [row["tokens"] for row in result["mixed"]] == [row["tokens"] for row in result["lone"]]
    assert len({tuple(row["tokens"][0]) for row in result["mixed"]}) > 4


def test_weights_loaded_again(prunepath_checkpoint, quantised, tmp_path):
    checkpoint, changed = quantised("llama", "float8_e4m3fn"), quantised("llama", "float8_e4m3fn", seed=7)
    plain, other = tmp_path / "plain", quantised("llama", "int8")
    quantize(prunepath_checkpoint("llama"), plain, "int8")
    refused = dict(refused=[str(plain), str(other)], refused_tensors=str(other))
    result = run_engine("reload", checkpoint, changed=str(changed), **refused)
    rows = result["rows"]
    for name, path in (("before", checkpoint), ("changed", changed)):
        assert below_the_best(rows[name], quantise_activations(load_naive(path), "float8_e4m3fn")) < 0.05
    assert rows["same"] == rows["back"] == rows["before"]
    assert rows["after refusals"] == rows["sent"] == rows["changed"]
    *checkpoints, tensors = result["refused"]
    for said, found in zip(checkpoints, ("None", "'int8'"), strict=True):
        assert f"quantization_config says {found}; the engine was built for 'float8_e4m3fn'" in said
    assert "is torch.int8; expected torch.float8_e4m3fn" in tensors


def test_int8_is_not_loaded_again_on_a_cpu(quantised):
    """vLLM's own reloading leaves oneDNN's packed weights as they are, and changes their scales."""
    result = run_engine("reload_refused", quantised("llama", "int8"))
    assert "vLLM does not load int8 linears again on a CPU" in result["refused"]
    assert result["after"] == result["before"]


def test_what_a_device_does_not_compute_is_refused_by_name(quantised, monkeypatch):
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(ValueError, match=r"'int-quantized' with LoRA adapters \(--enable-lora\) on a CPU; expected"):
        EngineArgs(str(quantised("llama", "int8")), enable_lora=True).create_engine_config()
    can = torch.cpu.get_capabilities()
    without = can | dict(architecture="x86_64", avx512_vnni=False, avx_vnni=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: without)
    message = "quantization_config.format: 'int-quantized' on a processor without VNNI, .*; expected 'float-quantized'"
    with pytest.raises(ValueError, match=message):
        EngineArgs(str(quantised("llama", "int8"))).create_engine_config()
    EngineArgs(str(quantised("llama", "float8_e4m3fn"))).create_engine_config()


def test_vllms_own_quantisation_is_refused_by_name(prunepath_checkpoint, quantised):
    from vllm.engine.arg_utils import EngineArgs

    for path, options in (
        (prunepath_checkpoint("llama"), dict(quantization="fp8")),
        (prunepath_checkpoint("llama"), dict(quantization="compressed-tensors")),
    ):
        with pytest.raises(ValueError, match="do not support quantization"):
            EngineArgs(str(path), **options).create_engine_config()


# --- how much is stored ----------------------------------------------------------------------------------------------


def stored_bytes(path, **options) -> int:
    """What a checkpoint of a configuration stores, found from a model without memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.bfloat16, **options)
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def test_bytes_are_counted_as_a_checkpoint_stores_them(prunepath_checkpoint, tmp_path):
    quantize(prunepath_checkpoint("llama", dtype=torch.bfloat16), tmp_path / "out", "int8", linears="float8_e4m3fn")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    config = tmp_path / "config"
    edited(tmp_path / "out", config, lambda content: content.pop("quantization_config"))
    expected = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert stored_bytes(config, linear_dtype="float8_e4m3fn") == expected


@pytest.mark.parametrize(("expert_size", "both", "experts"), [(32, 0.580, 0.634), (8, 0.603, 0.657)])
def test_qwen2_7b_in_float8_is_three_fifths_of_the_dense_model(tmp_path, expert_size, both, experts):
    """Routers, embeddings and lm_head stay in bfloat16."""
    dense = stored_bytes(shapes.write_config("qwen2-7b", tmp_path / "dense", sparse=False))
    sparse = shapes.write_config(
        "qwen2-7b", tmp_path / "sparse", sparse=True, expert_size=expert_size, expert_dtype="float8_e4m3fn"
    )
    share = stored_bytes(sparse, linear_dtype="float8_e4m3fn") / dense
    assert share == pytest.approx(both, abs=5e-4)
    assert share <= {32: 0.59, 8: 0.61}[expert_size]
    assert stored_bytes(sparse) / dense == pytest.approx(experts, abs=5e-4)
