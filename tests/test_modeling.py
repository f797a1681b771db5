"""The transformers models: the dense limit, the equations, tau per sequence, generation."""

import threading

import numpy as np
import pytest
import torch
from naive import load_naive, naive_generate, naive_logits, naive_sparsity
from tiny_models import CAUSAL_FAMILY_NAMES, FAMILY_NAMES, LAYERS, build_dense, build_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    TextClassificationPipeline,
    pipeline,
)

from prunepath_vllm.errors import TauError, UnsupportedFeatureError
from prunepath_vllm.modeling import register_auto_classes

TAUS = (0.05, 0.4, 0.6, 0.8, 0.95, 1.0)
VARIANTS = {
    "no gate": dict(),
    "sigmoid": dict(gate="sigmoid"),
    "router bias": dict(gate="sigmoid", router_bias=True),
    "threshold": dict(gate="none", selection="threshold", threshold=0.6),
    "experts of 8": dict(gate="sigmoid", expert_size=8),
    "dense positions": dict(dense_positions=2),
}


@pytest.fixture(scope="module", autouse=True)
def _registered():
    register_auto_classes()
    register_auto_classes()


def load(path, family, **kwargs):
    auto = AutoModelForSequenceClassification if family == "roberta" else AutoModelForCausalLM
    return auto.from_pretrained(path, **kwargs)


def tokens(batch, length, seed=0):
    return torch.randint(4, 300, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, input_ids, **kwargs):
    return model(input_ids, **kwargs).logits


