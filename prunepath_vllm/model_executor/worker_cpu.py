"""vLLM's CPU worker, with what PrunePath models need of it."""

from vllm.logger import init_logger
from vllm.v1.worker.cpu_worker import CPUWorker

from prunepath_vllm.kernels import native
from prunepath_vllm.model_executor.worker import PrunePathWorkerMixin

logger = init_logger("vllm.prunepath")


class PrunePathCPUWorker(PrunePathWorkerMixin, CPUWorker):
    """See vLLM's worker."""

    def init_device(self) -> None:
        """See vLLM's worker; says what a slow installation lacks."""
        super().init_device()
        if reason := native.unavailable():
            logger.warning("%s. Routed layers are computed in PyTorch: expect no speed-up from a lower tau.", reason)
