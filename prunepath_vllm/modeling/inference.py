"""Feed-forward layers of causal language models in inference on a CPU: the serving kernel instead of dense products.

It reads the weights of a token's experts alone, where the module keeps them. Shapes: B sequences, S tokens each, H
hidden size, F neurons.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils.output_capturing import OutputRecorder

from prunepath_vllm.activations import ACTIVATIONS
from prunepath_vllm.kernels import cpu, native
from prunepath_vllm.kernels.layer import DTYPES, LayerSpec, RouterWeights, RoutingRule, Weights
from prunepath_vllm.modeling.quantised import QuantisedLinear
from prunepath_vllm.modeling.routing import Router


class RoutedFeedForward(nn.Module):
    """A feed-forward module cut into experts. Before the dense class, where there is one."""

    router: Router
    activation: str
    """Name of the non-linearity."""

    def linears(self) -> tuple[list[Any], Any]:
        """The linears whose outputs are neurons, a GLU's gate first, and the one whose inputs they are."""
        raise NotImplementedError

    def neurons(self, x: Tensor) -> Tensor:
        """x [B, S, H] to activations [B, S, F]."""
        raise NotImplementedError

    def project(self, neurons: Tensor) -> Tensor:
        """Activations [B, S, F], scaled by their experts' weights, to [B, S, H]."""
        raise NotImplementedError

    def forward(self, x: Tensor, tau: Tensor, router_input: Tensor | None = None, *, native: bool = False) -> Tensor:
        """The routed layer; by the CPU kernel where `native` allows and it pays.

        Args:
            x: [B, S, H].
            tau: float32 [B, S].
            router_input: what the router reads, [B, S, H]; None means x.
            native: whether this forward may leave PyTorch.

        Returns:
            [B, S, H].
        """
        if router_input is None:
            router_input = x
        if native:
            y = routed_ffn(x, tau, router_input, self.router, *self.linears(), self.activation)
            if y is not None:
                return y
        return self.project(self.router.scale(router_input, self.neurons(x), tau))


def in_inference(device: torch.device) -> bool:
    """Whether a forward on `device` may leave PyTorch: no gradients, no tracing, no autocast."""
    return (
        device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
    )


def routed_ffn(
    x: Tensor, tau: Tensor, router_input: Tensor, router: Router, inputs: list[Any], output: Any, activation: str
) -> Tensor | None:
    """Eq. 7-10 by the kernel; None where PyTorch has to compute the layer.

    That is for more tokens than the kernel is fast for, for modules that are not the model's own (an adapter, a
    quantiser's linear) or that somebody watches, and where the kernel was not built.

    Args:
        x: [B, S, H].
        tau: float32 [B, S].
        router_input: what the router reads, [B, S, H].
        router: of the layer.
        inputs: the linears whose outputs are neurons; two are a GLU, the gate first.
        output: the linear whose inputs are neurons.
        activation: name of the non-linearity.

    Returns:
        [B, S, H] in the dtype of `x`.
    """
    linears = *inputs, output
    quantised = isinstance(output, QuantisedLinear)
    taus = tau.reshape(-1).contiguous()
    if x.dtype not in DTYPES or len(taus) > cpu.step_tokens(taus, x.dtype, quantised=quantised):
        return None
    routing = [router] if router.down is None else [router, router.down]
    if router.observer is not None or not all(_is_plain(module) for module in (*routing, *linears)):
        return None
    if any(isinstance(linear, QuantisedLinear) != quantised for linear in linears):
        return None
    if any(not quantised and linear.weight.dtype != x.dtype for linear in linears) or (
        len(inputs) > 1 and any(linear.bias is not None for linear in inputs)  # the kernel has one bias for both
    ):
        return None
    if any(module.weight.device.type != "cpu" for module in (*routing, *linears)):  # "meta": offloaded to a disk
        return None
    first, *up = (_neuron_rows(linear) for linear in inputs)
    scale_in, *scale_up, scale_out = (linear.weight_scale if quantised else None for linear in linears)
    weights = Weights(
        first,
        inputs[0].bias,
        _neuron_rows(output, is_output=True),
        output.bias,
        scale_in,
        scale_out,
        *up,
        *scale_up,
    )
    spec = LayerSpec(
        hidden=x.shape[-1],
        num_experts=len(router.weight),
        expert_size=router.expert_size,
        dtype=x.dtype,
        activation=ACTIVATIONS[activation],
        glu=bool(up),
        rule=RoutingRule(router.selection, router.threshold, router.gate),
        kept=None if router.kept == len(router.weight) else router.kept,
    )
    down = None if router.down is None else router.down.weight
    layer = native.ready(RouterWeights(router.weight, router.bias, down), weights, spec)
    tokens, read = (one.reshape(-1, x.shape[-1]).contiguous() for one in (x, router_input))
    return layer(tokens, taus, router_input=read).view(x.shape)


def _is_plain(module: nn.Module) -> bool:
    """Whether calling `module` does what its class says, and nobody watches the call."""
    # transformers' own hooks stay once statistics were asked for; whether they are now, the caller knows.
    watching = [h for h in module._forward_hooks.values() if getattr(h, "__module__", "") != OutputRecorder.__module__]
    hooked = watching or module._forward_pre_hooks
    return type(module) in (Router, nn.Linear, Conv1D, QuantisedLinear) and not hooked and "forward" not in vars(module)


def _neuron_rows(linear: Any, *, is_output: bool = False) -> Tensor:
    """The weight of a linear as [F, H] in the module's own memory, whose layout is changed once where it is another."""
    weight = linear.weight
    conv1d = linear.conv1d if isinstance(linear, QuantisedLinear) else isinstance(linear, Conv1D)
    rows = weight if conv1d == is_output else weight.t()
    if not rows.is_contiguous():
        with torch.inference_mode(False), torch.no_grad():  # the parameter may be trained later
            rows = weight.t().contiguous()
            weight.data = rows.t()
    return rows
