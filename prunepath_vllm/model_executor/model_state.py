"""V2 model runner: the model states that keep a tau per request slot and expand it to tokens before every forward."""

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.encoder_only import EncoderOnlyModelState

from prunepath_vllm.model_executor.compat import VllmConfig, async_tensor_h2d
from prunepath_vllm.model_executor.tau import TokenTaus

_ModelState: Any = DefaultModelState if TYPE_CHECKING else object


class _TauStateMixin(_ModelState):
    """What both model states add to vLLM's."""

    def __init__(self, vllm_config: VllmConfig, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, model, *args, **kwargs)
        self.token_taus = TokenTaus.of(model)
        self.slot_taus = np.ones(self.max_num_reqs, dtype=np.float32)
        self.slot_prompt_lens = np.zeros(self.max_num_reqs, dtype=np.int64)
        self.slot_reports: dict[int, str] = {}
        self.device_taus: Tensor | None = None
        """slot_taus on the device; None where a request has come since the last copy."""

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params, new_req_data.pooling_params
        self.slot_taus[req_index] = self.token_taus.resolve(*params)
        self.slot_reports.pop(req_index, None)
        if name := self.token_taus.report_name(*params):
            self.slot_reports[req_index] = name
        prompt = new_req_data.prompt_token_ids
        self.slot_prompt_lens[req_index] = len(new_req_data.prompt_embeds if prompt is None else prompt)
        self.device_taus = None

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        num_reqs = input_batch.num_reqs
        if self.device_taus is None:
            # A new tensor: the last step, still under way perhaps, reads the old one.
            self.device_taus = async_tensor_h2d(self.slot_taus.copy(), device=self.token_taus.values.device)
        slots = input_batch.idx_mapping_np[:num_reqs]
        reports = [self.slot_reports.get(slot) for slot in slots] if self.slot_reports else []
        dense_step, prompt_lens = self.token_taus.plan(
            self.slot_taus[slots],
            input_batch.num_computed_tokens_np[:num_reqs],
            input_batch.num_scheduled_tokens[:num_reqs],
            self.slot_prompt_lens[slots],
            reports if any(reports) else (),
            input_batch.num_tokens_after_padding,
        )
        self.token_taus.fill(
            self.device_taus,
            input_batch.idx_mapping[:num_reqs],
            input_batch.query_start_loc[: num_reqs + 1],
            input_batch.positions,
            input_batch.num_tokens_after_padding,
            dense_step=dense_step,
            prompt_lens=prompt_lens,
        )
        return super().prepare_inputs(input_batch, req_states)


class PrunePathModelState(_TauStateMixin, DefaultModelState):
    """Model state of the decoder families."""


class PrunePathEncoderModelState(_TauStateMixin, EncoderOnlyModelState):
    """Model state of the encoder families."""
