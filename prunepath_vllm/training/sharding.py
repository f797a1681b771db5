"""Training over several processes that each hold a part of every weight: FSDP2 under the Trainer, by hand.

Accelerate's own FSDP2 knows one precision for the whole model; routers must see float32 beside bfloat16 weights. So the
units are made here, before the Trainer sees the model, and the Trainer takes it for one that needs no wrapper.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as storage
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from prunepath_vllm.errors import CheckpointError, UsageError
from prunepath_vllm.modeling.routing import Router
from prunepath_vllm.training.losses import RouterTerms
from prunepath_vllm.training.model import TrainingModel, layers_of
from prunepath_vllm.training.recipe import Recipe

OPTIMIZER_FOLDER = "optimizer"
"""Of a sharded run's checkpoints: the optimizer's state, written and read by all processes together."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def is_sharded(recipe: Recipe) -> bool:
    """Whether the run's parameters, gradients and optimizer state are spread over its processes."""
    return recipe.runtime.sharding == "full"


def check_sharding(recipe: Recipe) -> None:
    """Refuse what does not go with sharding, before anything is made.

    Raises:
        UsageError: names the key.
    """
    if not is_sharded(recipe):
        return
    if recipe.evaluation.points:
        raise UsageError(f"evaluation.points: {recipe.evaluation.points}; expected 0 with runtime.sharding 'full'")
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes"):
        raise UsageError("ACCELERATE_USE_FSDP: true; expected a launch without FSDP: runtime.sharding brings its own")


def check_processes(recipe: Recipe, count: int) -> None:
    """Refuse to shard over one process.

    Raises:
        UsageError: it is one.
    """
    if is_sharded(recipe) and count < 2:
        raise UsageError(
            f"runtime.sharding: 'full' with {count} process; expected several, started by torchrun or accelerate launch"
        )


def shard(training: TrainingModel, device: str, *, bf16: bool) -> None:
    """Shard a model over all processes, in place; its float32 parameters become DTensors on the process's device.

    A unit a layer, gathered in bfloat16 for its forward and its backward; a unit a router, gathered in float32 and kept
    until its backward, as its loss terms read it once more; and the rest (embeddings, last norm, head), in float32 for
    the whole step. Gradients are averaged in float32.

    Args:
        training: the whole model, the same in every process, on any device.
        device: "cuda" or "cpu".
        bf16: gather layers in bfloat16; False: in float32.
    """
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    # Autocast decides what the layers compute in; casting their inputs would make the residual stream bfloat16.
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    rounded = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in layers_of(training.model):
        for router in (module for module in layer.modules() if isinstance(module, Router)):
            if isinstance(observer := router.observer, RouterTerms):
                # Only inside its layer's forward is the second linear whole.
                observer.measured_late = True
                layer.register_forward_pre_hook(lambda *_, observer=observer: observer.measure())
            fully_shard(router, mesh=mesh, mp_policy=exact, reshard_after_forward=False)
        fully_shard(layer, mesh=mesh, mp_policy=rounded)
    fully_shard(training, mesh=mesh, mp_policy=exact)
    for buffer in training.buffers():  # measured on each GPU for itself: costs could differ in their last bits
        torch.distributed.broadcast(buffer, 0)


def whole_parameters(model: nn.Module, *, trained_only: bool = False) -> Iterator[tuple[str, Tensor]]:
    """A model's parameters by name, whole, one at a time. All processes have to go through all of them."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trained_only:
            tensor = parameter.detach()
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(parameter: Tensor, tensor: Tensor) -> None:
    """Copy a whole tensor into a parameter, sharded or not: of it, this process's part."""
    if isinstance(parameter, DTensor):
        own = tensor.to(parameter.device, parameter.dtype)
        # No source: every process has read the tensor itself.
        tensor = distribute_tensor(own, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(tensor)


def save_optimizer(training: nn.Module, optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """Write AdamW's state, every process its part, under the parameters' names."""
    names = {id(parameter): name for name, parameter in training.named_parameters()}
    state = {
        f"{names[id(parameter)]}.{key}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    storage.save(state, checkpoint_id=directory / OPTIMIZER_FOLDER)


@torch.no_grad()
def load_optimizer(training: nn.Module, optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """Read what :func:`save_optimizer` wrote, on any number of processes. Learning rates are the schedule's to set."""
    reader = storage.FileSystemReader(directory / OPTIMIZER_FOLDER)
    saved = reader.read_metadata().state_dict_metadata.keys()
    fused = optimizer.defaults["fused"]
    state: dict[str, Tensor] = {}
    known: dict[Tensor, dict[str, Tensor]] = {}
    for name, parameter in training.named_parameters():
        if f"{name}.step" not in saved:  # frozen, or without a gradient so far
            continue
        moments = {key: torch.zeros_like(parameter, requires_grad=False) for key in MOMENTS}
        steps = torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu")
        known[parameter] = {"step": steps, **moments}
        state |= {f"{name}.{key}": value for key, value in known[parameter].items()}
    storage.load(state, storage_reader=reader)
    optimizer.state.update(known)


def check_checkpoint(directory: Path, *, sharded: bool) -> None:
    """Refuse to resume a sharded run without sharding, and the other way round: the optimizer's state would be lost.

    Raises:
        CheckpointError: the checkpoint is of the other kind.
    """
    if (directory / OPTIMIZER_FOLDER).is_dir() != sharded:
        written, wanted = ("none", "full") if sharded else ("full", "none")
        raise CheckpointError(
            f"{directory}: written with runtime.sharding '{written}'; expected one written with '{wanted}' to resume"
        )
