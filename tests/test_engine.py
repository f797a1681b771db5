"""The engine against an independent implementation (naive.py): every family, both model runners, on real vLLM."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import runners
import torch
import warm
from naive import load_naive, logits_of_answer, naive_logits
from safetensors.torch import load_file, save_file
from tiny_models import CAUSAL_FAMILY_NAMES, ENGINE_FAMILY_NAMES, save_prunepath

SCRIPT = Path(__file__).with_name("engine_scenarios.py")
RUNNERS = ("v1", "v2")


def run_engine(scenario: str, checkpoint: Path, runner: str = "v1", script: Path = SCRIPT, **options) -> dict:
    """One scenario of engine_scenarios.py, or of another such script, in its own process."""
    start = subprocess.run if runner == "cuda" else warm.run
    command = [sys.executable, script, scenario, checkpoint, runner, json.dumps(options)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **runners.environment(runner)}
    said = start(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=env
    ).stdout
    results = [line for line in said.splitlines() if line.startswith("RESULT ")]
    assert results, said[-8000:]
    return json.loads(results[0].removeprefix("RESULT "))


def assert_naive(rows: list[dict], checkpoint: Path, default_tau: float = 1.0, slack: float = 0.0) -> None:
    """Every generated token is the naive model's greedy choice after the prompt and the tokens before it.

    With `slack`, tokens were sampled at a low temperature: their logit may lie this far below the best.
    """
    model = load_naive(checkpoint)
    cases = {
        (default_tau if row["tau"] is None else row["tau"], tuple(row["prompt"]), tuple(tokens))
        for row in rows
        for tokens in row["tokens"]
    }
    with torch.no_grad():
        for tau, prompt, tokens in cases:
            logits = logits_of_answer(model, prompt, tokens, tau)
            if slack:
                chosen = logits.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
                assert (logits.max(-1).values - chosen).max() < slack, f"tau {tau}"
            else:
                assert logits.argmax(-1).tolist() == list(tokens), f"tau {tau}"


@pytest.fixture(scope="module")
def decoded(prunepath_checkpoint):
    """``decoded(family, runner)``: the checkpoint and what the decoder scenario gave."""
    made = {}

    def get(family: str, runner: str):
        checkpoint = prunepath_checkpoint(family, default_tau=0.6)
        if (family, runner) not in made:
            made[family, runner] = run_engine("decoder", checkpoint, runner)
        return checkpoint, made[family, runner]

    return get


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("family", ENGINE_FAMILY_NAMES)
class TestDecoders:
    """Chunked prefill throughout: steps hold 64 tokens and most prompts are longer."""

    def test_mixed_taus_in_one_batch_equal_the_naive_model(self, decoded, family, runner):
        checkpoint, result = decoded(family, runner)
        assert_naive(result["mixed"], checkpoint)

    def test_batched_equals_alone(self, decoded, family, runner):
        _, result = decoded(family, runner)
        assert [row["tokens"] for row in result["mixed"]] == [row["tokens"] for row in result["lone"]]
        assert len({tuple(row["tokens"][0]) for row in result["mixed"]}) > 6  # the dial does something

    def test_prefix_cache_is_shared_within_a_tau_only(self, decoded, family, runner):
        checkpoint, result = decoded(family, runner)
        rows = result["shared_prefix"]
        seen = set()
        for row in rows:
            key = min(row["tau"], 1.0)
            assert (row["cached"] > 0) == (key in seen), rows
            seen.add(key)
        assert_naive(rows, checkpoint)

    def test_n_and_the_default_tau(self, decoded, family, runner):
        checkpoint, result = decoded(family, runner)
        assert len(result["n3"]["tokens"]) == 3
        assert_naive([result["n3"]], checkpoint, slack=0.3)
        assert_naive([result["default"]], checkpoint, default_tau=0.6)


@pytest.mark.parametrize("runner", RUNNERS)
def test_encoder_equals_the_naive_model(prunepath_checkpoint, runner):
    checkpoint = prunepath_checkpoint("roberta", default_tau=0.6)
    result = run_engine("encoder", checkpoint, runner)
    model = load_naive(checkpoint)
    with torch.no_grad():
        expected = [
            naive_logits(model, ids, tau).softmax(-1)
            for ids, tau in zip(result["prompts"], result["taus"], strict=True)
        ]
    torch.testing.assert_close(torch.tensor(result["mixed"]), torch.stack(expected), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(result["lone"]), torch.stack(expected), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("runner", RUNNERS)
def test_preempted_requests_are_recomputed_at_their_tau(prunepath_checkpoint, runner):
    checkpoint = prunepath_checkpoint("llama", default_tau=0.6)
    result = run_engine("preemption", checkpoint, runner, max_tokens=40 if runner == "v1" else 20)
    assert result["preemptions"] > 0
    assert_naive(result["mixed"], checkpoint)


NGRAMS = {
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    },
    "disable_log_stats": False,
}


@pytest.mark.parametrize(
    ("family", "options", "eager", "engine"),
    [
        ("llama", dict(selection="threshold", threshold=0.6), True, {}),
        ("qwen2", dict(gate="sigmoid", router_bias=True), False, {}),
        ("gpt2", dict(dense_positions=3, expert_size=16), False, NGRAMS),
    ],
    ids=["llama-threshold", "qwen2-sigmoid-gate-router-bias", "gpt2-dense-positions-ngram"],
)
def test_variants_equal_the_naive_model(prunepath_checkpoint, family, options, eager, engine):
    checkpoint = prunepath_checkpoint(family, default_tau=0.6, **options)
    result = run_engine("decoder", checkpoint, eager=eager, engine=engine)
    assert_naive([*result["mixed"], *result["shared_prefix"]], checkpoint)
    assert [row["tokens"] for row in result["mixed"]] == [row["tokens"] for row in result["lone"]]
    assert bool(result["accepted"]) == bool(engine)


@pytest.mark.parametrize("family", ENGINE_FAMILY_NAMES)
def test_tau_1_gives_the_dense_engines_tokens(prunepath_checkpoint, dense_checkpoint, family):
    sparse = run_engine("dense", prunepath_checkpoint(family, default_tau=0.6))
    assert sparse["tokens"] == run_engine("dense", dense_checkpoint(family))["tokens"]


OTHER_FAMILY_NAMES = tuple(name for name in CAUSAL_FAMILY_NAMES if name not in ENGINE_FAMILY_NAMES)


@pytest.fixture(scope="module")
def other_families(prunepath_checkpoint, dense_checkpoint):
    """What the families scenario gave for every one of OTHER_FAMILY_NAMES; one process for all engines."""
    cases = {
        name: dict(sparse=str(prunepath_checkpoint(name, default_tau=0.6)), dense=str(dense_checkpoint(name)))
        for name in OTHER_FAMILY_NAMES
    }
    return run_engine("families", Path(), cases=cases)


@pytest.mark.parametrize("family", OTHER_FAMILY_NAMES)
def test_a_family_of_a_row_equals_the_naive_model_and_at_tau_1_the_dense_engine(
    other_families, prunepath_checkpoint, family
):
    result = other_families[family]
    assert_naive(result["sparse"]["mixed"], prunepath_checkpoint(family, default_tau=0.6))
    assert len({tuple(row["tokens"][0]) for row in result["sparse"]["mixed"]}) >= 3  # small windows
    assert result["sparse"]["tau 1"] == result["dense"]["tau 1"]


@pytest.mark.parametrize(
    ("layout", "runner"),
    # V1's eager CPU worker of vLLM 0.32.0 has no pipelines; steps of V2 take long here.
    [({"tensor_parallel_size": 2}, "v1"), ({"pipeline_parallel_size": 2}, "v2")],
    ids=["tensor-parallel", "pipeline-parallel"],
)
@pytest.mark.parametrize("family", [name for name in OTHER_FAMILY_NAMES if name != "mistral"])  # which is a Llama
def test_a_family_of_a_row_gives_the_same_in_two_processes(
    other_families, prunepath_checkpoint, family, layout, runner
):
    cases = {family: dict(sparse=str(prunepath_checkpoint(family, default_tau=0.6)))}
    result = run_engine("families", Path(), runner, cases=cases, engine=layout)[family]["sparse"]
    one = other_families[family]["sparse"]
    assert (one["processes"], result["processes"]) == (1, 2)
    count = len(result["tau 1"][0])
    assert [row["tokens"][0] for row in result["mixed"]] == [row["tokens"][0][:count] for row in one["mixed"]]
    assert result["tau 1"] == [tokens[:count] for tokens in one["tau 1"]]


@pytest.mark.parametrize(
    ("family", "runner", "eager"),
    [("llama", "v1", True), ("gpt2", "v1", False), ("llama", "v2", True)],
    ids=["llama", "gpt2-compiled", "llama-v2"],
)
def test_weights_loaded_again_are_the_checkpoints(prunepath_checkpoint, tmp_path, family, runner, eager):
    checkpoint = prunepath_checkpoint(family, default_tau=0.6)
    # It has router biases, and the first has none, also when it is loaded after it.
    changed = prunepath_checkpoint(family, default_tau=0.6, seed=7, router_bias=True)
    other = prunepath_checkpoint(family, default_tau=0.6, gate="sigmoid")
    torn = shutil.copytree(checkpoint, tmp_path / "torn")
    os.truncate(torn / "model.safetensors", 5000)
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors[max(tensors)] *= float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    refused = [str(other), str(torn), str(tmp_path / "nowhere"), str(broken)]
    options = dict(changed=str(changed), refused=refused, refused_tensors=str(broken), eager=eager)
    result = run_engine("reload", checkpoint, runner, **options)
    rows = result["rows"]
    assert_naive(rows["before"], checkpoint)
    assert rows["same"] == rows["before"]
    assert_naive(rows["changed"], changed)
    assert [row["tokens"] for row in rows["changed"]] != [row["tokens"] for row in rows["before"]]
    for said, expected in zip(result["refused"], ("gate", "model.safetensors", "no such", "NaN", "NaN"), strict=True):
        assert expected in (said or ""), result["refused"]
    assert rows["after refusals"] == rows["changed"]
    assert rows["back"] == rows["before"]
    if family != "gpt2":  # trainers send to GPUs, where a tied head has no packed copy of its own
        assert rows["sent"] == rows["changed"]


ROPE = {
    "linear": dict(factor=2),  # a whole number, as many configurations write it
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    "yarn": dict(factor=4.0, original_max_position_embeddings=128, attention_factor=1.3, beta_fast=16.0),
    "longrope": dict(partial_rotary_factor=0.5, short_factor=[3 - i / 4 for i in range(8)], long_factor=[9.0] * 8),
}
FUNCTIONS = {
    "llama-relu": ("llama", dict(hidden_act="relu", attention_bias=True, head_dim=64), "llama3", 512),
    "llama-gelu": ("llama", dict(hidden_act="gelu", tie_word_embeddings=True, rms_norm_eps=0.1), "linear", 1024),
    "llama-tanh": ("llama", dict(hidden_act="gelu_pytorch_tanh", mlp_bias=True), "yarn", 512),
    "qwen2-relu": (
        "qwen2",
        dict(hidden_act="relu", use_sliding_window=True, sliding_window=32, max_window_layers=0),
        None,
        512,
    ),
    # No layer's window: the engine would give one to all.
    "qwen2-gelu": (
        "qwen2",
        dict(hidden_act="gelu_new", use_sliding_window=True, sliding_window=32, max_window_layers=3),
        None,
        512,
    ),
    "gpt2": (
        "gpt2",
        dict(activation_function="silu", n_inner=192, layer_norm_epsilon=0.1, tie_word_embeddings=False),
        None,
        512,
    ),
    # As vLLM has it unless told otherwise: up to the original length, where the short factors hold.
    "phi3": ("phi3", dict(sliding_window=None, original_max_position_embeddings=120), "longrope", 120),
    "roberta": ("roberta", dict(max_position_embeddings=130, hidden_act="relu", layer_norm_eps=0.1), None, 128),
}
"""Family, configuration, rotary embedding, and how many tokens the engine takes."""


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    """The checkpoints of FUNCTIONS, the tokens of a prompt, and what the engine gave; one process for all engines."""
    prompt = torch.randint(4, 300, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    folder = tmp_path_factory.mktemp("functions")
    paths, cases = {}, {}
    for name, (family, options, rope, _) in FUNCTIONS.items():
        if rope is not None:
            options = options | dict(rope_parameters=dict(rope_type=rope, rope_theta=10_000.0, **ROPE[rope]))
        paths[name] = save_prunepath(family, folder / name, **options)
        cases[name] = [str(paths[name]), dict(max_num_batched_tokens=512)]
    cases["too long"] = [str(paths["roberta"]), dict(max_num_batched_tokens=512, max_model_len=129)]
    return paths, prompt, run_engine("functions", Path(), cases=cases, prompt=prompt)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_engine_computes_what_transformers_computes(functions, name):
    """Activations that the engine's dense classes lack, and fields that the two might read differently."""
    import transformers

    import prunepath_vllm

    prunepath_vllm.register()
    paths, prompt, results = functions
    result = results[name]
    assert "error" not in result, result
    auto = "AutoModelForSequenceClassification" if name == "roberta" else "AutoModelForCausalLM"
    model = getattr(transformers, auto).from_pretrained(paths[name]).eval()
    for tau in (1.0, 0.5):
        with torch.no_grad():
            logits = model(torch.tensor([prompt]), tau=tau).logits[0]
        if name == "roberta":
            expected = logits.softmax(-1)
        else:
            expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(result[str(tau)]), expected, atol=1e-4, rtol=1e-4)


