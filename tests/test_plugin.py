"""Registration: light to import, idempotent, refused outside the tested engine range, never a silent dense fallback."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prunepath_vllm import plugin
from prunepath_vllm.engine_version import check_engine_version
from prunepath_vllm.errors import ConfigError, EngineVersionError
from prunepath_vllm.families import FAMILIES


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env})


def test_importing_the_package_imports_neither_torch_nor_vllm():
    code = "import sys, prunepath_vllm; assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)"
    process = run(code)
    assert process.returncode == 0, process.stderr


def test_entry_point_is_declared():
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="vllm.general_plugins", name="prunepath")
    assert entry.load() is plugin.register


def test_register_twice_makes_every_architecture_known_once():
    import prunepath_vllm

    prunepath_vllm.register()
    prunepath_vllm.register()
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for family in FAMILIES:
        assert family.architecture in ModelRegistry.get_supported_archs()
        assert family.architecture in MODELS_CONFIG_MAP
        assert AutoConfig.for_model(family.model_type).model_type == family.model_type


def test_register_names_engine_models_without_importing_them():
    process = run(
        "import sys; from prunepath_vllm import plugin; plugin.register(); import torch;"
        "loaded = [m for m in sys.modules if m.startswith('prunepath_vllm.model_executor.models')];"
        "assert not loaded, loaded; assert not torch.cuda.is_initialized()"
    )
    assert process.returncode == 0, process.stderr[-2000:]


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0.0", "0.34.0rc1+cpu", "dev"])
def test_untested_engine_is_refused_with_both_versions(monkeypatch, version):
    import vllm

    import prunepath_vllm

    monkeypatch.setattr(vllm, "__version__", version)
    for register in (plugin.register, prunepath_vllm.register):
        with pytest.raises(EngineVersionError) as error:
            register()
        assert version in str(error.value)
        assert ">= 0.32, < 0.34" in str(error.value)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.0+cpu", "0.33.0", "0.33.1"])
def test_tested_engines_are_accepted(monkeypatch, version):
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    check_engine_version()


def test_moved_internals_are_named(monkeypatch):
    from prunepath_vllm.model_executor import compat

    with pytest.raises(EngineVersionError, match="nowhere"):
        compat.wrap_once(compat, "nowhere", lambda original: original)


def test_an_engine_without_the_plugin_refuses_the_checkpoint(prunepath_checkpoint):
    checkpoint = prunepath_checkpoint("llama", default_tau=0.6)
    process = run(
        f"from vllm import LLM; LLM({str(checkpoint)!r}, enforce_eager=True)",
        VLLM_PLUGINS="",
        VLLM_CPU_KVCACHE_SPACE="1",
        HF_HUB_OFFLINE="1",
    )
    assert process.returncode != 0
    assert "prunepath_llama" in process.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (dict(additional_config={"prunepath": {"default_tau": 3}}), "default_tau must be a number in (0, 1.05], got 3"),
        (dict(additional_config={"prunepath": {"tau": 0.5}}), "unknown key 'tau'"),
        (dict(worker_cls="vllm.v1.worker.xpu_worker.XPUWorker"), "worker_cls"),
        (dict(quantization="fp8"), "quantization"),
        (dict(load_format="sharded_state"), "weights in another layout (load_format sharded_state)"),
        (dict(load_format="tensorizer"), "load_format tensorizer"),
        (dict(load_format="gguf"), "load_format gguf"),
        (dict(hf_overrides={"model_type": "llama"}), "another model_type (--hf-overrides)"),
        (dict(additional_config={"min_tau": 0.5}), "additional_config.min_tau: is not read"),
        (dict(additional_config={"PrunePath": {"min_tau": 0.5}}), "additional_config.PrunePath: is not read"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_unsupported_engine_settings_are_refused_by_name(prunepath_checkpoint, arguments, named):
    from vllm.engine.arg_utils import EngineArgs

    checkpoint = prunepath_checkpoint("llama", default_tau=0.6)
    with pytest.raises(ValueError, match=re.escape(named)):
        EngineArgs(model=str(checkpoint), **arguments).create_engine_config()


@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_a_configuration_of_another_kind_than_the_weights_is_refused(prunepath_checkpoint, dense_checkpoint, family):
    from vllm.engine.arg_utils import EngineArgs

    ours, dense = (
        (prunepath_checkpoint(family, default_tau=0.6), f"prunepath_{family}"),
        (dense_checkpoint(family), family),
    )
    for (weights, stored), (config, served) in ((ours, dense), (dense, ours)):
        said = (
            f"--hf-config-path: {config} is of model_type {served!r}; expected {stored!r}, as the weights in {weights}"
        )
        with pytest.raises(ValueError, match=re.escape(said)):
            EngineArgs(model=str(weights), hf_config_path=str(config)).create_engine_config()
        EngineArgs(model=str(weights), hf_config_path=str(weights)).create_engine_config()


@pytest.mark.parametrize(
    ("field", "value"), [("num_experts", 3), ("expert_size", 3), ("router", {"input": "attention"})]
)
def test_overrides_that_do_not_fit_the_checkpoint_are_refused_by_field(prunepath_checkpoint, field, value):
    from vllm.engine.arg_utils import EngineArgs

    checkpoint = prunepath_checkpoint("llama", default_tau=0.6)
    block = json.loads((checkpoint / "config.json").read_text())["prunepath_config"]
    block |= {field: value, "format_version": 2}
    with pytest.raises(
        ValueError, match=rf"prunepath_config.{field}: .* \(--hf-overrides or --hf-config-path\); expected"
    ):
        EngineArgs(model=str(checkpoint), hf_overrides={"prunepath_config": block}).create_engine_config()
    block = {**json.loads((checkpoint / "config.json").read_text())["prunepath_config"], "default_tau": 0.3}
    config = EngineArgs(model=str(checkpoint), hf_overrides={"prunepath_config": block}).create_engine_config()
    assert config.model_config.hf_config.prunepath.default_tau == 0.3


@pytest.mark.parametrize("family", ["gpt2", "roberta"])
def test_lora_is_refused_where_the_engine_or_we_know_no_adapters(prunepath_checkpoint, family):
    from vllm.engine.arg_utils import EngineArgs

    checkpoint = prunepath_checkpoint(family, default_tau=0.6)
    with pytest.raises(ValueError, match=rf"LoRA adapters \(--enable-lora\) for {family}; expected it to be off"):
        EngineArgs(model=str(checkpoint), enable_lora=True).create_engine_config()


def connector(name: str, **extra) -> dict:
    return {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": extra}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (dict(kv_transfer_config=connector("ExampleConnector")), "ExampleConnector"),
        (dict(kv_transfer_config=connector("NixlConnector")), "NixlConnector"),
        (
            dict(kv_transfer_config={**connector("OffloadingConnector"), "kv_connector_module_path": "mine"}),
            "OffloadingConnector of mine",
        ),
        (
            dict(kv_transfer_config=connector("OffloadingConnector", spec_name="TieringOffloadingSpec")),
            "OffloadingConnector with spec_name TieringOffloadingSpec",
        ),
        (
            dict(
                kv_transfer_config=connector(
                    "MultiConnector", connectors=[connector("OffloadingConnector"), connector("HF3FSKVConnector")]
                )
            ),
            "HF3FSKVConnector",
        ),
        (dict(kv_offloading_size=1, kv_offloading_backend="lmcache"), "of kv_offloading_backend lmcache"),
        (
            dict(
                kv_offloading_size=1,
                kv_transfer_config=connector("OffloadingConnector", spec_name="TieringOffloadingSpec"),
            ),
            "OffloadingConnector with spec_name TieringOffloadingSpec",
        ),
    ],
    ids=["example", "nixl", "out-of-tree", "tiering", "in-multi", "lmcache", "native-tiering"],
)
def test_kv_connectors_that_may_mix_taus_are_refused_by_name(prunepath_checkpoint, arguments, named):
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import EngineArgs

    if "kv_transfer_config" in arguments:
        arguments = arguments | {"kv_transfer_config": KVTransferConfig(**arguments["kv_transfer_config"])}
    checkpoint = prunepath_checkpoint("llama", default_tau=0.6)
    with pytest.raises(ValueError, match=re.escape(f"do not support the KV connector {named}, which is not known")):
        EngineArgs(model=str(checkpoint), **arguments).create_engine_config()


@pytest.mark.parametrize(
    "arguments",
    [
        dict(kv_offloading_size=1),
        dict(kv_transfer_config=connector("SimpleCPUOffloadConnector")),
        dict(kv_transfer_config=connector("MultiConnector", connectors=[connector("OffloadingConnector")])),
    ],
    ids=["native", "simple", "multi"],
)
def test_kv_connectors_that_go_by_block_hashes_are_accepted(prunepath_checkpoint, arguments):
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import EngineArgs

    if "kv_transfer_config" in arguments:
        arguments = arguments | {"kv_transfer_config": KVTransferConfig(**arguments["kv_transfer_config"])}
    checkpoint = prunepath_checkpoint("llama", default_tau=0.6)
    config = EngineArgs(model=str(checkpoint), **arguments).create_engine_config()
    assert config.kv_transfer_config.kv_connector


def test_a_front_end_that_checks_nothing_is_refused_by_name(prunepath_checkpoint, monkeypatch):
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    checkpoint = prunepath_checkpoint("llama", default_tau=0.6)
    with pytest.raises(ValueError, match="Rust front end"):
        EngineArgs(model=str(checkpoint)).create_engine_config()


@pytest.mark.parametrize("value", ["fp8", ["fp8"], 8], ids=repr)
def test_a_quantization_config_that_is_no_object_is_one_clear_error(prunepath_checkpoint, tmp_path, value):
    from transformers import AutoConfig

    import prunepath_vllm
    from prunepath_vllm.checkpoint import validate_checkpoint

    prunepath_vllm.register()
    checkpoint = shutil.copytree(prunepath_checkpoint("llama", default_tau=0.6), tmp_path / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "quantization_config": value}))
    for read in (validate_checkpoint, AutoConfig.from_pretrained):
        with pytest.raises(
            ConfigError, match=re.escape(f"quantization_config: expected an object or null, got {value!r}")
        ):
            read(checkpoint)


def test_prunepath_links_in_the_root_lead_to_the_rooms():
    root = Path(__file__).parents[1]
    for name in ("kernels", "model_executor"):
        assert (root / name).resolve() == (root / "prunepath_vllm" / name).resolve()
