"""A recipe from start to end: convert, load, train, export, measure. What ``prunepath train`` runs."""

import functools
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from prunepath_vllm.arguments import check_hub_name, check_output_folder, require_package
from prunepath_vllm.checkpoint import read_config, read_tensor_index, refuse_changed, validate_checkpoint
from prunepath_vllm.config import PrunePathConfig
from prunepath_vllm.conversion.calibrate import CURVE_TAUS, calibrate
from prunepath_vllm.conversion.convert import convert
from prunepath_vllm.conversion.costs import evenly_spread, positions_to_skip
from prunepath_vllm.conversion.model_card import QUALITY_FILE, write_model_card
from prunepath_vllm.conversion.rewrite import rewrite_checkpoint
from prunepath_vllm.errors import UsageError
from prunepath_vllm.families import Family, family_of
from prunepath_vllm.files import check_apart, new_directory
from prunepath_vllm.modeling import load_tokenizer
from prunepath_vllm.modeling.modeling_utils import checkpoint_directory
from prunepath_vllm.tau import level_curve
from prunepath_vllm.training.adapter import (
    merge_adapter,
    neuron_order,
    order_of,
    read_adapter,
    save_adapter,
    save_delta,
    update_configuration,
)
from prunepath_vllm.training.checks import (
    CONTINUED,
    MADE,
    STARTED,
    check_length,
    check_same_run,
    check_teacher,
)
from prunepath_vllm.training.data import check_source, held_out_batches, load_training_data
from prunepath_vllm.training.low_rank import add_low_rank, merge_low_rank
from prunepath_vllm.training.measure import Batch, Point, measure
from prunepath_vllm.training.model import TrainingModel, family_of_model
from prunepath_vllm.training.recipe import Conversion, Recipe, save_recipe
from prunepath_vllm.training.reports import LOG_FILE, Reports
from prunepath_vllm.training.sharding import check_processes, check_sharding, fill, is_sharded, whole_parameters
from prunepath_vllm.training.targets import SEQUENCES, LayerCosts, layer_costs
from prunepath_vllm.training.trainer import PARTIAL, PrunePathTrainer, checkpoints, routing_of

DENSE = "dense"
"""Directory in the output of a new random model, or of a dense model with a new head."""
START = "start"
"""Directory in the output of what a dense model was converted to."""
RESULT = "model"
ADAPTER = "adapter.safetensors"
ROUTER_DEVIATION = 0.02
PATIENCE = timedelta(hours=2)
"""How long other processes wait for the main one, which converts, exports and measures alone."""


def train(recipe: Recipe, *, resume: bool = False) -> Path:
    """Train as a recipe says.

    Args:
        recipe: what to do.
        resume: continue from the last checkpoint in the recipe's output, if there is one.

    Returns:
        The directory of the result: a PrunePath checkpoint, or a dense one where a dense model was trained.

    Raises:
        UsageError: a recipe whose parts do not fit together, data or an output directory that cannot be used.
        TrainingError: the training diverged; the last checkpoint written stays.
        ConfigError, CheckpointError: the model is not one of ours, or broken.
    """
    require_package("accelerate", "train", "training")
    output = Path(recipe.output)
    _check_inputs(recipe, output, resume=resume)
    there = output.exists()
    try:
        return _train(recipe, output, resume=resume)
    except BaseException:
        if not there:
            with suppress(OSError):  # something has been made in it
                output.rmdir()
        raise


