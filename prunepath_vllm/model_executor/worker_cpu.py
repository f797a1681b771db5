"""vLLM's CPU worker, with what PrunePath models need of it."""

from vllm.logger import init_logger
from vllm.lora.ops.torch_ops import lora_ops
from vllm.v1.worker.cpu_worker import CPUWorker

from prunepath_vllm.kernels import native
from prunepath_vllm.model_executor.adapters import without_adapter_unchanged
from prunepath_vllm.model_executor.compat import wrap_once
from prunepath_vllm.model_executor.worker import PrunePathWorkerMixin

logger = init_logger("vllm.prunepath")


class PrunePathCPUWorker(PrunePathWorkerMixin, CPUWorker):
    """See vLLM's worker."""

    def init_device(self) -> None:
        """See vLLM's worker; says what a slow installation lacks."""
        if self.vllm_config.lora_config is not None:
            wrap_once(lora_ops, "bgmv_shrink", without_adapter_unchanged)
        super().init_device()
        if reason := native.unavailable():
            logger.warning("%s. Routed layers are computed in PyTorch: expect no speed-up from a lower tau.", reason)
