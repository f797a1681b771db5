"""vLLM's CPU worker, with per-request taus under the V1 model runner."""

from vllm.v1.worker.cpu_worker import CPUWorker

from prunepath_vllm.model_executor.tau import attach_to_v1_runner


class PrunePathCPUWorker(CPUWorker):
    """See vLLM's worker."""

    def init_device(self) -> None:
        """Build the model runner, then hook its forward."""
        super().init_device()
        attach_to_v1_runner(self)