def _check_inputs(recipe: Recipe, output: Path, *, resume: bool) -> None:
    """Refuse what can be seen to be wrong before a model is made, converted or loaded, or anything written."""
    check_sharding(recipe)
    check_output_folder(output, "output")
    _check_apart(recipe, output)
    if not resume and (checkpoints(output) or (output / RESULT).exists() or (output / LOG_FILE).exists()):
        raise UsageError(f"output {output}: holds another run; expected a new directory, or --resume")
    keys: tuple[str, ...] = ()
    what = ""
    if checkpoints(output):
        keys, what = CONTINUED, "its training goes on with"
    elif (output / START).exists():
        keys, what = STARTED, "a starting model is there of"
    elif (output / DENSE).exists():
        keys, what = MADE, "a dense model is there of"
    check_same_run(recipe, output, keys=keys, what=what)
    held_out = recipe.evaluation.data
    for source in [*recipe.data.train, *([held_out] if held_out else [])]:
        check_source(source)
    text = recipe.model.convert.text if recipe.model.convert is not None else None
    if text is not None and not Path(text).is_file():
        raise UsageError(f"model.convert.text: {text}: no such file; expected a text file")
    check_length(recipe)
    if recipe.distillation is not None:
        read_config(_directory(recipe.distillation.teacher))
    if recipe.model.adapter is not None:
        if not Path(recipe.model.adapter).is_file():
            raise UsageError(f"model.adapter: {recipe.model.adapter}: no such file; expected an adapter")
        read_adapter(recipe.model.adapter, names=())
    if recipe.runtime.tensorboard:
        require_package("tensorboard", "train", "runtime.tensorboard")


def _check_apart(recipe: Recipe, output: Path) -> None:
    """Refuse what this run would write into, replace or, of its checkpoints, delete while it still reads it."""
    teacher = recipe.distillation.teacher if recipe.distillation is not None else None
    for source in (recipe.model.path, recipe.model.dense, teacher):
        for target in (output / RESULT, *checkpoints(output)):
            if source is not None:
                check_apart(target, source)
    if recipe.model.adapter is not None:
        check_apart(output / ADAPTER, recipe.model.adapter)


def _train(recipe: Recipe, output: Path, *, resume: bool) -> Path:
    from accelerate import PartialState

    last = next(reversed(checkpoints(output)), None) if resume else None
    processes = PartialState(cpu=not _on_gpu(recipe), timeout=PATIENCE)
    check_processes(recipe, processes.num_processes)
    with processes.main_process_first():
        if processes.is_main_process:
            output.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(output / PARTIAL, ignore_errors=True)
            if _is_made(recipe) and not (output / DENSE).exists():
                _make_dense(recipe, output / DENSE)
                save_recipe(recipe, output)  # at once: what has been made is of this one
            if recipe.model.convert is not None and not (output / START).exists():
                _convert(recipe, recipe.model.convert, output / START)
                save_recipe(recipe, output)
            if recipe.model.adapter is not None and not (output / START).exists():
                merge_adapter(_directory(recipe.model.path), recipe.model.adapter, output / START)
                save_recipe(recipe, output)
    start = output / START if _has_dense(recipe) else _directory(_source(recipe))
    tokenizer = load_tokenizer(start)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    set_seed(recipe.seed)
    model = load_model(recipe, start, tokenizer)
    on_gpu = _on_gpu(recipe)
    if on_gpu:
        torch.set_float32_matmul_precision("high")  # the routers' products; TF32 holds bfloat16 inputs exactly
    compiled = recipe.runtime.compile and on_gpu
    classes = model.config.num_labels if recipe.data.task == "classification" else None
    with processes.main_process_first():
        data = load_training_data(recipe.data, tokenizer, pad_to_length=compiled, classes=classes)
    per_step = recipe.batch.sequences * processes.num_processes
    if len(data) < per_step:  # type: ignore[arg-type]
        raise UsageError(f"data.train: {len(data)} sequences; expected at least {per_step}, one batch")  # type: ignore[arg-type]
    # What only the export needs, but may be wrong, comes before the training too.
    main = processes.is_main_process
    held_out = held_out_batches(recipe, tokenizer, recipe.evaluation.max_tokens, classes=classes) if main else []
    source = _adapter_source(recipe, start) if main else None
    costs = _layer_costs(recipe, model, data)
    if recipe.model.rank is not None:
        add_low_rank(model, recipe.model.rank)
    if recipe.model.embeddings == "frozen":
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):
            if part is not None:
                part.requires_grad_(False)
    if recipe.runtime.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    training = TrainingModel(
        model,
        teacher=_teacher(recipe, model, tokenizer, on_gpu),
        teacher_share=recipe.distillation.share if recipe.distillation else 0.0,
        hidden_weight=recipe.distillation.hidden if recipe.distillation else 0.0,
        costs=costs,
        compiled=compiled,
        sharded=is_sharded(recipe),
    )

    trainer = PrunePathTrainer(recipe, training, data, tokenizer)
    wanted = recipe.evaluation.point_tokens if recipe.evaluation.points and main else 0
    trainer.add_callback(Reports(trainer, held_out_batches(recipe, tokenizer, wanted) if wanted else []))
    if processes.is_main_process:
        save_recipe(recipe, output)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    result = output / RESULT
    if is_sharded(recipe):
        trainer.optimizer.state.clear()  # room for the whole model on the main process's GPU
        whole = _gathered(trainer, start, tokenizer)
    else:
        whole = trainer.training.model
    with processes.main_process_first():
        if processes.is_main_process:
            _export(trainer, whole, start, result, tokenizer, held_out, source)
    return result


