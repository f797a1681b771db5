"""The figure and table of trainings against baselines, on made-up results whose answers are known by hand."""

import json

import pytest

from prunepath_vllm.benchmarks.training_curves import perplexity_at, read_curve, read_models, run
from prunepath_vllm.errors import UsageError


@pytest.fixture
def results(tmp_path):
    """``results(name, (tau, sparsity, perplexity), ...)``: a file as a training leaves it."""

    def write(name, *points):
        keys = ("tau", "ffn_sparsity", "perplexity")
        content = dict(data="valid.txt", points=[dict(zip(keys, point, strict=True)) for point in points])
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        return str(path)

    return write


def test_log_perplexity_is_linear_between_points(results):
    curve = read_curve(results("ours", (0.2, 0.8, 160), (1.0, 0.0, 10), (0.5, 0.4, 40)))
    assert curve == [(0.0, 10), (0.4, 40), (0.8, 160)]
    # sqrt(10 * 40), sqrt(40 * 160), and the points themselves
    for sparsity, expected in ((0.2, 20), (0.6, 80), (0.0, 10), (0.4, 40), (0.8, 160)):
        assert perplexity_at(curve, sparsity) == pytest.approx(expected)
    assert perplexity_at(curve, 0.81) is None
    assert perplexity_at([(0.5, 30)], 0.5) == 30
    assert perplexity_at([(0.0, 10), (0.0, 11), (0.5, 40)], 0.25) == pytest.approx(440**0.5)


def test_pruned_models_take_the_sparsity_that_is_given(results):
    half, most = results("half", (None, 0.0, 30)), results("most", (0.5, 0.9, 300), (1.0, 0.0, 12))
    assert read_models(f"{most},{half}@0.5") == [(0.5, 30), (0.9, 300)]
    for given in ("1", "-0.5", "half", "nan"):
        with pytest.raises(UsageError, match=f"sparsity {given}; expected a number"):
            read_models(f"{half}@{given}")


def test_table_and_figure(results, tmp_path, capsys):
    dense = results("dense", (None, 0.0, 10))
    ours = results("ours", (1.0, 0.0, 10), (0.5, 0.6, 40), (0.2, 0.8, 5120))
    wanda = results("wanda", (None, 0.0, 30))
    outputs = ["--table", str(tmp_path / "t.md"), "--plot", str(tmp_path / "p.png")]
    run(["--dense", f"tuned={dense}", "--curve", f"ours={ours}", "--models", f"Wanda={wanda}@0.5", *outputs])
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "t.md").read_text().strip()
    assert printed.splitlines()[0] == "Perplexity (ratio to tuned's 10) by FFN sparsity:"
    # ours: 10 * 4^(s / .6) up to .6; at .7 sqrt(40 * 5120) = 452.5
    assert printed.strip().splitlines()[2:] == [
        "| method | 0.3 | 0.5 | 0.6 | 0.7 | 0.8 | 0.9 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| ours | 20 (2) | 31.75 (3.17) | 40 (4) | 452.5 (45.3) | 5,120 (512) | - |",
        "| Wanda | - | 30 (3) | - | - | - | - |",
    ]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_read_is_named(results, tmp_path):
    sparse = results("sparse", (0.5, 0.4, 40))
    with pytest.raises(UsageError, match=r"FFN sparsity 0\.4; expected a dense model's"):
        run(["--dense", f"dense={sparse}"])
    with pytest.raises(UsageError, match="expected LABEL=FILE"):
        run(["--dense", sparse])
    with pytest.raises(UsageError, match="no such file"):
        read_curve(str(tmp_path / "absent.json"))
    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps(dict(points=[dict(tau=1.0, ffn_sparsity=0.0, perplexity=None, accuracy=0.9)])))
    with pytest.raises(UsageError, match="expected points with"):
        read_curve(str(classes))
