"""Which changes of a linear's weights matter: measured on text, so that rounding can spare those that do.

A change E [R, C] of a weight raises the loss by about half the mean over tokens of (g' E x)^2, with the linear's input
x and the loss gradient g at its output. With g's entries taken as independent and alike that is tr(E M E') / 2R for
M = mean of |g|^2 x x'.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from prunepath_vllm.conversion.costs import backpropagate_drawn_labels
from prunepath_vllm.modeling.routing import Router


def input_moments(
    model: PreTrainedModel, sequences: Sequence[Tensor], *, lowest_tau: float, seed: int
) -> dict[str, Tensor]:
    """M of every ``nn.Linear`` of a causal PrunePath model's backbone but its routers.

    Labels are drawn from the model's own output. Each sequence runs at a tau of its own, evenly drawn from `lowest_tau`
    to 1.

    Args:
        model: frozen, in evaluation mode.
        sequences: token ids, int64 [S] each.
        lowest_tau: in (0, 1].
        seed: of labels and taus.

    Returns:
        Name of the weight, over the whole model -> float32 [C, C] on the model's device, C the linear's inputs.
    """
    moments: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    handles = []

    def watch(name: str, linear: nn.Linear) -> None:
        def add(gradient: Tensor) -> None:
            weighted = gradient.flatten(0, -2).float().norm(dim=1, keepdim=True) * inputs.pop(name)
            product = weighted.T @ weighted
            moments[name] = moments[name] + product if name in moments else product

        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name] = args[0].detach().flatten(0, -2).float()
            output.register_hook(add)

        handles.append(linear.register_forward_hook(keep))

    routers = {id(part) for module in model.modules() if isinstance(module, Router) for part in module.modules()}
    backbone = {id(module) for module in model.base_model.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module) in backbone and id(module) not in routers:
            watch(f"{name}.weight", module)
    generator = torch.Generator().manual_seed(seed)
    for sequence in tqdm(sequences, desc="measuring inputs", unit="sequence"):
        tau = 1 - (1 - lowest_tau) * float(torch.rand((), generator=generator))
        embeddings = model.get_input_embeddings()(sequence[None].to(model.device)).requires_grad_(True)
        logits = model(inputs_embeds=embeddings, use_cache=False, tau=tau).logits[0].float()
        backpropagate_drawn_labels(logits, generator)
    for handle in handles:
        handle.remove()
    tokens = sum(len(sequence) for sequence in sequences)
    return {name: product / tokens for name, product in moments.items()}
