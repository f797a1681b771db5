"""The router module, and how ``tau`` travels from ``forward`` to it: as an argument, all the way.

Shapes: B sequences, S tokens each, E experts, H hidden size, L layers.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from prunepath_vllm.config import PrunePathConfig
from prunepath_vllm.errors import TauError
from prunepath_vllm.kernels import reference
from prunepath_vllm.tau import MAX_TAU, PARAMETERS, parse_tau

Tau = float | Sequence[float] | np.ndarray | Tensor
"""One tau for all (also a 0-d array or tensor), or one per sequence (a list, or a 1-D array or tensor [B])."""


class Router(nn.Module):
    """Eq. 7-10 of one feed-forward layer: which experts a token uses, and their gates.

    ``bias`` is None unless the checkpoint has one, ``down`` unless its routers have a low rank. The first ``kept``
    experts, K, have weights; the others are routed, and then not active.
    """

    def __init__(self, hidden_size: int, prunepath: PrunePathConfig, layer: int = 0, *, bias: bool = False) -> None:
        super().__init__()
        self.kept, self.expert_size = prunepath.kept(layer), prunepath.expert_size
        self.selection, self.threshold, self.gate = prunepath.selection, prunepath.threshold, prunepath.gate
        rank = prunepath.router.rank
        self.weight = nn.Parameter(torch.zeros(prunepath.num_experts, rank or hidden_size))
        self.down = None if rank is None else nn.Linear(hidden_size, rank, bias=False)
        self.bias = nn.Parameter(torch.zeros(prunepath.num_experts)) if bias else None
        self.observer: nn.Module | None = None
        """Sees every forward: (logits, active experts, neurons, and a function for logits whose gradient ends in this
        router); how training collects its loss terms."""

    def scale(self, x: Tensor, neurons: Tensor, tau: Tensor) -> Tensor:
        """Route every token and multiply its neurons by their experts' weights.

        Args:
            x: what the router reads, [B, S, H].
            neurons: activations after the non-linearity, [B, S, F], F = K * expert_size.
            tau: float32 [B, S].

        Returns:
            [B, S, F] in the dtype of `neurons`.
        """
        weights, logits, active = self(x, tau)
        if self.observer is not None:
            self.observer(logits, active, neurons, lambda: self.logits(x.detach()))
            if self.gate == "sigmoid":
                weights = kernel_boundary(weights)
        return reference.scale_neurons(neurons, weights[..., : self.kept])

    def logits(self, x: Tensor) -> Tensor:
        """Eq. 7: x [B, S, H] to float32 [B, S, E]."""
        # Autocast would round the logits to bfloat16 and, with them, the ranking.
        with torch.autocast(x.device.type, enabled=False):
            return reference.router_logits(x, self.weight, self.bias, None if self.down is None else self.down.weight)

    def forward(self, x: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route every token.

        Args:
            x: [B, S, H].
            tau: float32 [B, S].

        Returns:
            (expert weights float32 [B, S, E], router logits float32 [B, S, E], active experts bool [B, S, E]).
        """
        logits = self.logits(x)
        if self.selection == "cumulative_mass":
            active = select_by_mass(logits.detach(), tau)
        else:
            active = reference.select_experts(logits, tau, selection=self.selection, threshold=self.threshold)
        if self.kept < logits.shape[-1]:
            active = active & (torch.arange(logits.shape[-1], device=logits.device) < self.kept)
        weights = reference.gate_weights(logits, active, gate=self.gate)
        return weights, logits, active


@torch.library.custom_op("prunepath::select_by_mass", mutates_args=())
def select_by_mass(logits: Tensor, tau: Tensor) -> Tensor:
    """:func:`reference.select_cumulative_mass` as one opaque op: torch.compile does not look inside.

    On a GPU it is the serving kernel's selection, a search over the bits of the probabilities instead of a sort: the
    same set but where rounding of their sum decides.

    Args:
        logits: float32 [..., E], without gradient.
        tau: float32 [...].

    Returns:
        bool [..., E].
    """
    if not logits.is_cuda:
        return reference.select_cumulative_mass(logits, tau)
    from prunepath_vllm.kernels.routing import select_mask  # triton, which only a GPU needs

    return select_mask(logits.contiguous(), tau)


