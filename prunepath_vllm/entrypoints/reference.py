"""The reference pages of the documentation, made from the code: ``python -m prunepath_vllm.entrypoints.reference``."""

import argparse
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from prunepath_vllm.benchmarks.report import markdown
from prunepath_vllm.config import ExpertUsage, PrunePathConfig, RouterOptions, Split
from prunepath_vllm.entrypoints.cli import build_parser
from prunepath_vllm.entrypoints.server.metrics import REQUEST_TAU
from prunepath_vllm.model_executor.counts import COUNTERS
from prunepath_vllm.model_executor.operator_policy import OperatorPolicy
from prunepath_vllm.training.recipe import recipe_table

FOLDER = Path(__file__).parents[2] / "docs" / "reference"
MADE = "<!-- made by `python -m prunepath_vllm.entrypoints.reference`; a test compares -->\n"


def table(header: tuple[str, ...], *rows: tuple[str, ...]) -> str:
    """A Markdown table of cells in which "|" means nothing."""
    return markdown(header, [[cell.replace("|", r"\|") for cell in row] for row in rows])


def command_line() -> str:
    """Every command with its arguments."""
    parser = build_parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    summaries = {action.dest: action.help or "" for action in commands._choices_actions}
    parts = [
        "# Command line\n\nErrors are one line on stderr: exit code 2 for wrong use, a model, checkpoint or file "
        "that is not there included, 1 for a failure, such as a broken checkpoint. `--debug`, which every command "
        "takes, shows the traceback.\n"
    ]
    for name, command in commands.choices.items():
        parts.append(f"## prunepath {name}\n\n{_sentence(command.description or summaries[name])}\n")
        rows = [
            (f"`{_spelled(action)}`", _help(action))
            for action in command._actions
            if action.dest not in ("help", "debug") and not isinstance(action, argparse._SubParsersAction)
        ]
        for action in command._actions:
            if isinstance(action, argparse._SubParsersAction):
                rows += [(f"`{one.dest}`", one.help or "") for one in action._choices_actions]
        if rows:
            parts.append(table(("argument", "meaning"), *rows) + "\n")
    return "\n".join(parts)


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _spelled(action: argparse.Action) -> str:
    name = action.option_strings[-1] if action.option_strings else ""
    if action.nargs == 0:
        return name
    values = "|".join(map(str, action.choices)) if action.choices else action.metavar or action.dest.upper()
    return f"{name} {values if isinstance(values, str) else ' '.join(values)}".strip()


def _help(action: argparse.Action) -> str:
    text = " ".join((action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%").split())
    needs = "required" if action.required and action.option_strings else ""
    known = "default" in text or action.default in (None, False, argparse.SUPPRESS, [])
    default = "" if known else f"default {action.default}"
    return "; ".join(part for part in (text, needs, default) if part)


def recipe() -> str:
    """Every key of a training recipe."""
    return (
        f"# Training recipes\n\nThe keys of the YAML file that `prunepath train --config` takes.\n\n{recipe_table()}\n"
    )


def policy() -> str:
    """The operator's policy."""
    described = _attributes(OperatorPolicy.__doc__ or "")
    rows = [(f"`{name}`", text) for name, text in described.items()]
    return (
        "# Operator's policy\n\nThe `prunepath` object of `--additional-config`, under `prunepath serve` and "
        "`vllm serve`, and of `LLM(additional_config=...)`; see [Serving](../serving.md#policy).\n\n"
        f"{table(('key', 'meaning'), *rows)}\n"
    )


def _attributes(docstring: str) -> dict[str, str]:
    """The entries of a docstring's "Attributes:" section."""
    section = docstring.partition("Attributes:\n")[2]
    entries = re.findall(r"^ {8}([\w, ]+): (.*?)(?=^ {8}\w|\Z)", section, re.MULTILINE | re.DOTALL)
    return {"`, `".join(names.split(", ")): " ".join(text.split()) for names, text in entries}


def metrics() -> str:
    """What /metrics has beside the engine's."""
    name, text = REQUEST_TAU
    rows = [(f"`{name}`", "histogram", "", text)]
    for name, text, labels in COUNTERS.values():
        rows.append((f"`{name}_total`", "counter", ", ".join(f"`{label}`" for label in labels), text))
    return (
        "# Metrics\n\nOn `/metrics`, beside the engine's; "
        "[Operating](../operating.md#metrics) says how to use them.\n\n"
        f"{table(('metric', 'type', 'labels', 'meaning'), *rows)}\n"
    )


def checkpoint() -> str:
    """The prunepath_config block of config.json."""
    rows = list(_fields(PrunePathConfig))
    return (
        "# Checkpoint format\n\nA directory that `from_pretrained` and `vllm serve` take: safetensors, the dense "
        "model's other files, "
        'and a config.json with `architectures: ["PrunePath<dense class>"]`, '
        '`model_type: "prunepath_<family>"` and the block `prunepath_config`:\n\n'
        f"{table(('field', 'default', 'meaning'), *rows)}\n\n"
        "Tensors keep the dense model's names and shapes, their neurons sorted so that expert e is rows (GPT-2: "
        "columns) e * expert_size to (e + 1) * expert_size, in each layer those of the experts that are kept. Beside "
        "them each feed-forward layer, `<ffn>`, has\n\n"
        + table(
            ("tensor", "shape", "where"),
            ("`<ffn>.router.weight`", "[num_experts, hidden], or [num_experts, rank]", "always"),
            ("`<ffn>.router.down.weight`", "[rank, hidden]", "with `router.rank`"),
            ("`<ffn>.router.bias`", "[num_experts]", "optional"),
        )
        + "\n\n`<ffn>` is `model.layers.N.mlp` (GLU families), `transformer.h.N.mlp` (GPT-2) or "
        "`roberta.encoder.layer.N.intermediate` (RoBERTa). With `expert_dtype` config.json may have a "
        "`quantization_config`, that of docs/quantisation.md: the attention's linears are quantised then. Missing, "
        "extra, mis-shaped or non-finite tensors, and a `format_version` that is not known, are refused by name.\n"
    )


def _nested(annotation: Any) -> Any | None:
    """The block that a field holds, or may hold; None where it holds none."""
    return next(
        (one for one in (RouterOptions, Split, ExpertUsage) if one in (annotation, *get_args(annotation))), None
    )


def _fields(model: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    for name, field in model.model_fields.items():
        if (nested := _nested(field.annotation)) is not None:
            yield from _fields(nested, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else f"`{'null' if field.default is None else field.default}`"
        yield f"`{prefix}{name}`", default, " ".join((field.description or "").split()).replace("``", "`")


PAGES: Mapping[str, Callable[[], str]] = {
    one.__name__: one for one in (command_line, recipe, policy, metrics, checkpoint)
}


def page(name: str) -> str:
    """One page as it lies in docs/reference."""
    return MADE + PAGES[name]()


def main() -> None:
    """Write all pages."""
    FOLDER.mkdir(exist_ok=True)
    for name in PAGES:
        (FOLDER / f"{name}.md").write_text(page(name), encoding="utf-8")


if __name__ == "__main__":
    main()