@pytest.mark.parametrize("tau", [1.0, 1.05])
@pytest.mark.parametrize("options", [dict(), dict(gate="sigmoid", router_scale=0.0)], ids=["no gate", "folded gate"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_expert_is_the_dense_model(prunepath_checkpoint, family, options, tau):
    model = load(prunepath_checkpoint(family, **options), family)
    ids = tokens(2, 24)
    torch.testing.assert_close(logits(model, ids, tau=tau), logits(build_dense(family), ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_equals_one_token_one_expert_at_a_time(prunepath_checkpoint, family, variant):
    path = prunepath_checkpoint(family, **VARIANTS[variant])
    model, naive = load(path, family), load_naive(path)
    ids = tokens(1, 10)
    sparsities = []
    for tau in TAUS:
        with torch.no_grad():
            outputs = model(ids, tau=tau, output_router_logits=True)
        torch.testing.assert_close(outputs.logits[0], naive_logits(naive, ids[0].tolist(), tau), rtol=0, atol=2e-5)
        torch.testing.assert_close(outputs.ffn_sparsity[:, 0], naive_sparsity(naive), rtol=0, atol=1e-6)
        sparsities.append(outputs.ffn_sparsity.mean().item())
    assert sparsities == sorted(sparsities, reverse=True)
    assert sparsities[-1] == 0
    assert sparsities[0] > 0.3


def test_the_test_checkpoint_sweeps(prunepath_checkpoint):
    """The comparisons above are worth something only if the taus select differently."""
    model = load(prunepath_checkpoint("llama"), "llama")
    with torch.no_grad():
        outputs = model(tokens(len(TAUS), 30), tau=list(TAUS), output_router_logits=True)
    assert len({round(s, 2) for s in outputs.ffn_sparsity.mean((0, 2)).tolist()}) >= 5


@pytest.mark.parametrize("as_tensor", [False, True], ids=["list", "tensor"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_each_sequence_gets_what_it_gets_alone(prunepath_checkpoint, family, as_tensor):
    model = load(prunepath_checkpoint(family, gate="sigmoid"), family)
    ids = tokens(len(TAUS), 12)
    together = logits(model, ids, tau=torch.tensor(TAUS) if as_tensor else list(TAUS))
    for index, tau in enumerate(TAUS):
        alone = logits(model, ids[index : index + 1], tau=tau)
        torch.testing.assert_close(together[index], alone[0], rtol=0, atol=1e-5)
    assert not torch.allclose(together[0], logits(model, ids[:1], tau=0.8)[0], atol=1e-3)


@pytest.mark.parametrize(
    ("options", "same_as"),
    [
        (dict(default_tau=0.6), 0.6),
        (dict(), 1.0),
        (dict(selection="threshold", threshold=0.6, default_tau=1.0), 0.5),
    ],
    ids=["cumulative mass", "dense", "threshold"],
)
def test_tau_left_out(prunepath_checkpoint, options, same_as):
    model = load(prunepath_checkpoint("llama", **options), "llama")
    ids = tokens(2, 8)
    assert torch.equal(logits(model, ids), logits(model, ids, tau=same_as))
    assert torch.equal(model.model(ids).last_hidden_state, model.model(ids, tau=same_as).last_hidden_state)


@pytest.mark.parametrize(
    ("tau", "message"),
    [
        (0, r"tau must be a number in \(0, 1.05\], got 0$"),
        (1.06, "got 1.06"),
        (True, "got True"),
        ("0.5", "got '0.5'"),
        (float("nan"), "got nan"),
        ([0.5, -1.0], r"tau\[1\] must be .*got -1.0"),
        (1e-300, "tau must be at least .*got 1e-300"),
        (np.bool_(True), "got "),
        ([0.5, 1e-300], r"tau\[1\] must be at least .*got 1e-300"),
        ([0.5], r"one per sequence \(2\), got 1"),
        ([], r"one per sequence \(2\), got 0"),
        (torch.full((2, 1), 0.5), r"tau\[0\] must be"),
        (torch.tensor([True, True]), r"tau\[0\] must be"),
    ],
    ids=str,
)
def test_a_bad_tau_is_named(prunepath_checkpoint, tau, message):
    model = load(prunepath_checkpoint("llama"), "llama")
    with pytest.raises(TauError, match=message):
        model(tokens(2, 4), tau=tau)


@pytest.mark.parametrize(
    "tau",
    [np.float32(0.6), np.array(0.6), torch.tensor(0.6), np.array([0.6, 0.6]), [np.float64(0.6), torch.tensor(0.6)]],
    ids=repr,
)
def test_numbers_of_numpy_and_torch_are_numbers(prunepath_checkpoint, tau):
    model = load(prunepath_checkpoint("llama"), "llama")
    ids = tokens(2, 8)
    assert torch.equal(logits(model, ids, tau=tau), logits(model, ids, tau=0.6))
    assert not torch.equal(logits(model, ids, tau=tau), logits(model, ids))
    assert torch.equal(model.generate(ids, tau=tau, max_new_tokens=3), model.generate(ids, tau=0.6, max_new_tokens=3))


@pytest.mark.parametrize("bad", [[0.5, 2.0], "x", [0.5, 0.5, 0.5]], ids=str)
def test_generate_refuses_a_bad_tau(prunepath_checkpoint, bad):
    model = load(prunepath_checkpoint("llama"), "llama")
    with pytest.raises(TauError):
        model.generate(tokens(2, 4), tau=bad, max_new_tokens=2)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("name", ["sparsity", "Tau", "taus"])
def test_a_tau_by_another_name_is_refused(prunepath_checkpoint, family, name):
    model = load(prunepath_checkpoint(family), family)
    message = rf"^{name}: nothing reads it here; expected tau="
    for called in (model, model.base_model):
        with pytest.raises(TauError, match=message):
            called(tokens(2, 4), **{name: 0.5})
    if family == "roberta":
        with pytest.raises(TauError, match=message):
            pipeline("text-classification", model=model, tokenizer=build_tokenizer(), **{name: 0.5})
        return
    with pytest.raises(TauError, match=message):
        model.generate(tokens(2, 4), max_new_tokens=2, **{name: 0.5})
    with pytest.raises(TauError, match=message):
        model.generate(tokens(2, 4), GenerationConfig(max_new_tokens=2, **{name: 0.5}))


def test_continuous_batching_refuses_a_tau(prunepath_checkpoint):
    model = load(prunepath_checkpoint("llama"), "llama")
    with pytest.raises(TauError, match=r"^tau: "):
        model.generate_batch([[5, 6, 7]], max_new_tokens=2, tau=0.5)
    config = GenerationConfig(max_new_tokens=2, tau=0.5)
    for call in (
        lambda: model.generate_batch([[5, 6, 7]], config),
        lambda: model.generate_batch([[5, 6, 7]], generation_config=config),
        lambda: model.init_continuous_batching(config),
    ):
        with pytest.raises(TauError, match=r"^tau: "):
            call()


@pytest.mark.parametrize("dense_positions", [0, 3])
@pytest.mark.parametrize("family", CAUSAL_FAMILY_NAMES)
def test_generation_with_a_cache_equals_greedy_without(prunepath_checkpoint, family, dense_positions):
    path = prunepath_checkpoint(family, gate="sigmoid", dense_positions=dense_positions)
    model, naive = load(path, family), load_naive(path)
    model.generation_config.eos_token_id = None
    taus = [0.3, 0.8, 1.0]
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (2, 6, 9)]
    longest = max(map(len, prompts))
    padded = torch.tensor([[1] * (longest - len(prompt)) + prompt for prompt in prompts])
    generated = model.generate(padded, attention_mask=padded.ne(1).long(), tau=taus, max_new_tokens=8, do_sample=False)[
        :, longest:
    ]
    for row, (prompt, tau) in enumerate(zip(prompts, taus, strict=True)):
        assert generated[row].tolist() == naive_generate(naive, prompt, tau, 8)


@pytest.mark.parametrize("family", CAUSAL_FAMILY_NAMES)
def test_a_cache_continues_the_positions(prunepath_checkpoint, family):
    model = load(prunepath_checkpoint(family, dense_positions=3), family)
    ids = tokens(2, 8)
    cache, pieces = None, []
    for piece in ids.split([2, 3, 1, 2], dim=1):
        with torch.no_grad():
            outputs = model(piece, past_key_values=cache, use_cache=True, tau=[0.3, 0.7])
        cache = outputs.past_key_values
        pieces.append(outputs.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), logits(model, ids, tau=[0.3, 0.7]), rtol=0, atol=1e-5)


def test_left_padding_does_not_move_the_dense_positions(prunepath_checkpoint):
    model = load(prunepath_checkpoint("gpt2", dense_positions=2), "gpt2")
    ids = tokens(1, 6)
    padded = torch.cat([torch.ones(1, 3, dtype=torch.long), ids], dim=1)
    mask = padded.ne(1).long()
    shifted = logits(model, padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), tau=0.3)
    torch.testing.assert_close(shifted[:, 3:], logits(model, ids, tau=0.3), rtol=0, atol=1e-5)


def test_right_padding_leaves_a_classification_as_it_is(prunepath_checkpoint):
    model = load(prunepath_checkpoint("roberta", dense_positions=2), "roberta")
    ids = tokens(1, 6)
    padded = torch.cat([ids, torch.ones(1, 3, dtype=torch.long)], dim=1)
    alone = logits(model, ids, tau=0.3)
    torch.testing.assert_close(
        logits(model, padded, attention_mask=padded.ne(1).long(), tau=0.3), alone, rtol=0, atol=1e-5
    )
    embeds = model.roberta.embeddings.word_embeddings(ids)
    torch.testing.assert_close(logits(model, None, inputs_embeds=embeds, tau=0.3), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "how", [dict(num_beams=3), dict(num_beams=2, num_return_sequences=2), dict(do_sample=True, num_return_sequences=3)]
)
def test_beams_and_samples_share_their_prompts_tau(prunepath_checkpoint, how):
    model = load(prunepath_checkpoint("qwen2"), "qwen2")
    model.generation_config.eos_token_id = None
    seen = []
    model.model.layers[0].mlp.router.register_forward_pre_hook(lambda _, args: seen.append(args[1][:, -1]))
    ids = tokens(2, 5)
    torch.manual_seed(0)
    model.generate(ids, tau=[0.3, 0.9], max_new_tokens=3, **how)
    copies = max(how.get("num_beams", 1), how.get("num_return_sequences", 1))
    for taus in seen:
        torch.testing.assert_close(taus, torch.tensor([0.3, 0.9]).repeat_interleave(copies))


def test_beam_search_equals_lone_runs(prunepath_checkpoint):
    model = load(prunepath_checkpoint("llama", gate="sigmoid"), "llama")
    model.generation_config.eos_token_id = None
    ids = tokens(2, 5)
    together = model.generate(ids, tau=[0.3, 0.9], max_new_tokens=6, num_beams=3)
    for row, tau in enumerate([0.3, 0.9]):
        assert (
            together[row].tolist()
            == model.generate(ids[row : row + 1], tau=tau, max_new_tokens=6, num_beams=3)[0].tolist()
        )


@pytest.mark.parametrize("draft", ["dense", "prunepath"])
@pytest.mark.parametrize("tau", [0.4, [0.4]], ids=str)
def test_a_draft_runs_at_its_default_and_the_model_at_its_tau(prunepath_checkpoint, draft, tau):
    model = load(prunepath_checkpoint("llama"), "llama")
    assistant = (
        build_dense("llama") if draft == "dense" else load(prunepath_checkpoint("llama", default_tau=0.6), "llama")
    )
    seen: list = []
    if draft == "prunepath":
        assistant.base_model.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["tau"]), with_kwargs=True
        )
    ids = tokens(1, 12)
    alone = model.generate(ids, tau=tau, max_new_tokens=12, do_sample=False)
    assert torch.equal(
        model.generate(ids, tau=tau, max_new_tokens=12, do_sample=False, assistant_model=assistant), alone
    )
    assert not torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), alone)
    assert set(seen) <= {None}


