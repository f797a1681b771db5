# prunepath-vllm on vLLM's own image: its engine, torch and Triton stay as they are.
#     docker build -t prunepath-vllm .                              # or with --build-arg VLLM=0.33.0
#     docker run --gpus all --ipc=host -p 8000:8000 -v /models:/models prunepath-vllm /models/CKPT
ARG VLLM=0.32.0
FROM vllm/vllm-openai:v${VLLM}

COPY pyproject.toml setup.py README.md LICENSE /opt/prunepath-vllm/
COPY prunepath_vllm /opt/prunepath-vllm/prunepath_vllm

# --no-deps: whatever the package needs to serve, the engine's image has; an upgrade of torch would break the engine.
RUN python3 -m pip install --no-cache-dir --no-deps /opt/prunepath-vllm

EXPOSE 8000
ENTRYPOINT ["prunepath", "serve"]