def _gathered(trainer: PrunePathTrainer, start: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
    """The sharded model, whole and on the CPU, on the main process; all have to call this."""
    recipe, main = trainer.recipe, trainer.args.process_index == 0
    whole = load_model(recipe, start, tokenizer) if main else None
    if whole is not None and recipe.model.rank is not None:
        add_low_rank(whole, recipe.model.rank)
    known = {} if whole is None else dict(whole.named_parameters())
    for name, tensor in whole_parameters(trainer.training.model):
        if main:
            fill(known[name], tensor)
    return whole


def _is_made(recipe: Recipe) -> bool:
    """Whether the dense model to convert or train is made first: random, or given a new head."""
    return recipe.model.scratch is not None or (recipe.model.labels is not None and recipe.model.convert is not None)


def _has_dense(recipe: Recipe) -> bool:
    """Whether `path` is a dense model, from which the checkpoint to train is made."""
    return recipe.model.convert is not None or recipe.model.adapter is not None


def _source(recipe: Recipe) -> str:
    """The model to convert or train: one made first, or the one the recipe names."""
    return str(Path(recipe.output) / DENSE) if _is_made(recipe) else recipe.model.path


def _directory(name: str) -> Path:
    """A model's directory; a Hugging Face name is downloaded."""
    if not Path(name).is_dir():
        check_hub_name(name)
    try:
        return checkpoint_directory(name, {})
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"model {name}: no such directory, nor to be had from Hugging Face ({reason})") from None


def _make_dense(recipe: Recipe, destination: Path) -> None:
    """A dense model and its tokenizer as the recipe asks for them; appears complete or not at all."""
    import transformers

    auto = getattr(transformers, _task_class(recipe))
    labels = {} if recipe.model.labels is None else {"num_labels": recipe.model.labels}
    set_seed(recipe.seed)
    try:
        tokenizer = AutoTokenizer.from_pretrained(recipe.model.path)
        if recipe.model.scratch is None:
            options = dict(dtype="auto", use_safetensors=True, ignore_mismatched_sizes=True, **labels)
            model = auto.from_pretrained(recipe.model.path, **options)
        else:
            ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            fields = {"vocab_size": len(tokenizer), **ids, **labels, **recipe.model.scratch}
            model = auto.from_config(AutoConfig.for_model(**fields))
    except (KeyError, OSError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"model: {recipe.model.scratch or recipe.model.path}: cannot be made ({reason})") from None
    with new_directory(destination) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)


def _on_gpu(recipe: Recipe) -> bool:
    return recipe.runtime.device == "auto" and torch.cuda.is_available()


def _task_class(recipe: Recipe) -> str:
    classification = recipe.data.task == "classification"
    return "AutoModelForSequenceClassification" if classification else "AutoModelForCausalLM"