def test_a_classification_pipeline_takes_tau(prunepath_checkpoint):
    path = prunepath_checkpoint("roberta")
    model, naive = load(path, "roberta"), load_naive(path)
    text = "the quick brown fox"
    ids = build_tokenizer()(text)["input_ids"]

    def right(tau):
        return naive_logits(naive, ids, tau).softmax(-1).tolist()

    def scores(classify, texts, **options):
        answers = classify(texts, **options)
        return [[row["score"] for row in sorted(answer, key=lambda row: row["label"])] for answer in answers]

    built = pipeline("text-classification", model=str(path), top_k=None, tau=0.4)
    with torch.no_grad():
        assert scores(built, [text] * 3, batch_size=2) == [pytest.approx(right(0.4), abs=1e-4)] * 3
        assert scores(built, [text], tau=0.6) == [pytest.approx(right(0.6), abs=1e-4)]
        plain = TextClassificationPipeline(model=model, tokenizer=build_tokenizer(), top_k=None)
        assert scores(plain, [text]) == [pytest.approx(right(1.0), abs=1e-4)]
        assert scores(plain, [text], tau=np.float64(0.4)) == [pytest.approx(right(0.4), abs=1e-4)]
    assert abs(right(0.4)[0] - right(1.0)[0]) > 1e-3
    with pytest.raises(TauError, match="got 7"):
        plain(text, tau=7)
    with pytest.raises(TauError, match=r"got '0\.5'"):
        pipeline("text-classification", model=str(path), tau="0.5")


