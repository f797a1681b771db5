"""Per-request tau on the worker: from a step's requests to one float32 per token, at an address graphs may capture.

V2 model runner (the default wherever Triton works): a model state that the model class offers (model_state.py). V1
(CPU): a worker class (worker_cpu.py, worker_gpu.py), chosen in engine_config.py, that wraps the runner's forward. Both
call :meth:`TokenTaus.fill` right before the forward, also before the replay of a captured graph.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from vllm.distributed import get_pp_group

from prunepath_vllm.config import PrunePathConfig
from prunepath_vllm.kernels.host_experts import HostExperts
from prunepath_vllm.kernels.tau import expand_taus
from prunepath_vllm.model_executor.compat import VllmConfig, async_tensor_h2d, forward_hook
from prunepath_vllm.model_executor.counts import REPORT_KEY, ExpertCounts
from prunepath_vllm.model_executor.layers.routed_ffn import (
    dense_products,
    layer_spec,
    takes_every_expert,
    triton_kernels,
)
from prunepath_vllm.model_executor.operator_policy import operator_policy
from prunepath_vllm.model_executor.tau_resolution import TauResolver
from prunepath_vllm.tau import DENSE_TAU

_of_configs: WeakValueDictionary[int, "TokenTaus"] = WeakValueDictionary()
"""By the id of the VllmConfig that each was made for and holds; where a layer that is being built finds its model's."""


class TokenTaus:
    """The step's taus, one per token; the tensor every routed layer of the model reads. The model owns it.

    Attributes:
        values: float32 [max_num_batched_tokens] on the model's device.
        dense_step: bool scalar on the host: every token of this step uses every expert.
        counts: what the layers count.
        spec: the routed layers, all alike but for the experts that each keeps, and of those has on the GPU: here it is
            as if all were kept.
        host: where the experts lie that are not in GPU memory; None where all are.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.vllm_config = vllm_config
        self.prunepath: PrunePathConfig = vllm_config.model_config.hf_config.prunepath
        self.resolver = TauResolver(self.prunepath, operator_policy(vllm_config))
        self.prefill_tau = self.resolver.policy.prefill_tau
        # Dense until the first step: profiling then measures the peak that serving can reach.
        max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.values = torch.ones(max_tokens, dtype=torch.float32)
        num_layers = vllm_config.model_config.get_total_num_hidden_layers()
        self.dense_step = torch.ones((), dtype=torch.bool, device="cpu")
        policy = self.resolver.policy
        self.spec = replace(
            layer_spec(vllm_config),
            at_least=policy.mode == "at_least",
            quantise_activations=policy.quantise_activations,
        )
        expert_bytes = self.spec.weight_bytes // self.spec.num_kept
        kept = sum(map(self.prunepath.kept, range(num_layers)))
        share = policy.host_share(kept * expert_bytes // get_pp_group().world_size)
        self.host = HostExperts(share) if share else None
        if self.host is not None:
            self.spec = replace(self.spec, resident=self.host.resident(self.spec.num_experts))
        self.counts = ExpertCounts(self.prunepath, num_layers, max_tokens, 0 if self.host is None else expert_bytes)
        _of_configs[id(vllm_config)] = self

    @classmethod
    def being_built(cls, vllm_config: VllmConfig) -> "TokenTaus":
        """The one of the model last begun under `vllm_config`, for its layers: they are built before it is whole.

        Raises:
            KeyError: none was begun, or it is gone.
        """
        return _of_configs[id(vllm_config)]

    @classmethod
    def of(cls, model: Any) -> "TokenTaus":
        """The one of a whole model, as vLLM's runners and workers hand it out (``get_model()``)."""
        return model.token_taus

    def resolve(self, sampling_params: Any, pooling_params: Any) -> float:
        """A request's tau, which the engine core has settled; the default of vLLM's own warm-up requests.

        Raises:
            TauError: the engine core was gone around with a tau that no request may have.
        """
        return self.resolver.tau_of(_extra_arguments(sampling_params, pooling_params) or {})

    def report_name(self, sampling_params: Any, pooling_params: Any) -> str | None:
        """The name under which a request's experts are to be counted, where it asked for that."""
        requested = _extra_arguments(sampling_params, pooling_params)
        name = (requested or {}).get(REPORT_KEY)
        return name if isinstance(name, str) else None

    def plan(
        self,
        taus: np.ndarray,
        computed: np.ndarray,
        scheduled: np.ndarray,
        prompt_lens: np.ndarray,
        reports: Sequence[str | None],
        num_padded: int,
    ) -> tuple[bool, Tensor | None]:
        """What the host knows of a step before its forward.

        Args:
            taus: float32 [num_reqs].
            computed: int [num_reqs], tokens whose keys and values are there already.
            scheduled: int [num_reqs], tokens of this step.
            prompt_lens: int [num_reqs].
            reports: per request :meth:`report_name`, or empty where none has one.
            num_padded: tokens the forward runs on, padding included.

        Returns:
            Whether every token of the step uses every expert, and what :meth:`fill` takes as `prompt_lens`.
        """
        lens: Tensor | None = None
        if self.prefill_tau is not None and (prefilling := computed < prompt_lens).any():
            # A request resumed after preemption may run prompt and generated tokens in one step: the lower tau of the
            # two is on the safe side.
            both = computed + scheduled > prompt_lens
            taus = np.where(prefilling, np.where(both, np.minimum(taus, self.prefill_tau), self.prefill_tau), taus)
            lens = async_tensor_h2d(prompt_lens.astype(np.int64), device=self.values.device)
        if takes_every_expert(num_padded, self.spec, on_gpu=self.values.is_cuda):
            taus = np.full_like(taus, DENSE_TAU)
        dense_step = bool((taus >= DENSE_TAU).all())
        self.counts.begin_step(taus, computed, scheduled, prompt_lens, reports)
        return dense_step, lens

    def compile_kernels(self) -> None:
        """Fill taus once as every kind of step does, so that no request waits for Triton."""
        one = torch.ones(1, dtype=torch.float32, device=self.values.device)
        slots = torch.zeros(1, dtype=torch.int32, device=one.device)
        starts = torch.tensor([0, 1], dtype=torch.int32, device=one.device)
        positions, prompt = slots.long(), None if self.prefill_tau is None else one.long()
        for prompt_lens in {None, prompt}:
            self.fill(one, slots, starts, positions, 1, dense_step=False, prompt_lens=prompt_lens)

    def fill(
        self,
        slot_taus: Tensor,
        slots: Tensor,
        query_start_loc: Tensor,
        positions: Tensor,
        num_padded: int,
        *,
        dense_step: bool,
        prompt_lens: Tensor | None = None,
    ) -> None:
        """Write this step's taus.

        Args:
            slot_taus: float32 [num_slots], by request slot.
            slots: int32 [num_reqs], the slot of each of the step's requests.
            query_start_loc: int32 [num_reqs + 1], cumulative scheduled tokens.
            positions: int64 [>= tokens], sequence position of every token.
            num_padded: tokens the forward runs on, padding included.
            dense_step: whether every token's tau is one that takes every expert.
            prompt_lens: int64 [num_reqs]; tokens at positions below it get prefill_tau. None in steps without any:
                decode costs nothing more.
        """
        self.dense_step.fill_(dense_step)
        if self.values.is_cuda and (dense_step or dense_products(num_padded, self.spec)):
            self.counts.dense_runs += len(self.counts.active)
        kernels = triton_kernels() if self.values.is_cuda else None
        expand = expand_taus if kernels is None else kernels.expand_taus
        expand(
            slot_taus,
            slots,
            query_start_loc,
            positions,
            self.values[:num_padded],
            dense_positions=self.prunepath.dense_positions,
            prompt_lens=prompt_lens,
            prefill_tau=DENSE_TAU if self.prefill_tau is None else self.prefill_tau,
        )


