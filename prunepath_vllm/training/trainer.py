"""transformers' Trainer following a recipe: stages, tau draws, router groups, whole checkpoints, stop on divergence."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from prunepath_vllm.checkpoint import read_tensor_header, read_tensor_index, stream_tensors
from prunepath_vllm.config import PrunePathConfig
from prunepath_vllm.errors import CheckpointError, TrainingError
from prunepath_vllm.training.losses import TERMS
from prunepath_vllm.training.model import TrainingModel
from prunepath_vllm.training.recipe import Recipe
from prunepath_vllm.training.schedule import Course
from prunepath_vllm.training.sharding import (
    check_checkpoint,
    fill,
    is_sharded,
    load_optimizer,
    save_optimizer,
    shard,
    whole_parameters,
)

PARTIAL = ".partial"
"""Where a checkpoint is written before it gets its name."""
CLOCK_FILE = "clock.json"
TRAINED_FILE = "trained.safetensors"
"""Of a low-rank run's checkpoints: what is trained, and nothing else."""
ENDLESS = 10**9
"""Optimizer steps of a run that the clock ends."""


class PrunePathTrainer(Trainer):
    """A Trainer that follows a recipe."""

    def __init__(
        self, recipe: Recipe, training: TrainingModel, data: Dataset, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Set up a run.

        Args:
            recipe: what to do.
            training: the model, on the CPU; sharded here where the recipe says so.
            data: of :func:`prunepath_vllm.training.data.load_training_data`.
            tokenizer: saved with every checkpoint.
        """
        collate: Any = getattr(data, "collate")  # noqa: B009
        arguments = training_arguments(recipe)
        self.sharded = is_sharded(recipe)
        if self.sharded:
            # Now, as the Trainer moves what it is given to the GPU, whole.
            shard(training, arguments.device.type, bf16=recipe.runtime.bf16)
        super().__init__(
            model=training,
            args=arguments,
            data_collator=collate,
            train_dataset=data,
            processing_class=tokenizer,
        )
        self.recipe, self.training = recipe, training
        self.optimizer: Any
        self.lr_scheduler: Any
        steps = recipe.schedule.max_steps
        if recipe.schedule.epochs is not None:
            per_epoch = len(self.get_train_dataloader()) // recipe.batch.accumulation
            by_epochs = math.ceil(max(per_epoch, 1) * recipe.schedule.epochs)
            steps = by_epochs if steps is None else min(steps, by_epochs)
        self.args.max_steps = steps or ENDLESS
        self.course = Course(recipe, steps)
        config = getattr(training.model.config, "prunepath_config", None)
        self.block = PrunePathConfig.parse(config) if config is not None else None
        """The starting checkpoint's ``prunepath_config``; None for a dense model."""
        self.totals = Totals()
        self._stage: int | None = None
        self._part = 0
        self._staging: Path | None = None
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(_Follow(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, from the beginning or on from a checkpoint directory."""
        elapsed = 0.0
        if isinstance(resume_from_checkpoint, str):
            elapsed = json.loads((Path(resume_from_checkpoint) / CLOCK_FILE).read_text())["elapsed"]
        self.course.start(elapsed)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _wrap_model(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self.sharded:
            # Adds autocast; the mode for evaluation is the one that does not wrap the model for DDP.
            return self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        return super()._wrap_model(model, *args, **kwargs)

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW in three groups: weights, what is not decayed (norms, biases, up matrices), routers."""
        if self.optimizer is None:
            options = self.recipe.optimizer
            routers = {id(parameter) for router in self.training.routers for parameter in router.parameters()}
            trainable = [parameter for parameter in self.training.parameters() if parameter.requires_grad]
            weights = [p for p in trainable if id(p) not in routers and p.dim() > 1]
            others = [p for p in trainable if id(p) not in routers and p.dim() <= 1]
            routing = [p for p in trainable if id(p) in routers]
            groups = [
                dict(params=weights, lr=options.lr, weight_decay=options.weight_decay),
                dict(params=others, lr=options.lr, weight_decay=0.0),
                dict(params=routing, lr=options.router_lr, weight_decay=options.router_weight_decay),
            ]
            fused = trainable[0].is_cuda
            betas = (options.beta1, options.beta2)
            self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=betas, fused=fused)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The course's rate for all groups; routers have none in a stage that freezes them."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            routers = {id(parameter) for router in self.training.routers for parameter in router.parameters()}
            rates: list[Callable[[int], float]] = [
                self._router_rate if id(group["params"][0]) in routers else self.course.rate
                for group in optimizer.param_groups
            ]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _router_rate(self, step: int) -> float:
        stage = self.course.stages[self.course.stage(step)]
        return self.course.rate(step) if stage.train_routers else 0.0

    def enter_stage(self) -> None:
        """Set losses and routing of the stage that the next optimizer step belongs to."""
        self._part = 0
        index = self.course.stage(self.state.global_step)
        if index == self._stage:
            return
        self._stage = index
        self.totals.lowest = math.inf
        stage = self.course.stages[index]
        if self.block is not None:
            self.training.set_terms(stage.losses.model_dump(), threshold=stage.threshold)
            self.training.set_routing(**routing_of(self.recipe, index, self.block))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of one batch, its sequences' taus drawn here; sums what the next report shows without a host sync."""
        tau = None
        if self.block is not None:
            tau = self.course.taus(
                self.state.global_step, len(inputs["input_ids"]), process=self.args.process_index, part=self._part
            )
        self._part += 1
        output = model(**inputs, tau=tau)
        if not return_outputs:
            self.totals.add(self.training, output, inputs["input_ids"].numel())
        return (output["loss"], output) if return_outputs else output["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log with loss terms, speed and sparsity added.

        Raises:
            TrainingError: the run has diverged.
        """
        if "loss" in logs:
            logs |= self.totals.report(self.args.world_size)
            stage = self.course.stages[self._stage or 0].name
            self.totals.check(logs["loss"], self.state.global_step, stage)
            logs["progress"] = round(self.course.progress(self.state.global_step), 5)
            logs["minutes"] = round(self.course.elapsed / 60, 3)
        super().log(logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint under another name and rename it, so that a kill leaves whole ones only."""
        output = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        staging = output / PARTIAL
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (staging / name / CLOCK_FILE).write_text(json.dumps({"elapsed": self.course.elapsed}))
            shutil.rmtree(output / name, ignore_errors=True)
            os.replace(staging / name, output / name)
            staging.rmdir()
            for old in checkpoints(output)[: -self.recipe.runtime.keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model, on the main process; of a sharded one all processes have to call this."""
        if not self.sharded:
            return super().save_model(output_dir, _internal_call)
        tensors = self._whole()
        if self.args.should_save:
            self._save(output_dir, tensors)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The model as from_pretrained reads it (low rank: what is trained), and the tokenizer. No pickles."""
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        if self.recipe.model.rank is None:
            self.training.model.save_pretrained(directory, state_dict=state_dict)
        else:
            save_file(state_dict or self._whole(), directory / TRAINED_FILE)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(directory)

    def _whole(self) -> dict[str, Tensor]:
        """What a checkpoint holds, on the CPU; empty where this process does not write it."""
        named = whole_parameters(self.training.model, trained_only=self.recipe.model.rank is not None)
        return {name: tensor.cpu().contiguous() for name, tensor in named if self.args.should_save}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        save_optimizer(self.training, self.optimizer, Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_optimizer(self.training, self.optimizer, Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint)
        check_checkpoint(path, sharded=self.sharded)
        inner = self.training.model
        all_trained = self.recipe.model.rank is None
        tensors = read_tensor_index(path) if all_trained else read_tensor_header(path, TRAINED_FILE)
        known = dict(inner.named_parameters())  # a tied head is there once
        wanted = known if all_trained else {n: p for n, p in known.items() if p.requires_grad}
        if tensors.keys() != wanted.keys():
            name = min(tensors.keys() ^ wanted.keys())
            raise CheckpointError(f"{path}: tensor {name} is missing or unexpected; expected this recipe's model")
        for name, tensor in stream_tensors(path, tensors):
            fill(known[name], tensor)


REPORTED = ("task", "hidden", "terms")
"""What a batch's output has for the reports."""


class Totals:
    """What happened since the last report, summed on the device."""

    def __init__(self) -> None:
        self.lowest = math.inf
        """Lowest loss reported in this stage."""
        self.layers: dict[str, Tensor] = {}
        """Of the last report: ``sparsity`` [L], ``entropy`` [L], ``usage`` [L, E]."""
        self._bad = 0
        self._clear()

    def _clear(self) -> None:
        self._batches = 0
        self._sums: dict[str, Tensor] = {}
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out of the speed what was not training."""
        self._since = time.monotonic()
        self._timed = 0

    def add(self, training: TrainingModel, output: dict[str, Tensor], tokens: int) -> None:
        """Count one batch."""
        values = {name: value for name, value in output.items() if name in REPORTED}
        if training.observers:
            values |= {"usage": training.usage(), "entropy": training.spread()}
            for observer in training.observers:
                observer.clear()
        values = {name: value.detach().float() for name, value in values.items()}
        if not self._sums:
            self._sums = {name: value.clone() for name, value in values.items()}
        else:
            torch._foreach_add_(list(self._sums.values()), list(values.values()))
        self._batches += 1
        self._timed += tokens

    def report(self, processes: int) -> dict[str, float]:
        """Means since the last report, as one process saw them; tokens per second of all processes."""
        if not self._batches:
            return {}
        means = {name: (total / self._batches).cpu() for name, total in self._sums.items()}
        logs = {f"{name}_loss": float(means[name]) for name in ("task", "hidden") if name in means}
        if "terms" in means:
            terms, usage, entropy = (means[name] for name in ("terms", "usage", "entropy"))
            self.layers = {"sparsity": 1 - usage.mean(dim=-1), "entropy": entropy, "usage": usage}
            logs |= {f"{name}_loss": float(term) for name, term in zip(TERMS, terms, strict=True) if term}
            logs |= {"ffn_sparsity": float(1 - usage.mean()), "router_entropy": float(entropy.mean())}
        logs["tokens_per_second"] = round(self._timed * processes / (time.monotonic() - self._since), 1)
        self._clear()
        return logs

    def check(self, loss: float, step: int, stage: str) -> None:
        """Stop a run that has diverged.

        Raises:
            TrainingError: the loss is not finite, or twice in a row far above the stage's lowest.
        """
        if not math.isfinite(loss):
            raise TrainingError(f"diverged: loss is {loss} at step {step}, stage {stage}; try a lower optimizer.lr")
        limit = self.lowest + max(3.0, self.lowest)
        self._bad = self._bad + 1 if loss > limit else 0
        if self._bad == 2:
            raise TrainingError(
                f"diverged: loss is {loss:.3g} at step {step}, stage {stage}, after {self.lowest:.3g} earlier; "
                "try a lower optimizer.lr"
            )
        self.lowest = min(self.lowest, loss)


class _Follow(TrainerCallback):
    """Keeps the trainer on its course."""

    def __init__(self, trainer: PrunePathTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.enter_stage()

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.course.tick()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.course.progress(state.global_step) >= 1:
            control.should_training_stop = control.should_log = True


def routing_of(recipe: Recipe, stage: int, block: PrunePathConfig) -> dict[str, Any]:
    """Selection, gate and threshold in a stage: its own, or the starting checkpoint's."""
    chosen = recipe.stages[stage]
    selection = chosen.selection or block.selection
    threshold = (chosen.threshold or block.threshold) if selection == "threshold" else None
    return dict(selection=selection, gate=chosen.gate or block.gate, threshold=threshold)


def checkpoints(output: str | Path) -> list[Path]:
    """Checkpoints to resume from in a run's directory, oldest first."""
    found = [path for path in Path(output).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The Trainer's own arguments, from a recipe."""
    runtime = recipe.runtime
    on_gpu = runtime.device == "auto" and torch.cuda.is_available()
    return TrainingArguments(
        output_dir=recipe.output,
        per_device_train_batch_size=recipe.batch.sequences,
        gradient_accumulation_steps=recipe.batch.accumulation,
        max_steps=ENDLESS,
        max_grad_norm=recipe.optimizer.max_grad_norm,
        bf16=runtime.bf16,
        use_cpu=not on_gpu,
        seed=recipe.seed,
        data_seed=recipe.seed,
        logging_strategy="steps",
        logging_steps=runtime.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would wait for the GPU at every step, to hide what should be seen
        save_strategy="no" if runtime.save_steps is None else "steps",
        save_steps=runtime.save_steps or 1,
        report_to=[],
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_pin_memory=on_gpu,
        average_tokens_across_devices=False,
        ddp_find_unused_parameters=not _routers_always_learn(recipe),
        disable_tqdm=True,
    )


def _routers_always_learn(recipe: Recipe) -> bool:
    """Whether every stage gives the routers a gradient, whatever the checkpoint's gate."""
    return all(any(stage.losses.model_dump().values()) or stage.gate == "sigmoid" for stage in recipe.stages)
