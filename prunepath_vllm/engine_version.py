"""Which releases of vLLM this package was tested with."""

from prunepath_vllm.errors import EngineVersionError
from prunepath_vllm.version import __version__

TESTED_ENGINE = ((0, 32), (0, 34))
"""vLLM versions from the first (inclusive) to the second (exclusive)."""


def check_engine_version() -> None:
    """Refuse an engine this package was not tested with.

    Raises:
        EngineVersionError: names the installed version and the tested range.
    """
    import vllm

    expect_tested(vllm.__version__)


def expect_tested(engine: str) -> None:
    """Refuse a version of vLLM that is outside the tested range.

    Raises:
        EngineVersionError: names it and the range.
    """
    from packaging.version import InvalidVersion, Version

    first, end = (".".join(map(str, bound)) for bound in TESTED_ENGINE)
    try:
        supported = Version(first) <= Version(Version(engine).base_version) < Version(end)
    except InvalidVersion:
        supported = False
    if not supported:
        raise EngineVersionError(
            f"prunepath-vllm {__version__} was tested with vLLM >= {first}, < {end}; vLLM {engine} is installed. "
            "Nothing was registered"
        )
