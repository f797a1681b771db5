"""Which recipe a run may go on with: the same one, whatever the places in it are called."""

import pytest

from prunepath_vllm.errors import UsageError
from prunepath_vllm.training.checks import CONTINUED, check_same_run
from prunepath_vllm.training.recipe import Recipe, parse_recipe, save_recipe

PLACES = (
    "output", "model.path", "model.convert.text", "model.adapter", "model.dense", "data.train.0.path",
    "data.train.1.path", "distillation.teacher", "evaluation.data.path",
)  # fmt: skip


def placed(key: str, value: str) -> Recipe:
    """A recipe with every place in it, one of them `value`."""
    content = dict(
        output="out",
        model=dict(path="m", dense="m"),
        data=dict(train=[dict(path="t.txt"), dict(path="owner/set", split="train")]),
        schedule=dict(max_steps=10),
        distillation=dict(teacher="m"),
        evaluation=dict(data=dict(path="t.txt")),
    )
    if key == "model.adapter":
        content["model"]["adapter"] = "a"
    else:
        content["model"]["convert"] = dict(text="t.txt")
    *parents, last = key.split(".")
    node = content
    for name in parents:
        node = node[int(name) if name.isdigit() else name]
    node[last] = value
    return parse_recipe(content)


@pytest.mark.parametrize("key", PLACES)
def test_a_run_goes_on_whatever_its_places_are_called(key, tmp_path, monkeypatch):
    """As an absolute path, with ./, with a slash at the end, through a link, from the home directory."""
    desk, out = tmp_path / "home" / "desk", tmp_path / "out"
    (desk / "place").mkdir(parents=True)
    (desk / "link").symlink_to("place")
    out.mkdir()
    monkeypatch.chdir(desk)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    spellings = ("place", "./place", "place/", str(desk / "place"), "../desk/place", "link", "~/desk/place")
    for before in spellings:
        save_recipe(placed(key, before), out)
        for now in spellings:
            check_same_run(placed(key, now), out, keys=CONTINUED, what="it is of")
    if key in ("output", "model.dense", "evaluation.data.path"):  # may be another
        return
    save_recipe(placed(key, "link"), out)
    for other in ("other", "place/below", "placed", "~/place", "Place"):
        with pytest.raises(UsageError, match=rf"it is of {key} 'link', and the recipe says '"):
            check_same_run(placed(key, other), out, keys=CONTINUED, what="it is of")


def test_other_texts_of_a_recipe_are_no_places(tmp_path):
    for field, value in (("text", "{text}"), ("split", "train"), ("config", "a")):
        before, now = placed(f"data.train.0.{field}", value), placed(f"data.train.0.{field}", f"./{value}")
        save_recipe(before, tmp_path)
        with pytest.raises(UsageError, match=rf"data\.train\.0\.{field} "):
            check_same_run(now, tmp_path, keys=CONTINUED, what="it is of")


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for key in PLACES:
        value = placed(key, "~/x").model_dump()
        for name in key.split("."):
            value = value[int(name) if name.isdigit() else name]
        assert value == str(tmp_path / "x"), key