def _convert(recipe: Recipe, options: Conversion, destination: Path) -> None:
    """The starting checkpoint; appears complete or not at all."""
    device = "cuda" if _on_gpu(recipe) else "cpu"
    calibrated = options.router == "calibrated"
    if (calibrated or options.split == "coactivation") and options.text is None:
        raise UsageError("model.convert.text: null; expected a text file for calibrated routers or co-activation")
    with new_directory(destination) as staging:
        convert(
            _source(recipe),
            staging,
            expert_size=options.expert_size,
            split=options.split,
            gate=options.gate,
            router_input=options.router_input,
            router_rank=options.router_rank,
            calibration_text=options.text if options.split == "coactivation" else None,
            seed=recipe.seed,
            device=device,
        )
        if calibrated:
            assert options.text is not None
            calibrate(
                staging,
                options.text,
                max_tokens=options.tokens,
                dense_positions=options.dense_positions,
                seed=recipe.seed,
                device=device,
            )
        else:
            summary = validate_checkpoint(staging)
            routers: dict[str, Tensor | None] = {}
            generator = torch.Generator().manual_seed(recipe.seed)
            for layer in range(summary.num_layers if options.router == "random" else 0):
                name = f"{summary.family.router(layer)}.weight"
                routers[name] = torch.randn(summary.tensors[name].shape, generator=generator) * ROUTER_DEVIATION
            rewrite_checkpoint(summary, routers, dense_positions=options.dense_positions)


