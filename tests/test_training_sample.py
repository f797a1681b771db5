"""Text of a model's own: against transformers' generate, and against the model's distribution."""

import numpy as np
import pytest
import torch
from tiny_models import build_dense

from prunepath_vllm.entrypoints import cli
from prunepath_vllm.errors import UsageError
from prunepath_vllm.training import sample as sampling
from prunepath_vllm.training.data import load_training_data
from prunepath_vllm.training.recipe import Data, Source


@pytest.fixture(autouse=True)
def narrow_windows(monkeypatch):
    """Several windows in a short sequence."""
    monkeypatch.setattr(sampling, "WINDOW", 8)


def greedy_by_transformers(model, prompts, length):
    return model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_length=length,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("length", [24, 29])
def test_at_temperature_0_it_is_greedy_decoding(family, length):
    check_greedy(build_dense(family).eval(), length)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_cuda_graphs_decode_the_same(family):
    check_greedy(build_dense(family).eval().cuda(), 29)


def check_greedy(model, length):
    prompts = torch.randint(0, model.config.vocab_size, (5, 6), generator=torch.Generator().manual_seed(1))
    wanted = greedy_by_transformers(model, prompts.to(model.device), length)
    decoder = sampling.Decoder(model, len(prompts), length, temperature=1e-6)
    assert torch.equal(decoder.continue_(prompts), wanted)
    assert torch.equal(decoder.continue_(prompts.flip(0)), wanted.flip(0)), "the last batch left something"


def test_draws_follow_the_models_distribution():
    """8,192 draws after one prompt: each token's count within five standard deviations of its probability."""
    model = build_dense("llama").eval()
    prompt = torch.arange(3, 7)
    with torch.no_grad():
        p = (model(prompt[None]).logits[0, -1] / 0.7).softmax(dim=-1)
    draws = 8192
    decoder = sampling.Decoder(model, draws, 5, temperature=0.7)
    torch.manual_seed(0)
    drawn = decoder.continue_(prompt.expand(draws, -1))[:, 4].bincount(minlength=len(p))
    deviation = (p * (1 - p) * draws).sqrt()
    assert ((drawn - p * draws).abs() <= 5 * deviation + 1).all()
    assert len(drawn.nonzero()) > 10


def test_pieces_of_the_text_are_continued():
    text = np.arange(100) % 60
    made = sampling.sample(
        build_dense("llama").eval(), text, tokens=100, length=20, prompt_length=5, batch=3, temperature=1.0
    )
    assert made.shape == (6, 20)
    pieces = {tuple(text[start : start + 5]) for start in range(96)}
    assert all(tuple(row[:5]) in pieces for row in made)
    assert len({tuple(row) for row in made}) == 6
    again = sampling.sample(
        build_dense("llama").eval(), text, tokens=100, length=20, prompt_length=5, batch=3, temperature=1.0
    )
    assert np.array_equal(made, again)


def test_the_clock_ends_it_after_a_batch():
    made = sampling.sample(
        build_dense("llama").eval(),
        np.arange(50),
        tokens=10**6,
        length=10,
        prompt_length=5,
        batch=2,
        max_minutes=1e-9,
    )
    assert made.shape == (2, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(prompt_length=20), "prompt length 20, length 20: expected 0 < prompt length < length <= "),
        (dict(prompt_length=0), "prompt length 0, length 20"),
        (dict(length=10**6), "length 1000000: expected"),
        (dict(prompt_length=15), "prompts: 10 tokens; expected at least 15"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(options, message):
    options = dict(tokens=1, length=20, prompt_length=5, batch=1) | options
    with pytest.raises(UsageError, match=message):
        sampling.sample(build_dense("llama").eval(), np.arange(10), **options)


def test_the_command_writes_a_source(dense_checkpoint, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    output = tmp_path / "own.npy"
    command = ["sample", str(dense_checkpoint("llama")), str(output), "--prompts", str(text), "--tokens", "60"]
    sizes = ["--length", "16", "--prompt-length", "4", "--batch", "2"]
    assert cli.main([*command, *sizes]) == 0
    assert "64 tokens in 4 sequences of 16" in capsys.readouterr().out
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(dense_checkpoint("llama"))
    data = load_training_data(
        Data(train=[Source(path=str(output))], sequence_length=16), tokenizer, pad_to_length=False
    )
    assert len(data) == 4
    assert cli.main([*command, *sizes, "--temperature", "0"]) == 2
    assert "--temperature 0.0: expected a positive number" in capsys.readouterr().err
    command[2] = str(tmp_path / "own.txt")
    assert cli.main([*command, *sizes]) == 2
    assert "expected a name ending in .npy" in capsys.readouterr().err
    command[1:3] = [str(tmp_path / "none"), str(output)]
    assert cli.main([*command, *sizes]) == 2
    assert "expected a dense causal model" in capsys.readouterr().err
