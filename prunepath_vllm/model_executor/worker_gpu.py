"""vLLM's GPU worker, with what PrunePath models need of it."""

from vllm.v1.worker.gpu_worker import Worker

from prunepath_vllm.model_executor.worker import PrunePathWorkerMixin


class PrunePathGPUWorker(PrunePathWorkerMixin, Worker):
    """See vLLM's worker."""
