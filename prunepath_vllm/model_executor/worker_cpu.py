"""vLLM's CPU worker, with what PrunePath models need of it."""

from vllm.v1.worker.cpu_worker import CPUWorker

from prunepath_vllm.model_executor.worker import PrunePathWorkerMixin


class PrunePathCPUWorker(PrunePathWorkerMixin, CPUWorker):
    """See vLLM's worker."""