def _extra_arguments(sampling_params: Any, pooling_params: Any) -> Mapping[str, Any] | None:
    if sampling_params is not None:
        return sampling_params.extra_args
    return pooling_params.extra_kwargs if pooling_params is not None else None


class _V1RunnerTaus:
    """V1 model runner: what the V2 model state does, around the runner's forward."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.token_taus = TokenTaus.of(runner.get_model())
        self.resolved: dict[str, tuple[Any, float, str | None]] = {}

    def before_forward(self, positions: Tensor) -> None:
        batch = self.runner.input_batch
        req_ids: Sequence[str] = batch.req_ids
        known = [self._resolve(req_id) for req_id in req_ids]
        taus = np.array([tau for _, tau, _ in known], dtype=np.float32)
        reports = [name for _, _, name in known]
        starts = self.runner.query_start_loc.gpu[: len(req_ids) + 1]
        device_taus = async_tensor_h2d(taus, device=starts.device)
        slots = torch.arange(len(req_ids), dtype=torch.int32, device=starts.device)
        dense_step, prompt_lens = self.token_taus.plan(
            taus,
            batch.num_computed_tokens_cpu[: len(req_ids)],
            np.diff(self.runner.query_start_loc.np[: len(req_ids) + 1]),
            batch.num_prompt_tokens[: len(req_ids)],
            reports if any(reports) else (),
            positions.shape[-1],
        )
        self.token_taus.fill(
            device_taus,
            slots,
            starts,
            positions,
            positions.shape[-1],
            dense_step=dense_step,
            prompt_lens=prompt_lens,
        )

    def _resolve(self, req_id: str) -> tuple[Any, float, str | None]:
        """(the request, its tau, the name it is counted under)."""
        request = self.runner.requests[req_id]
        known = self.resolved.get(req_id)
        if known is None or known[0] is not request:  # an id may come back with another request
            if len(self.resolved) > 2 * len(self.runner.requests) + 64:
                self.resolved = {r: v for r, v in self.resolved.items() if r in self.runner.requests}
            params = request.sampling_params, request.pooling_params
            known = (request, self.token_taus.resolve(*params), self.token_taus.report_name(*params))
            self.resolved[req_id] = known
        return known


def attach_to_v1_runner(worker: Any) -> None:
    """Bring taus to a worker's V1 model runner; a V2 runner has the model state and is left alone."""
    if worker.use_v2_model_runner:
        return
    state: list[_V1RunnerTaus] = []

    def before_forward(positions: Tensor) -> None:
        if not state:  # the model, and with it the buffer, is built after the device
            state.append(_V1RunnerTaus(worker.model_runner))
        state[0].before_forward(positions)

    hook: Callable[[Tensor], None] = before_forward
    forward_hook(worker.model_runner, hook)
