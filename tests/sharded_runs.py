"""What every process of tests/test_training_sharded.py does: ``sharded_runs.py FOLDER``, started by torchrun.

FOLDER holds recipes as YAML. The runs share the processes; what they leave is compared by the test.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from prunepath_vllm.modeling.routing import Router
from prunepath_vllm.training.recipe import Recipe, parse_recipe
from prunepath_vllm.training.run import train
from prunepath_vllm.training.sharding import whole_parameters
from prunepath_vllm.training.trainer import PrunePathTrainer


class Killed(BaseException):
    """Stands for the end of the process."""


def gathered_too(recipe: Recipe) -> None:
    """Train; leave the weights at the end of training, gathered, and how much of them a process held."""
    follow = PrunePathTrainer.train

    def watched(self: PrunePathTrainer, *args: Any, **kwargs: Any) -> Any:
        result = follow(self, *args, **kwargs)
        held = sum(p.to_local().numel() for p in self.training.parameters())  # type: ignore[operator]
        state = [v for values in self.optimizer.state.values() for v in values.values() if v.dim()]
        moments = sum(value.to_local().numel() for value in state)
        tensors = {name: tensor.contiguous().clone() for name, tensor in whole_parameters(self.training.model)}
        if self.args.should_save:
            save_file(tensors, Path(recipe.output) / "gathered.safetensors")
            (Path(recipe.output) / "held.json").write_text(json.dumps([held, moments]))
        return result

    PrunePathTrainer.train = watched  # type: ignore[method-assign]
    train(recipe)
    PrunePathTrainer.train = follow  # type: ignore[method-assign]


def killed(recipe: Recipe, step: int) -> None:
    """Train until a step, then from the last checkpoint on."""
    follow = PrunePathTrainer.training_step

    def die(self: PrunePathTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise Killed
        return follow(self, *args, **kwargs)

    PrunePathTrainer.training_step = die  # type: ignore[method-assign]
    try:
        train(recipe)
    except Killed:
        PrunePathTrainer.training_step = follow  # type: ignore[method-assign]
        train(recipe, resume=True)


def dtypes_seen(recipe: Recipe) -> None:
    """Train; leave the dtypes of weights in the forwards of routers and linears, and of parameters and gradients."""
    seen: dict[str, set[str]] = {"router": set(), "linear": set(), "parameter": set(), "gradient": set()}
    logits, linear, clip = Router.logits, nn.Linear.forward, PrunePathTrainer._clip_grad_norm

    def watched_logits(self: Router, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):  # not what is measured before training
            seen["router"].add(str(self.weight.dtype))
        return logits(self, x)

    def watched_linear(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            seen["linear"].add(str(self.weight.dtype))
        return linear(self, x)

    def watched_clip(self: PrunePathTrainer, model: Any) -> Any:
        seen["parameter"] |= {str(p.dtype) for p in model.parameters()}
        seen["gradient"] |= {str(p.grad.dtype) for p in model.parameters() if p.grad is not None}
        return clip(self, model)

    Router.logits, nn.Linear.forward = watched_logits, watched_linear  # type: ignore[method-assign]
    PrunePathTrainer._clip_grad_norm = watched_clip  # type: ignore[method-assign]
    train(recipe)
    Router.logits, nn.Linear.forward = logits, linear  # type: ignore[method-assign]
    PrunePathTrainer._clip_grad_norm = clip  # type: ignore[method-assign]
    if torch.distributed.get_rank() == 0:
        (Path(recipe.output) / "dtypes.json").write_text(json.dumps({k: sorted(v) for k, v in seen.items()}))


def main(folder: Path) -> None:
    """All runs, in order of their names."""
    for path in sorted(folder.glob("*.yaml")):
        recipe = parse_recipe(yaml.safe_load(path.read_text()))
        if path.stem.endswith("-killed"):
            killed(recipe, 5)
        elif path.stem.endswith("-dtypes"):
            dtypes_seen(recipe)
        elif path.stem.endswith("-gathered"):
            gathered_too(recipe)
        else:
            train(recipe)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
