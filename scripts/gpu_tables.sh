#!/usr/bin/env bash
# Measures what the documentation publishes of a GPU:  scripts/gpu_tables.sh OUT GROUP...
#   float8    Qwen2-7B's shape: bfloat16, float8, float8 with the attention's linears      (130 GB of GPU memory)
#   experts   Qwen2-7B's shape with experts of 8 and 4, routed beside the attention        (110 GB)
#   attention Qwen2-7B's shape with experts of 32, routed beside the attention             (55 GB)
#   32b       Qwen2.5-32B's shape, routed beside the attention                             (145 GB)
#   families  Qwen3-8B's shape; Qwen2-7B's routed beside the attention, mode "at_least"    (110 GB)
#   host      experts in host memory beside vLLM's offloading, Qwen2-7B and 32B            (130 GB, and 90 GB of host memory)
# A group's engines start together, which takes three minutes or so, and are measured one at a time.
set -euo pipefail
out=$(realpath -m "$1"); shift
mkdir -p "$out"
cd "$(dirname "$0")/.."

measure() { # NAME ARGUMENTS...
    local name=$1; shift
    # vLLM looks whether so much of the GPU is free when it starts; what it takes is the cache's size beside the weights.
    python3 -m prunepath_vllm.entrypoints.cli bench latency --num-iters 0 --gpu-memory-utilization 0.05 \
        --kv-cache-memory-bytes 1610612736 "$@" --lock "$out/lock" --output "$out/$name.json" >"$out/$name.log" 2>&1 &
}

steps="--share 1.0,0.5,0.2,0.1 --batch-size 1,4,16,64 --input-len 64 --output-len 65 --prefill 64,512,8192"
# Graphs of the sizes that are measured alone: vLLM would capture 51, up to 512, which takes a minute more.
steps="$steps --cudagraph-capture-sizes 1 4 16 64 512"
skewed="--share 1.0,0.2,0.1 --hottest-half 0.78 --batch-size 1 --output-len 17"
for group in "$@"; do
    case $group in
    float8)
        measure bfloat16 --shape qwen2-7b $steps
        measure float8 --shape qwen2-7b --expert-dtype float8_e4m3fn --dense-quantization fp8_per_channel $steps
        measure float8_linears --shape qwen2-7b --expert-dtype float8_e4m3fn --linears float8_e4m3fn \
            --router-input attention --dense-quantization fp8_per_channel $steps
        ;;
    families)
        measure qwen3-8b --shape qwen3-8b $steps
        measure at_least --shape qwen2-7b --router-input attention $steps \
            --additional-config '{"prunepath": {"mode": "at_least"}}'
        ;;
    experts)
        for size in 8 4; do
            measure "experts$size" --shape qwen2-7b --router-input attention --expert-size $size $steps
        done
        ;;
    attention)
        measure attention --shape qwen2-7b --router-input attention $steps
        ;;
    32b)  # a token takes 4.6 times the cache of Qwen2-7B's
        measure qwen2.5-32b_attention --shape qwen2.5-32b --router-input attention $steps \
            --kv-cache-memory-bytes 2684354560
        ;;
    host)
        measure host_half --shape qwen2-7b $skewed --offload-group-size 2 --offload-num-in-group 1 \
            --additional-config '{"prunepath": {"host_experts": 0.5}}'
        measure host_three_quarters --shape qwen2-7b $skewed --cpu-offload-gb 7.9 \
            --additional-config '{"prunepath": {"host_experts": 0.75}}'
        measure host_32b --shape qwen2.5-32b $skewed --repeats 1 --prefill 2048 --cpu-offload-gb 29.3 \
            --additional-config '{"prunepath": {"gpu_expert_gib": 23}}'
        ;;
    *) echo "gpu_tables.sh: $group: expected float8, experts, attention, 32b, families or host" >&2; exit 2 ;;
    esac
    wait
done
for file in "$out"/*.log; do
    echo "== $(basename "$file" .log)"
    grep -A 12 "^ *dense\|^prunepath bench" "$file" || tail -3 "$file"
done
