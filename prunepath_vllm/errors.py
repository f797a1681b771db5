"""The errors users meet. Each is one line that names the thing, its value and what was expected."""


class PrunePathError(ValueError):
    """Base of every error raised on purpose by this package."""


class TauError(PrunePathError):
    """A per-request ``tau`` or ``sparsity`` that cannot be honoured."""

    def __init__(self, message: str, *, parameter: str, value: object) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.value = value


class ConfigError(PrunePathError):
    """A ``prunepath_config`` block, or a model configuration, that does not describe a PrunePath model."""


class CheckpointError(PrunePathError):
    """A checkpoint directory whose files or tensors are not what its configuration promises."""


class EngineVersionError(PrunePathError):
    """The installed vLLM is outside the range this package was tested with, or its internals have moved."""


class UnsupportedFeatureError(PrunePathError):
    """An engine feature that PrunePath refuses by name, because it would give wrong output."""


class UsageError(PrunePathError):
    """A command called with arguments that make no sense, or with a name at which nothing is; exit code 2."""


class TrainingError(PrunePathError):
    """A training that cannot go on: it has diverged."""