def test_other_pipelines_take_tau_or_refuse_it(prunepath_checkpoint):
    model = load(prunepath_checkpoint("llama"), "llama")
    text = pipeline("text-generation", model=model, tokenizer=build_tokenizer(), do_sample=False, return_tensors=True)
    ids = build_tokenizer()("a b c", return_tensors="pt")["input_ids"]
    for tau in (0.4, 1.0):
        want = model.generate(ids, tau=tau, max_new_tokens=6, do_sample=False)[0].tolist()
        assert text("a b c", tau=tau, max_new_tokens=6)[0]["generated_token_ids"] == want
    classifier = load(prunepath_checkpoint("roberta"), "roberta")
    for name in ("zero-shot-classification", "feature-extraction"):
        with pytest.raises(
            UnsupportedFeatureError, match=r"Pipeline does not take tau, got 0\.4; expected it left out"
        ):
            pipeline(name, model=classifier, tokenizer=build_tokenizer(), tau=0.4)
        assert pipeline(name, model=classifier, tokenizer=build_tokenizer()) is not None


def test_pipelines_of_other_models_stay_as_they_are():
    dense = pipeline("text-classification", model=build_dense("roberta"), tokenizer=build_tokenizer(), top_k=None)
    assert dense("a") == dense("a", tau=0.4)  # the tokenizer drops it, as it always did


