"""vLLM's GPU worker, with per-request taus under the V1 model runner."""

from vllm.v1.worker.gpu_worker import Worker

from prunepath_vllm.model_executor.tau import attach_to_v1_runner


class PrunePathGPUWorker(Worker):
    """See vLLM's worker."""

    def init_device(self) -> None:
        """Build the model runner, then hook its forward."""
        super().init_device()
        attach_to_v1_runner(self)
