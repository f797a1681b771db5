"""The ``vllm.general_plugins`` entry point: runs in the API server, the engine core, every worker and model inspection.

Idempotent and lazy: model code is named, not imported; CUDA is not touched.
"""

from prunepath_vllm.errors import EngineVersionError
from prunepath_vllm.families import FAMILIES

TESTED_ENGINE = ((0, 32), (0, 34))
"""vLLM versions from the first (inclusive) to the second (exclusive)."""


def check_engine_version() -> None:
    """Refuse an engine this package was not tested with.

    Raises:
        EngineVersionError: names the installed version and the tested range.
    """
    import vllm
    from packaging.version import InvalidVersion, Version

    first, end = (".".join(map(str, bound)) for bound in TESTED_ENGINE)
    try:
        supported = Version(first) <= Version(Version(vllm.__version__).base_version) < Version(end)
    except InvalidVersion:
        supported = False
    if not supported:
        from prunepath_vllm import __version__

        raise EngineVersionError(
            f"prunepath-vllm {__version__} was tested with vLLM >= {first}, < {end}; vLLM {vllm.__version__} is "
            "installed. Nothing was registered"
        )


def register() -> None:
    """Register configurations, architectures and per-model configuration checks with vLLM.

    Raises:
        EngineVersionError: the installed vLLM is outside the tested range; nothing is registered then.
    """
    check_engine_version()

    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from prunepath_vllm.entrypoints.server.engine import ServedEngineConfig
    from prunepath_vllm.model_executor.engine_core import install_in_engine_core
    from prunepath_vllm.modeling import register_configs

    register_configs()
    install_in_engine_core()
    for family in FAMILIES:
        if family.architecture not in ModelRegistry.models:
            ModelRegistry.register_model(family.architecture, family.engine_class)
        MODELS_CONFIG_MAP[family.architecture] = ServedEngineConfig