def test_two_models_and_two_threads_do_not_mix_taus(prunepath_checkpoint):
    models = [load(prunepath_checkpoint(family), family) for family in ("llama", "gpt2")]
    ids = tokens(1, 12)
    jobs = [(model, tau) for model in models for tau in (0.2, 0.9)]
    expected = [logits(model, ids, tau=tau) for model, tau in jobs]
    wrong = []

    def work(index):
        model, tau = jobs[index]
        for _ in range(20):
            if not torch.allclose(logits(model, ids, tau=tau), expected[index], atol=1e-6):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_routing_statistics(prunepath_checkpoint):
    model = load(prunepath_checkpoint("gpt2"), "gpt2")
    ids = tokens(2, 7)
    with torch.no_grad():
        plain = model(ids, tau=0.6)
        outputs = model(ids, tau=[0.6, 1.0], output_router_logits=True, output_hidden_states=True)
    assert plain.router_logits is None
    assert plain.ffn_sparsity is None
    assert [tuple(layer.shape) for layer in outputs.router_logits] == [(2, 7, 8)] * LAYERS
    assert {layer.dtype for layer in outputs.router_logits} == {torch.float32}
    assert {layer.dtype for layer in outputs.active_experts} == {torch.bool}
    assert outputs.ffn_sparsity.shape == (LAYERS, 2, 7)
    assert outputs.ffn_sparsity[:, 0].mean() > 0.3
    assert outputs.ffn_sparsity[:, 1].max() == 0
    assert len(outputs.hidden_states) == LAYERS + 1
    router, ln = model.transformer.h[0].mlp.router, model.transformer.h[0].ln_2
    block = model.transformer.h[0]
    attended, _ = block.attn(block.ln_1(outputs.hidden_states[0]))
    expected = ln(outputs.hidden_states[0] + attended) @ router.weight.t()
    torch.testing.assert_close(outputs.router_logits[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_tuple_on_request(prunepath_checkpoint, family):
    model = load(prunepath_checkpoint(family), family)
    ids = tokens(1, 4)
    expected = logits(model, ids)
    with torch.no_grad():
        assert torch.equal(model(ids, return_dict=False)[0], expected)
        model.config.return_dict = False
        assert torch.equal(model(ids)[0], expected)


def test_compiled_equals_eager(prunepath_checkpoint):
    model = load(prunepath_checkpoint("llama", gate="sigmoid"), "llama")
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    ids = tokens(2, 8)
    for tau in (0.4, 0.8, None):
        eager = logits(model, ids, tau=tau, output_router_logits=True)  # in PyTorch, as what is compiled
        torch.testing.assert_close(logits(compiled, ids, tau=tau), eager, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_half_precision_runs_and_routes_in_float32(prunepath_checkpoint, family):
    model = load(prunepath_checkpoint(family, gate="sigmoid", dtype=torch.bfloat16), family)
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        outputs = model(tokens(2, 8), tau=[0.5, 1.0], output_router_logits=True)
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.router_logits[0].dtype == torch.float32
    assert outputs.logits.isfinite().all()
