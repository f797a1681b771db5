"""What our worker classes add to vLLM's: taus under the V1 model runner, and answers about what was counted."""

import os
from typing import TYPE_CHECKING, Any

from vllm.lora.utils import get_adapter_absolute_path
from vllm.v1.worker.worker_base import WorkerBase

from prunepath_vllm.model_executor.adapters import refuse_adapter
from prunepath_vllm.model_executor.compat import expect_loaded
from prunepath_vllm.model_executor.layers.routed_ffn import compile_kernels
from prunepath_vllm.model_executor.tau import TokenTaus, attach_to_v1_runner

_Worker: Any = WorkerBase if TYPE_CHECKING else object


class PrunePathWorkerMixin(_Worker):
    """Comes before vLLM's worker in the bases. Its public methods are called by name, through ``collective_rpc``."""

    def init_device(self) -> None:
        """Build the model runner, then hook its forward."""
        super().init_device()
        expect_loaded()  # the runner's modules are there now
        attach_to_v1_runner(self)

    def compile_or_warm_up_model(self) -> Any:
        """Compile what vLLM's warm-up leaves out, warm up, then count from 0."""
        expect_loaded()  # and the model's
        token_taus = TokenTaus.of(self.get_model())
        # First: vLLM's warm-up ends by watching for kernels compiled later.
        token_taus.compile_kernels()
        compile_kernels(self.get_model(), len(token_taus.values))
        times = super().compile_or_warm_up_model()
        token_taus.counts.restart()
        return times

    def add_lora(self, lora_request: Any) -> bool:
        """Load an adapter: vLLM's method, as ``/v1/load_lora_adapter`` and ``--lora-modules`` call it.

        Raises:
            CheckpointError, UnsupportedFeatureError: see :func:`refuse_adapter`.
        """
        try:
            directory = get_adapter_absolute_path(lora_request.lora_path)
        except FileNotFoundError:  # on no hub: vLLM says so
            return super().add_lora(lora_request)
        if os.path.isdir(directory):
            refuse_adapter(directory, self.vllm_config.model_config.hf_config)
        return super().add_lora(lora_request)

    def reload_weights(
        self, weights_iterator: Any = None, weights_path: str | None = None, is_checkpoint_format: bool = True
    ) -> None:
        """Load weights again, in place: vLLM's method, as level-2 sleep and trainers call it.

        Raises:
            CheckpointError, ConfigError: the checkpoint, or a list's tensors, are not ones that the running model can
                become; it is as before.
            UnsupportedFeatureError: this model cannot be loaded again; it is as before.
        """
        model: Any = self.model_runner.get_model()
        model.refuse_loading_again()
        if isinstance(weights_iterator, list | tuple):  # all there: load_weights would find it in the middle
            for name, tensor in weights_iterator:
                model.expect_loadable(name, tensor)
        path = weights_path or self.vllm_config.model_config.model
        if weights_iterator is None and (weights_path is not None or os.path.isdir(path)):
            model.expect_reloadable(path, TokenTaus.of(self.get_model()).prunepath)
            model.forget_router_biases()
        super().reload_weights(
            weights_iterator=weights_iterator, weights_path=weights_path, is_checkpoint_format=is_checkpoint_format
        )
        model.pack_head_again()

    def prunepath_report(self, name: str) -> list[tuple[list[int], int]] | None:
        """See :meth:`ExpertCounts.take_report`."""
        return TokenTaus.of(self.get_model()).counts.take_report(name)

    def prunepath_publish(self) -> None:
        """See :meth:`ExpertCounts.publish`."""
        TokenTaus.of(self.get_model()).counts.publish()
