"""V2 model runner: the model states that keep a tau per request slot and expand it to tokens before every forward."""

from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.encoder_only import EncoderOnlyModelState

from prunepath_vllm.model_executor.compat import VllmConfig
from prunepath_vllm.model_executor.tau import TokenTaus

_ModelState: Any = DefaultModelState if TYPE_CHECKING else object


class _TauStateMixin(_ModelState):
    """What both model states add to vLLM's."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self.token_taus = TokenTaus.of(vllm_config)
        self.slot_taus = np.ones(self.max_num_reqs, dtype=np.float32)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        self.slot_taus[req_index] = self.token_taus.resolve(new_req_data.sampling_params, new_req_data.pooling_params)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        self.token_taus.fill(
            self.slot_taus[input_batch.idx_mapping_np[: input_batch.num_reqs]],
            input_batch.query_start_loc[: input_batch.num_reqs + 1],
            input_batch.positions,
            input_batch.num_tokens_after_padding,
        )
        return super().prepare_inputs(input_batch, req_states)


class PrunePathModelState(_TauStateMixin, DefaultModelState):
    """Model state of the decoder families."""


class PrunePathEncoderModelState(_TauStateMixin, EncoderOnlyModelState):
    """Model state of the encoder families."""