def test_a_prompt_longer_than_the_position_table_is_refused(functions):
    _, _, results = functions
    for name, (_, _, _, limit) in FUNCTIONS.items():
        assert results[name]["limit"] == limit
        assert f"maximum context length is {limit} tokens" in results[name]["too long"]
    assert "max_model_len: 129; expected at most 128" in results["too long"]["error"]


def test_refusals_name_the_parameter_the_value_and_the_range(prunepath_checkpoint):
    result = run_engine("refusals", prunepath_checkpoint("llama", default_tau=0.6))
    said = result["said"]
    assert "prunepath_report must be a name" in said.pop("report")
    assert said.pop("Tau").startswith("'Tau' is not read; expected 'tau'")
    assert said.pop("prefill_tau").startswith("prefill_tau is not read in a request")
    assert said.pop("extra_body").startswith(
        "extra_body.vllm_xargs.tau is not read; expected 'tau' among the extra arguments themselves"
    )
    assert len(said) == 12
    for value, message in said.items():
        assert message is not None, value
        if value == "both":
            assert "tau" in message
            assert "sparsity" in message
        elif value == "no curve":
            assert "tau_curve" in message
        else:
            assert "tau" in message
            assert value[:10] in message
            assert "(0, 1.05]" in message
    assert result["after"] == result["before"]
    # Offline nobody waits: a tau left to the engine is the range's highest, here dense and 0.5.
    assert result["left"] == {
        "auto": result["left"]["dense"],
        "range": result["before"],
        "dense": result["left"]["dense"],
    }
    assert result["left"]["dense"] != result["before"]
    assert result["mine"] == {"tau": 0.5}
    # A front end that checks nothing and salts nothing: the engine core does.
    assert_naive(result["around"]["rows"], prunepath_checkpoint("llama", default_tau=0.6), default_tau=0.6)
    assert result["around"]["said"] == "tau must be a number in (0, 1.05], got 3.0"
