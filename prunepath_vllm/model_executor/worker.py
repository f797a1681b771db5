"""What our worker classes add to vLLM's: taus under the V1 model runner, and answers about what was counted."""

from typing import TYPE_CHECKING, Any

from vllm.v1.worker.worker_base import WorkerBase

from prunepath_vllm.model_executor.layers.routed_ffn import compile_kernels
from prunepath_vllm.model_executor.tau import TokenTaus, attach_to_v1_runner

_Worker: Any = WorkerBase if TYPE_CHECKING else object


class PrunePathWorkerMixin(_Worker):
    """Comes before vLLM's worker in the bases. Its public methods are called by name, through ``collective_rpc``."""

    def init_device(self) -> None:
        """Build the model runner, then hook its forward."""
        super().init_device()
        attach_to_v1_runner(self)

    def compile_or_warm_up_model(self) -> Any:
        """Compile what vLLM's warm-up leaves out, warm up, then count from 0."""
        token_taus = TokenTaus.of(self.vllm_config)
        # First: vLLM's warm-up ends by watching for kernels compiled later.
        token_taus.compile_kernels()
        compile_kernels(self.get_model(), len(token_taus.values))
        times = super().compile_or_warm_up_model()
        token_taus.counts.restart()
        return times

    def prunepath_report(self, name: str) -> list[tuple[list[int], int]] | None:
        """See :meth:`ExpertCounts.take_report`."""
        return TokenTaus.of(self.vllm_config).counts.take_report(name)

    def prunepath_publish(self) -> None:
        """See :meth:`ExpertCounts.publish`."""
        TokenTaus.of(self.vllm_config).counts.publish()