@select_by_mass.register_fake
def _(logits: Tensor, tau: Tensor) -> Tensor:
    return torch.empty_like(logits, dtype=torch.bool)


@torch.library.custom_op("prunepath::kernel_boundary", mutates_args=())
def kernel_boundary(x: Tensor) -> Tensor:
    """A copy of `x`, and of its gradient, that torch.compile fuses nothing with: what computes it is another kernel.

    To stand between a sum over an expert's neurons and a softmax over experts. Inductor (until PyTorch has its pull
    request 190519) writes such sums to memory in one loop of a kernel and reads them in the next without a barrier, and
    the two loops may give an element to different threads (triton issue 10924), which then read whatever was there:
    gates' gradients of SmolLM2 with experts of 4 on an H200, beside the gradients of two router terms, had norms of
    5,000 and 500,000 instead of 0.003.
    """
    return x.clone()


@kernel_boundary.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


torch.library.register_autograd("prunepath::kernel_boundary", lambda _, gradient: kernel_boundary(gradient))


def refuse_other_names(names: Iterable[str]) -> None:
    """Refuse arguments that are meant as ``tau``: transformers' forwards swallow every name that they do not know.

    Args:
        names: of arguments that nothing here takes.

    Raises:
        TauError: names the first one with "tau" or "sparsity" in it.
    """
    for name in names:
        if any(word in name.casefold() for word in PARAMETERS):
            raise TauError(
                f"{name}: nothing reads it here; expected tau=, of forward or generate, a number in (0, {MAX_TAU}] "
                "or one per sequence (the checkpoint's tau_curve says which FFN sparsity a tau gives)",
                parameter=name,
                value=None,
            )


def parse_taus(tau: Tau, *, max_tau: float | None = None) -> float | Tensor:
    """Validate `tau`: a number stays one, a list, or a 1-D array or tensor, becomes a float32 tensor [B] on its device.

    Raises:
        TauError: a value out of range, or above the checkpoint's `max_tau`; for a list, the message says which.
    """
    values = tau.tolist() if isinstance(tau, Tensor | np.ndarray) else tau
    if not isinstance(values, list | tuple):
        return parse_tau(values, max_tau=max_tau)
    parsed = [parse_tau(value, f"tau[{index}]", max_tau=max_tau) for index, value in enumerate(values)]
    return torch.tensor(parsed, dtype=torch.float32, device=tau.device if isinstance(tau, Tensor) else None)


def token_taus(
    tau: Tau, positions: Tensor, batch_size: int, *, dense_positions: int, max_tau: float | None = None
) -> Tensor:
    """The tau of every token.

    Args:
        tau: as `forward` takes it.
        positions: position of each token in its sequence, int [B or 1, S].
        batch_size: B.
        dense_positions: tokens at positions below it use every expert.
        max_tau: the checkpoint's, where it does not keep all experts.

    Returns:
        float32 [B, S].

    Raises:
        TauError: a value out of range, or as many values as there are not sequences.
    """
    parsed = parse_taus(tau, max_tau=max_tau)
    if isinstance(parsed, Tensor):
        if parsed.shape != (batch_size,):
            raise TauError(
                f"tau must be one number or one per sequence ({batch_size}), got {len(parsed)}",
                parameter="tau",
                value=tau,
            )
        taus = parsed.to(positions.device)[:, None].expand(-1, positions.shape[-1])
    else:
        taus = torch.full((batch_size, positions.shape[-1]), parsed, dtype=torch.float32, device=positions.device)
    return torch.where(positions < dense_positions, MAX_TAU, taus) if dense_positions else taus