def load_model(recipe: Recipe, start: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The starting model in float32, on the CPU.

    Raises:
        UsageError: it does not do the recipe's task, or its experts are quantised.
    """
    import transformers

    from prunepath_vllm.modeling import register_auto_classes

    register_auto_classes()
    family = _family(start)
    read_tensor_index(start)
    if (block := read_config(start).get("prunepath_config")) is not None:
        refuse_changed(start, PrunePathConfig.parse(block), "training")
    task_class = _task_class(recipe)
    if family.auto_class != task_class:
        raise UsageError(f"data.task: {recipe.data.task!r}, but {start} is a {family.architecture}")
    options: dict[str, Any] = {}
    if recipe.model.labels is not None and not _is_made(recipe):
        options = dict(num_labels=recipe.model.labels, ignore_mismatched_sizes=True)
    small = recipe.model.rank is not None or recipe.model.adapter_bits is not None
    if small and recipe.model.dense is None and not _has_dense(recipe):
        raise UsageError(
            "model.dense: null; expected the dense model that model.path was converted from, with rank or adapter_bits"
        )
    model = getattr(transformers, task_class).from_pretrained(start, dtype=torch.float32, **options)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.train()


def _family(path: Path) -> Family:
    config = read_config(path)
    return family_of(config, converted="prunepath_config" in config)


def _layer_costs(recipe: Recipe, model: PreTrainedModel, data: Any) -> list[LayerCosts]:
    """How contributions are measured, by layer, on some of the training data; nothing where none are taught."""
    # A classifier's head may be new, and the gradients below it mean nothing yet: there the squared norm has to do.
    if recipe.data.task == "classification" or not any(stage.losses.contribution for stage in recipe.stages):
        return []
    prunepath = PrunePathConfig.parse(model.config.prunepath_config)
    family = family_of_model(model)
    return layer_costs(
        model.to("cuda" if _on_gpu(recipe) else "cpu"),
        family,
        prunepath.num_experts,
        _some_sequences(data, SEQUENCES),
        skip=positions_to_skip(family, prunepath.dense_positions),
        seed=recipe.seed,
    )


def _some_sequences(data: Any, count: int) -> list[Tensor]:
    """Token ids of at most `count` sequences, spread evenly over the data: int64 [S] each."""
    return [torch.as_tensor(data[i]["input_ids"]).long() for i in evenly_spread(len(data), count).tolist()]


def _teacher(
    recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, on_gpu: bool
) -> PreTrainedModel | None:
    if recipe.distillation is None:
        return None
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if on_gpu else torch.float32
    teacher = AutoModelForCausalLM.from_pretrained(recipe.distillation.teacher, dtype=dtype, use_safetensors=True)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    check_teacher(recipe.distillation.teacher, teacher, tokenizer, vocabulary)
    ours, its = ((one.config.num_hidden_layers, one.config.hidden_size) for one in (model, teacher))
    if recipe.distillation.hidden and ours != its:
        raise UsageError(
            f"distillation.hidden: {recipe.distillation.teacher} has {its[0]} layers of width {its[1]}; "
            f"expected {ours[0]} of {ours[1]}, as the model has"
        )
    return teacher.requires_grad_(False).eval().to("cuda" if on_gpu else "cpu")


def _adapter_source(recipe: Recipe, start: Path) -> tuple[Path, list[Tensor]] | None:
    """What an adapter is written against: the dense model, and where each neuron of `start` is in it, by layer.

    Raises:
        UsageError: `start` was not made of that dense model, or not with gate 'none'.
    """
    if recipe.model.rank is None and recipe.model.adapter_bits is None:
        return None
    dense = _directory(recipe.model.dense or _source(recipe))
    # Where neurons have been trained, only the adapter tells where each came from.
    before = recipe.model.adapter
    return dense, neuron_order(dense, start) if before is None else order_of(before, start)


def _export(
    trainer: PrunePathTrainer,
    model: Any,
    start: Path,
    result: Path,
    tokenizer: PreTrainedTokenizerBase,
    held_out: list[Batch],
    source: tuple[Path, list[Tensor]] | None,
) -> None:
    """Write the trained model in its starting dtype, the directory complete or not at all; then measure it."""
    recipe = trainer.recipe
    config = read_config(start)
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"))
    routing = None
    if trainer.block is not None:
        routing = routing_of(recipe, len(recipe.stages) - 1, trainer.block)
        block = PrunePathConfig.parse(trainer.block.to_json() | routing | {"tau_curve": None})
        model.config.prunepath_config = block.to_json()
    adapter = result.parent / ADAPTER
    write_adapter: Callable[[], Any] | None = None
    if source is not None:
        dense, orders = source
    if recipe.model.adapter_bits is not None:
        count = recipe.model.adapter_sequences if recipe.data.task != "classification" else 0
        write_adapter = functools.partial(
            save_delta,
            dense,
            result,
            orders,
            bits=recipe.model.adapter_bits,
            destination=adapter,
            sequences=_some_sequences(trainer.train_dataset, count),
            lowest_tau=min(1.0, recipe.stages[-1].lowest_tau),
        )
    if recipe.model.rank is not None:
        for parameter in model.parameters():
            if parameter.requires_grad:  # as the adapter holds it, so that merging it gives the same checkpoint
                parameter.data = parameter.data.bfloat16().float()
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        write_adapter = functools.partial(save_adapter, dense, result, orders, trained, destination=adapter)
        merge_low_rank(model.base_model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    with new_directory(result, replace=True) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        save_recipe(recipe, staging)
        if routing is not None:
            validate_checkpoint(staging, check_values=True)
            write_model_card(staging)
    if write_adapter is not None:
        write_adapter()
    # From here on nothing can lose the training.
    model.to(trainer.args.device)
    if model.device.type == "cpu":
        model.float()  # the same weights; many CPUs have no fast bfloat16 product
    exported = TrainingModel(model.eval()).to(model.device)
    if routing is not None:
        exported.set_routing(**routing)
    if not held_out:
        return
    points = _measure(exported, held_out, routing)
    measured = dict(data=_data_name(recipe), points=[asdict(point) for point in points])
    (result / QUALITY_FILE).write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    if routing is not None:
        curve = tau_curve(points) if routing["selection"] == "cumulative_mass" else None
        rewrite_checkpoint(validate_checkpoint(result), {}, tau_curve=curve)
    if write_adapter is not None:
        update_configuration(adapter, result)  # with the curve


def _data_name(recipe: Recipe) -> str:
    source = recipe.evaluation.data
    assert source is not None
    return Path(source.path).name if Path(source.path).exists() else f"{source.path} {source.split}"


def _measure(exported: TrainingModel, batches: list[Batch], routing: dict[str, Any] | None) -> list[Point]:
    taus: list[float | None] = [None]
    if routing is not None:
        # Under threshold selection tau only tells every expert from the selected ones.
        taus = list(CURVE_TAUS) if routing["selection"] == "cumulative_mass" else [0.5, 1.0]
    return measure(exported, batches, taus, progress=True)


def tau_curve(points: list[Point]) -> list[tuple[float, float]] | None:
    """The (tau, FFN sparsity) pairs of a checkpoint's configuration."""
    return level_curve((point.tau, point.ffn_sparsity) for point in points if point.tau is not None) or None
