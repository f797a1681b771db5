"""The ``vllm.general_plugins`` entry point: runs in the API server, the engine core, every worker and model inspection.

Idempotent and lazy: model code is named, not imported; CUDA is not touched.
"""

from prunepath_vllm.engine_version import check_engine_version
from prunepath_vllm.families import FAMILIES


def register() -> None:
    """Register configurations, architectures and per-model configuration checks with vLLM.

    Raises:
        EngineVersionError: the installed vLLM is outside the tested range; nothing is registered then.
    """
    check_engine_version()

    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from prunepath_vllm.entrypoints.server.engine import ServedEngineConfig
    from prunepath_vllm.model_executor.engine_config import DenseModelConfig
    from prunepath_vllm.model_executor.engine_core import install_in_engine_core
    from prunepath_vllm.modeling import register_configs

    register_configs()
    install_in_engine_core()
    for family in FAMILIES:
        if family.architecture not in ModelRegistry.models:
            ModelRegistry.register_model(family.architecture, family.engine_class)
        MODELS_CONFIG_MAP[family.architecture] = ServedEngineConfig
        MODELS_CONFIG_MAP.setdefault(family.dense_architecture, DenseModelConfig)
