"""Conversion of dense checkpoints whose linears are float8, in the forms in which people publish them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import HIDDEN, INTERMEDIATE, LAYERS, block, build_dense, build_tokenizer
from torch import Tensor

from prunepath_vllm.checkpoint import validate_checkpoint
from prunepath_vllm.conversion import convert as convert_module
from prunepath_vllm.conversion.convert import convert
from prunepath_vllm.conversion.quantize import quantize
from prunepath_vllm.entrypoints import cli
from prunepath_vllm.errors import CheckpointError, ConfigError, UsageError
from prunepath_vllm.families import FAMILIES

pytestmark = pytest.mark.usefixtures("registered")

TEXT = "The quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs.\n" * 20
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
BLOCK = (48, 40)
"""No size of a tiny model is a multiple of both."""


def arguments(**changes) -> dict:
    """A QuantizationArgs as llm-compressor writes it."""
    fields = dict(num_bits=8, type="float", symmetric=True, strategy="channel", dynamic=False, actorder=None)
    return fields | dict(group_size=None, block_structure=None, observer="minmax", observer_kwargs={}) | changes


def compressed(strategy: str, *, static: bool = False, **weights) -> dict:
    activations = arguments(strategy="tensor" if static else "token", dynamic=not static, observer=None)
    group = dict(targets=["Linear"], weights=arguments(strategy=strategy, **weights), input_activations=activations)
    return dict(
        quant_method="compressed-tensors",
        format="float-quantized",
        quantization_status="compressed",
        global_compression_ratio=1.5,
        config_groups={"group_0": group | dict(output_activations=None)},
        ignore=["lm_head"],
        kv_cache_scheme=None,
        sparsity_config={},
        transform_config={},
        version="0.12.2",
    )


FORMS: dict[str, tuple[dict, str, torch.dtype]] = {
    "channel": (compressed("channel"), "weight_scale", torch.bfloat16),
    "tensor": (compressed("tensor", static=True), "weight_scale", torch.float32),
    "compressed block": (compressed("block", block_structure=list(BLOCK)), "weight_scale", torch.bfloat16),
    "fp8": (
        dict(quant_method="fp8", activation_scheme="static", ignored_layers=["lm_head"]),
        "weight_scale",
        torch.float32,
    ),
    "fp8 block": (
        dict(
            quant_method="fp8",
            activation_scheme="dynamic",
            fmt="e4m3",
            modules_to_not_convert=["lm_head"],
            weight_block_size=list(BLOCK),
        ),
        "weight_scale_inv",
        torch.float32,
    ),
}
"""quantization_config, what scales are called, and their dtype."""


def quantised(weight: Tensor, form: str) -> tuple[Tensor, Tensor, Tensor]:
    """float8, scales as published, and their product in float32; plain PyTorch, block by block."""
    out, columns = weight.shape
    rows, width = {"channel": (1, columns), "tensor": (out, columns), "fp8": (out, columns)}.get(form, BLOCK)
    scales = torch.empty(-(-out // rows), -(-columns // width))
    narrow, wide = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(weight.shape)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * rows, (i + 1) * rows), slice(j * width, (j + 1) * width))
            scale = (weight[part].abs().max() / 448).to(FORMS[form][2]).float()
            narrow[part] = (weight[part] / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            wide[part] = narrow[part].float() * scale
            scales[i, j] = scale
    if form in ("tensor", "fp8"):
        scales = scales.reshape(() if form == "fp8" else 1)
    return narrow, scales.to(FORMS[form][2]), wide


def save_float8(family: str, form: str, path: Path, *, dtype=torch.float32, plain: tuple[str, ...] = ()) -> Path:
    """A float8 checkpoint, and beside it, under "dense", the plain one of the dequantised weights."""
    model = build_dense(family)
    tensors = {name: tensor.clone().to(dtype) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    settings, scale_name, _ = FORMS[form]
    dense = {}
    for name, tensor in list(tensors.items()):
        module = name.removesuffix(".weight")
        dense[name] = tensor
        if module != name and module.endswith(LINEARS) and not module.endswith(plain or "-"):
            tensors[name], tensors[f"{module}.{scale_name}"], wide = quantised(tensor.float(), form)
            dense[name] = wide.to(dtype)
            if "static" in json.dumps(settings) or form == "tensor":
                tensors[f"{module}.input_scale"] = torch.tensor(0.5)
    model.config.dtype = str(dtype).removeprefix("torch.")
    config = json.loads(model.config.to_json_string(use_diff=False)) | dict(architectures=[type(model).__name__])
    for directory, content, more in ((path, tensors, dict(quantization_config=settings)), (path / "dense", dense, {})):
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(config | more))
        save_file({name: one.contiguous() for name, one in content.items()}, directory / "model.safetensors")
        build_tokenizer().save_pretrained(directory)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    made = {}

    def get(family, form, **options):
        key = (family, form, *options.items())
        if key not in made:
            made[key] = save_float8(family, form, tmp_path_factory.mktemp("float8") / "model", **options)
        return made[key]

    return get


def logits(path: Path, **kwargs) -> Tensor:
    options: dict = dict(dtype=torch.float32, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval()
    ids = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def wide_tensors(path: Path) -> dict[str, Tensor]:
    """A converted checkpoint's tensors, its experts' scales multiplied in."""
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        scale, weight = tensors.pop(name), name.removesuffix("_scale")
        tensors[weight] = tensors[weight].float() * (scale[None] if "down_proj" in name else scale[:, None])
    return tensors


# --- dequantised -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3"])
def test_the_result_is_that_of_the_dequantised_model(source, tmp_path, family, form):
    path = source(family, form)
    stored = load_file(path / "model.safetensors")
    assert {t.dtype for n, t in stored.items() if n.removesuffix(".weight").endswith(LINEARS)} >= {torch.float8_e4m3fn}
    convert(path, tmp_path / "out")
    convert(path / "dense", tmp_path / "plain")
    got, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    said = config["prunepath_source_weights"]
    assert said.startswith("float8_e4m3fn with a scale per ")
    assert said.endswith("dequantised to float32")
    assert f"Converted from quantised weights: {said}." in (tmp_path / "out" / "README.md").read_text()
    validate_checkpoint(tmp_path / "out", check_values=True)
    torch.testing.assert_close(logits(tmp_path / "out", tau=1.0), logits(path / "dense"), atol=1e-5, rtol=1e-5)


def test_block_scales_have_ragged_edges():
    _, scale, _ = quantised(torch.randn(INTERMEDIATE, HIDDEN), "fp8 block")
    assert scale.shape == (6, 2)
    assert INTERMEDIATE % BLOCK[0]
    assert HIDDEN % BLOCK[1]


def test_blocks_larger_than_the_weights_take_no_memory(source, tmp_path):
    path = shutil.copytree(source("llama", "fp8"), tmp_path / "copy")
    edit(path, quantization_config=dict(quant_method="fp8", weight_block_size=[10**15, 10**15]))
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        tensors[f"{name}_inv"] = tensors.pop(name).reshape(1, 1)
    save_file(tensors, path / "model.safetensors")
    convert(path, tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out", tau=1.0), logits(path / "dense"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_weights_get_the_dtype_that_the_configuration_says(source, tmp_path, dtype):
    path = source("llama", "channel", dtype=dtype)
    convert(path, tmp_path / "out", split="random")
    convert(path / "dense", tmp_path / "plain", split="random")
    got, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert {tensor.dtype for tensor in got.values()} == {dtype}
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_without_a_dtype_that_of_the_embedding_is_taken(source, tmp_path):
    path = shutil.copytree(source("llama", "channel", dtype=torch.bfloat16), tmp_path / "copy")
    edit(path, drop=("dtype",))
    convert(path, tmp_path / "out", split="random")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_linears_that_are_plain_stay_so(source, tmp_path):
    path = source("qwen2", "channel", plain=("o_proj", "down_proj"))
    convert(path, tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out", tau=1.0), logits(path / "dense"), atol=1e-5, rtol=1e-5)


def test_weights_and_their_scales_in_other_files(source, tmp_path):
    path = shutil.copytree(source("llama", "channel"), tmp_path / "copy")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    files = {"a.safetensors": {}, "b.safetensors": {}}
    for name, tensor in tensors.items():
        files["b.safetensors" if name.endswith("_scale") else "a.safetensors"][name] = tensor
    for file, content in files.items():
        save_file(content, path / file)
    weight_map = {name: file for file, content in files.items() for name in content}
    (path / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=weight_map)))
    convert(path, tmp_path / "out")
    convert(source("llama", "channel"), tmp_path / "one")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "one"))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_routers_are_calibrated_and_experts_quantised_afterwards(source, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    path = source("llama", "fp8 block")
    assert cli.main(["convert", str(path), str(tmp_path / "out"), "--calibration-text", str(text)]) == 0
    said = f"float8_e4m3fn with a scale per block of {BLOCK[0]} x {BLOCK[1]} (fp8), dequantised to float32."
    assert f"Source: {said}" in capsys.readouterr().out
    assert said in (tmp_path / "out" / "README.md").read_text()
    assert block(tmp_path / "out")["tau_curve"]
    torch.testing.assert_close(logits(tmp_path / "out", tau=1.0), logits(path / "dense"), atol=1e-5, rtol=1e-5)
    quantize(tmp_path / "out", tmp_path / "int8", "int8")
    assert said in (tmp_path / "int8" / "README.md").read_text()


# --- experts that stay float8 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("gate", ["none", "sigmoid"])
def test_experts_stay_in_float8(source, tmp_path, family, form, gate):
    path = source(family, form)
    convert(path, tmp_path / "out", expert_dtype="float8_e4m3fn", gate=gate)
    convert(path, tmp_path / "plain", gate=gate)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        file.name for file in (tmp_path / "plain").iterdir()
    }
    assert block(tmp_path / "out") == block(tmp_path / "plain") | dict(format_version=2, expert_dtype="float8_e4m3fn")
    validate_checkpoint(tmp_path / "out", check_values=True)
    got, expected = wide_tensors(tmp_path / "out"), load_file(tmp_path / "plain" / "model.safetensors")
    assert got.keys() == expected.keys()
    anew = {"channel": ("down_proj",), "tensor": (), "fp8": ()}.get(form, ("gate_proj", "up_proj", "down_proj"))
    for name, tensor in expected.items():
        if name.removesuffix(".weight").endswith(anew or "-"):
            off = (got[name] - tensor).norm() / tensor.norm()
            assert 0 < off < 0.04
        else:
            assert torch.equal(got[name], tensor), name
    said = json.loads((tmp_path / "out" / "config.json").read_text())["prunepath_source_weights"]
    second = "with the second linears quantised anew"
    how = {"channel": second, "tensor": "as they were", "fp8": "as they were"}
    assert how.get(form, "with the first and second linears quantised anew") in said
    atol = 1e-5 if not anew else 1.0
    torch.testing.assert_close(logits(tmp_path / "out", tau=1.0), logits(path / "dense"), atol=atol, rtol=1e-5)


@pytest.mark.parametrize("gate", ["none", "sigmoid"])
def test_float8_experts_have_the_routers_of_the_dequantised_model(source, tmp_path, gate):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options: dict = dict(router="calibrated", calibration_text=text, gate=gate)
    convert(source("llama", "tensor"), tmp_path / "out", expert_dtype="float8_e4m3fn", **options)
    convert(source("llama", "tensor"), tmp_path / "plain", **options)
    got, expected = wide_tensors(tmp_path / "out"), load_file(tmp_path / "plain" / "model.safetensors")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert block(tmp_path / "out")["tau_curve"] == block(tmp_path / "plain")["tau_curve"]


# --- refused ---------------------------------------------------------------------------------------------------------


def edit(path: Path, drop: tuple[str, ...] = (), **fields) -> None:
    config = json.loads((path / "config.json").read_text()) | fields
    (path / "config.json").write_text(json.dumps({name: value for name, value in config.items() if name not in drop}))


def group(**changes) -> dict:
    settings = compressed("channel")
    settings["config_groups"]["group_0"] |= changes
    return settings


FP8 = dict(quant_method="fp8", activation_scheme="dynamic")
SETTINGS = {
    "awq": (dict(quant_method="awq", bits=4), r"quantization_config: .*'awq'.*expected plain ones, or float8"),
    "gptq": (dict(quant_method="gptq", desc_act=True), "'gptq'"),
    "no method": (dict(bits=4), "None"),
    "string": ("fp8", "quantization_config: expected an object or null, got 'fp8'"),
    "list": (["fp8"], r"quantization_config: expected an object or null, got \['fp8'\]"),
    "int format": (
        compressed("channel") | dict(format="int-quantized"),
        "format: 'int-quantized'; expected 'float-quan",
    ),
    "packed": (compressed("channel") | dict(format="pack-quantized"), "format: 'pack-quantized'"),
    "two groups": (compressed("channel") | dict(config_groups={"a": {}, "b": {}}), "config_groups: .*of one group"),
    "no groups": (compressed("channel") | dict(config_groups=None), "config_groups: None; expected an object"),
    "a group's list": (
        compressed("channel") | dict(config_groups={"a": []}),
        r"config_groups\.a: \[\]; expected an obj",
    ),
    "no weights": (group(weights=None), r"group_0\.weights: None; expected an object"),
    "int4": (group(weights=arguments(num_bits=4, type="int")), r"weights\.num_bits: 4; expected 8"),
    "int8": (group(weights=arguments(type="int")), r"weights\.type: 'int'; expected 'float'"),
    "no type": (group(weights=dict(strategy="channel")), r"weights\.type: 'int'; expected 'float'"),
    "asymmetric": (group(weights=arguments(symmetric=False)), r"weights\.symmetric: False; expected True"),
    "group": (group(weights=arguments(strategy="group", group_size=64)), r"strategy: 'group'; expected 'channel' or"),
    "actorder": (group(weights=arguments(actorder="group")), r"weights\.actorder: 'group'"),
    "dynamic": (group(weights=arguments(dynamic=True)), r"weights\.dynamic: True; expected False"),
    "activations": (group(input_activations=arguments(num_bits=4)), r"input_activations\.num_bits: 4"),
    "outputs": (group(output_activations=arguments()), r"group_0\.output_activations: .*not followed"),
    "a group's format": (group(format="pack-quantized"), r"group_0\.format: 'pack-quantized'"),
    "block structure": (compressed("block", block_structure=[128]), r"block_structure: \[128\]; expected two positive"),
    "cache": (compressed("channel") | dict(kv_cache_scheme=arguments()), "kv_cache_scheme: .*not followed"),
    "transform": (compressed("channel") | dict(transform_config={"r1": 1}), "transform_config: .*not followed"),
    "sparsity": (compressed("channel") | dict(sparsity_config={"format": "sparse-24"}), "sparsity_config: .*sparse-24"),
    "ignore": (compressed("channel") | dict(ignore="lm_head"), "ignore: 'lm_head'; expected a list of names"),
    "block size": (FP8 | dict(weight_block_size=[128, 0]), r"weight_block_size: \[128, 0\]; expected two positive"),
    "fmt": (FP8 | dict(fmt="e5m2"), "fmt: 'e5m2'; expected 'e4m3'"),
    "scale_fmt": (FP8 | dict(scale_fmt="ue8m0"), "scale_fmt: 'ue8m0'; expected 'float'"),
    "scheme": (FP8 | dict(activation_scheme="other"), "activation_scheme: 'other'; expected 'dynamic' or 'static'"),
    "fp8's cache": (FP8 | dict(kv_cache_scheme="static"), "kv_cache_scheme: 'static'; expected none"),
    "modules": (FP8 | dict(modules_to_not_convert=[1]), r"modules_to_not_convert: \[1\]; expected a list of names"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_other_quantisations_are_refused_by_name(source, tmp_path, monkeypatch, case):
    settings, message = SETTINGS[case]
    path = shutil.copytree(source("llama", "channel"), tmp_path / "copy")
    edit(path, quantization_config=settings)
    monkeypatch.setattr(convert_module, "read_tensor_index", None)
    with pytest.raises(ConfigError, match=message):
        convert(path, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["copy"]


def test_float_quantised_with_dense_sparsity_is_read(source, tmp_path):
    path = shutil.copytree(source("llama", "channel"), tmp_path / "copy")
    edit(path, quantization_config=compressed("channel") | dict(sparsity_config=dict(format="dense", targets=[])))
    convert(path, tmp_path / "out", split="random")


NAME = "model.layers.1.mlp.up_proj"
ATTENTION = "model.layers.2.self_attn.o_proj"


def scale(module, change):
    return lambda t: t.update({f"{module}.weight_scale": change(t[f"{module}.weight_scale"])})


def filled(value):
    return lambda old: old.index_fill(0, torch.tensor([3]), value)


TENSORS = {
    "missing": (lambda t: t.pop(f"{NAME}.weight_scale"), rf"{NAME}.weight_scale is missing; .*\[{INTERMEDIATE}, 1\]"),
    "missing in attention": (lambda t: t.pop(f"{ATTENTION}.weight_scale"), rf"{ATTENTION}.weight_scale is missing"),
    "shape": (scale(NAME, lambda old: old[:, 0]), rf"{NAME}.weight_scale has shape \[{INTERMEDIATE}\].*expected shape"),
    "dtype": (scale(NAME, lambda old: old.to(torch.int32)), rf"{NAME}.weight_scale .*dtype I32; expected"),
    "nan": (scale(NAME, filled(torch.nan)), rf"{NAME}.weight_scale: 1 of {INTERMEDIATE} values are NaN or infinite"),
    "zero": (scale(ATTENTION, filled(0.0)), rf"{ATTENTION}.weight_scale: 1 of {HIDDEN} scales are zero or negative"),
    "negative": (scale(NAME, filled(-1.0)), rf"{NAME}.weight_scale: 1 of {INTERMEDIATE} scales are zero or negative"),
    "e5m2": (
        lambda t: t.update({f"{NAME}.weight": t[f"{NAME}.weight"].float().to(torch.float8_e5m2)}),
        rf"{NAME}.weight .*dtype F8_E5M2; expected",
    ),
    "int8": (
        lambda t: t.update({f"{NAME}.weight": t[f"{NAME}.weight"].to(torch.int8)}),
        rf"{NAME}.weight .*I8; expected",
    ),
    "plain with scales": (
        lambda t: t.update({f"{NAME}.weight": t[f"{NAME}.weight"].float()}),
        rf"{NAME}.weight_scale .*belongs to no float8 weight",
    ),
    "zero point": (
        lambda t: t.update({f"{NAME}.weight_zero_point": torch.zeros(INTERMEDIATE, 1)}),
        rf"{NAME}.weight_zero_point .*expected none such",
    ),
    "cache": (
        lambda t: t.update({"model.layers.0.self_attn.k_scale": torch.ones(1)}),
        r"model.layers.0.self_attn.k_scale .*expected none such",
    ),
    "other scales": (
        lambda t: t.update({f"{NAME}.weight_scale_inv": torch.ones(INTERMEDIATE, 1)}),
        rf"{NAME}.weight_scale_inv .*expected none such",
    ),
    "ignored": (
        lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}),
        r"lm_head.weight .*expected a plain one, as quantization_config says",
    ),
    "float8 bias": (
        lambda t: t.update({f"{NAME}.bias": torch.zeros(INTERMEDIATE).to(torch.float8_e4m3fn)}),
        rf"{NAME}.bias .*expected none such",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_wrong_tensors_are_named_before_any_work(source, tmp_path, monkeypatch, case):
    change, message = TENSORS[case]
    path = shutil.copytree(source("llama", "channel"), tmp_path / "copy")
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    monkeypatch.setattr(convert_module, "neuron_orders", None)
    with pytest.raises(CheckpointError, match=f"tensor {message}"):
        convert(path, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize("options", [{}, dict(expert_dtype="float8_e4m3fn")], ids=["dequantised", "float8"])
def test_a_nan_in_a_weight_leaves_nothing_behind(source, tmp_path, options):
    path = shutil.copytree(source("llama", "channel"), tmp_path / "copy")
    tensors = load_file(path / "model.safetensors")
    tensors[f"{NAME}.weight"].view(torch.uint8)[0, 5] = 0xFF
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{NAME}.weight: 1 of \d+ values are NaN"):
        convert(path, tmp_path / "out", **options)
    assert [file.name for file in tmp_path.iterdir()] == ["copy"]


def test_a_dtype_to_dequantise_to_is_needed(source, tmp_path):
    path = shutil.copytree(source("llama", "channel"), tmp_path / "copy")
    edit(path, dtype="float8_e4m3fn")
    with pytest.raises(ConfigError, match="dtype: 'float8_e4m3fn'; expected what to dequantise to, one of float32"):
        convert(path, tmp_path / "out")


def test_float8_without_a_quantization_config_is_refused(source, tmp_path):
    path = shutil.copytree(source("llama", "channel"), tmp_path / "copy")
    edit(path, drop=("quantization_config",))
    with pytest.raises(CheckpointError, match=r"weight has dtype F8_E4M3, and config.json no quantization_config"):
        convert(path, tmp_path / "out")


def test_weights_that_are_stored_transposed_are_refused(dense_checkpoint, tmp_path):
    path = shutil.copytree(dense_checkpoint("gpt2"), tmp_path / "copy")
    edit(path, quantization_config=FP8)
    with pytest.raises(ConfigError, match="quantization_config: 'fp8'; expected plain weights in this family"):
        convert(path, tmp_path / "out")


def test_arguments_that_do_not_go_with_the_source(source, dense_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module, "neuron_orders", None)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    for path, options, message in (
        (
            dense_checkpoint("llama"),
            dict(expert_dtype="float8_e4m3fn"),
            "these are plain; expected .*prunepath quantize",
        ),
        (source("llama", "channel"), dict(expert_dtype="int8"), "expert dtype: 'int8'; expected float8_e4m3fn"),
        (
            source("qwen2", "channel", plain=("o_proj", "down_proj")),
            dict(expert_dtype="float8_e4m3fn"),
            r"layers\.0\.mlp\.down_proj\.weight is plain; expected float8",
        ),
        (
            source("llama", "channel"),
            dict(split="coactivation", calibration_text=text),
            "split coactivation runs the dense model, which is float8_e4m3fn with a scale per channel",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            convert(path, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    source_path = str(dense_checkpoint("llama"))
    assert cli.main(["convert", source_path, str(tmp_path / "out"), "--expert-dtype", "float8_e4m3fn"]) == 2


def test_every_layer_of_a_family_was_quantised(source):
    """What the tests above are about."""
    row = next(row for row in FAMILIES if row.name == "llama")
    stored = load_file(source("llama", "channel") / "model.safetensors")
    for layer in range(LAYERS):
        for name in (*row.inputs(layer), row.output(layer), f"model.layers.{layer}.self_attn.q_proj"):
            assert stored[f"{name}.weight"].dtype == torch.float8_e4m3fn
