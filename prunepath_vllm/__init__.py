"""PrunePath on vLLM: feed-forward layers cut into experts, routed per token, with a dial (tau) per request."""

from prunepath_vllm.version import __version__

__all__ = ["__version__", "register"]


def register() -> None:
    """Make PrunePath checkpoints known to transformers and, where it is installed, to vLLM.

    Idempotent. vLLM calls its part by itself through the ``vllm.general_plugins`` entry point; call this to use
    ``AutoModelForCausalLM.from_pretrained`` and friends.

    Raises:
        EngineVersionError: a vLLM outside the tested range is installed; nothing has been registered then.
    """
    from importlib.util import find_spec

    engine = find_spec("vllm") is not None
    if engine:
        from prunepath_vllm.engine_version import check_engine_version

        check_engine_version()

    from prunepath_vllm.modeling import register_auto_classes

    register_auto_classes()
    if engine:
        from prunepath_vllm import plugin

        plugin.register()
