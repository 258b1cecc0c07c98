"""Runs that start alike from one dense model learn the same gate, and only the first of them is taught."""

import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file

from msvit.models.msvit import MSViT
from msvit.training import loop
from msvit.training.recipe import Recipe, RecipeError
from msvit.training.taught import teach_once

SMALL = Recipe(data="scenes:middle", train_n=128, val_n=64, batch=64, epochs_dense=1, epochs=0, gate_start="detail")


class Lesson:
    """Adds one to a gate's bias, and counts how often."""

    def __init__(self, model):
        self.model, self.times = model, 0

    def __call__(self):
        self.times += 1
        with torch.no_grad():
            self.model.gate.bias.add_(1)


@pytest.fixture
def make_model(make_vit):
    """A function that makes the same model every time."""

    def make():
        torch.manual_seed(0)
        return MSViT(make_vit())

    return make


@pytest.fixture
def taught(make_model, tmp_path):
    model = make_model()
    lesson = Lesson(model)
    teach_once(lesson, model, tmp_path / "taught", ("facts", 0))
    return model, lesson


def test_a_second_model_of_the_same_weights_takes_what_the_first_has_learned(taught, make_model, tmp_path):
    model, lesson = taught
    other = make_model()
    teach_once(lesson, other, tmp_path / "taught", ("facts", 0))
    assert lesson.times == 1
    ours, theirs = model.gate.state_dict(), other.gate.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("change", ["facts", "weights", "threads"])
def test_another_lesson_is_taught(taught, make_model, tmp_path, change, monkeypatch):
    _, other = taught[1], make_model()
    lesson = Lesson(other)
    if change == "weights":
        other.vit.head.bias.data.add_(1e-6)
    if change == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    teach_once(lesson, other, tmp_path / "taught", ("facts", int(change == "facts")))
    assert lesson.times == 1


def test_what_is_damaged_is_taught_again(taught, make_model, tmp_path):
    (path,) = (tmp_path / "taught").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:50])
    other = make_model()
    lesson = Lesson(other)
    teach_once(lesson, other, tmp_path / "taught", ("facts", 0))
    assert lesson.times == 1
    assert load_file(path)


def test_a_folder_that_cannot_be_made_keeps_nothing(make_model, tmp_path):
    (tmp_path / "file").write_text("")
    lesson = Lesson(make_model())
    teach_once(lesson, lesson.model, tmp_path / "file" / "taught", 0)
    assert lesson.times == 1


def test_one_that_is_being_taught_is_waited_for(make_model, tmp_path):
    begun, goes_on = threading.Event(), threading.Event()
    models = [make_model(), make_model()]

    def slowly():
        begun.set()
        assert goes_on.wait(60)
        Lesson(models[0])()

    second = Lesson(models[1])
    threads = [
        threading.Thread(target=teach_once, args=(lesson, model, tmp_path / "taught", 0))
        for lesson, model in zip((slowly, second), models, strict=True)
    ]
    threads[0].start()
    assert begun.wait(60)
    threads[1].start()
    threads[1].join(1)
    assert threads[1].is_alive()
    goes_on.set()
    for thread in threads:
        thread.join(60)
    assert second.times == 0
    assert torch.equal(models[0].gate.bias, models[1].gate.bias)


def test_runs_from_one_dense_model_share_their_lesson_and_are_as_if_alone(tmp_path, monkeypatch):
    """Bitwise: the run that was taught itself, and the one that read the other's gate."""
    calls, teach = [], loop.teach_gate
    monkeypatch.setattr(loop, "teach_gate", lambda *details: (calls.append(1), teach(*details)))
    loop.train(SMALL, tmp_path / "dense", progress=False)
    gated = SMALL.replace(model="run:dense", epochs_dense=0, epochs=1)
    loop.train(gated.replace(gating="random"), tmp_path / "rule", progress=False)
    assert not (tmp_path / "dense" / "taught").exists()
    alone = loop.train(gated, tmp_path / "alone", progress=False)
    fixed = loop.train(gated.replace(gate_lr=0.0), tmp_path / "fixed", progress=False)
    assert len(calls) == 1
    again = loop.train(gated, tmp_path / "again", progress=False)
    assert len(calls) == 1
    shutil.rmtree(tmp_path / "dense" / "taught")
    loop.train(gated, tmp_path / "taught again", progress=False)
    assert len(calls) == 2
    states = [load_file(tmp_path / name / "model.safetensors") for name in ("alone", "again", "taught again")]
    assert all(torch.equal(states[0][key], state[key]) for state in states[1:] for key in state)
    (kept,) = (tmp_path / "dense" / "taught").glob("*.safetensors")
    gate = load_file(kept)
    held = load_file(tmp_path / "fixed" / "model.safetensors")
    assert all(torch.equal(gate[key], held[f"gate.{key}"]) for key in gate)
    assert not all(torch.equal(gate[key], states[0][f"gate.{key}"]) for key in gate), "joint training goes on with it"
    assert alone.recipe.method == again.recipe.method == "gbas"
    assert fixed.recipe.method == "fixed"


def test_a_controller_beside_a_gate_that_is_held_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="gate_lr=0 holds it; leave one out"):
        loop.train(SMALL.replace(epochs=1, gate_lr=0.0, control="bias"), tmp_path / "run", progress=False)
