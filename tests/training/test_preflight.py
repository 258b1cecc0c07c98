"""What can be known before the first step is known then: nothing is trained, and no folder is occupied."""

import json

import numpy as np
import pytest
import torch
from helpers import write_folder
from PIL import Image

from msvit import cli
from msvit.checks import DataError
from msvit.data.scenes import Scenes
from msvit.studies import study
from msvit.training.loop import Trainer, train
from msvit.training.preflight import prepare, prepare_all
from msvit.training.recipe import Recipe, RecipeError

SMALL = Recipe(train_n=32, val_n=16, batch=8, epochs_dense=1, epochs=1, device="cpu")


@pytest.fixture(autouse=True)
def _no_step(monkeypatch):
    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("trained"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch": 1}, "this cannot be trained"),
        ({"size": 16}, "cannot be (trained|met)"),
        ({"optimizer": "adamww"}, "optimizer='adamww' is not known; the nearest is 'adam"),
        ({"optimizer": "lbfgs"}, "optimizer='lbfgs' is not known|this cannot be trained"),
        ({"schedule": "wsd", "train_n": 8}, "this cannot be trained"),
        ({"mixup": 0.5, "batch": 7}, "take pairs of pictures, and 7 are in a batch; make it even"),
        ({"model": "tiny", "pretrained": True}, "model='tiny' has no published weights"),
        ({"gate": "hub:a/b", "gating": "random"}, "is a trained gate, and gating='random' has none"),
        (
            {"control": "bias", "gating": "random"},
            "control='bias' holds a learned gate .* gating='random' keeps to its own",
        ),
        ({"reducer_settings": {"keep": 0.5}}, "are of no reducer"),
        ({"lr": 0.0}, "lr=0 leaves the dense stage nothing to train"),
        ({"holdout": 0.99}, "leaves none to train on"),
        ({"model": "x" * 300}, "is no model of timm, no folder"),
        ({"model": "hf-hub:"}, "cannot be built"),
        ({"model": "swin_tiny_patch4_window7_224", "size": 224}, "VisionTransformer"),
        ({"model": "levit_128s"}, "model='levit_128s': LevitDistilled is no plain vision transformer"),
        ({"scales": [1]}, "the first is 1, for fine patches"),
        ({"scales": [1, 2, 3]}, "each of the others twice the one before"),
        ({"scales": [1, 2, 4], "scale": 3}, r"scale=3 and scales=\[1, 2, 4\] contradict each other"),
        ({"scales": [1, 2, 4], "targets": [0.5]}, "give 2, one for each size of regions"),
        ({"gating": "entropy", "rule_settings": {"mean": [1]}}, "give one number for each"),
        ({"gating": "entropy", "rule_settings": {"name": "psnr"}}, "name"),
        ({"data": "hfds/nobody/nothing"}, "data='hfds/nobody/nothing'"),
        ({"data": "torch/cifar10"}, "does not say where the pictures are; write torch/cifar10:/path"),
        ({"data": f"folder:{'x' * 300}"}, "there is no folder"),
        ({"checkpoint": "x" * 300}, "there is no such file"),
        ({"gate": "x" * 300}, "is no model of timm, no folder"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_trained(tmp_path, settings, words):
    with pytest.raises(RecipeError, match=words) as caught:
        train(SMALL.replace(**settings), tmp_path / "run", progress=False)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss_settings": {"sigma": float("nan")}}, "numbers that are finite"),
        ({"loss_settings": {"sigma": float("inf")}}, "numbers that are finite"),
        ({"reducer_settings": {"layers": [1.0, float("nan")]}}, "numbers that are finite"),
        ({"epochs": 10**15}, r"epochs=1000000000000000: expected a whole number in \[0, 1000000\]"),
        ({"lr": 1e300}, r"lr=1e\+300: expected a number in \[0, 1e6\]"),
        ({"scale": 10**9}, r"scale=1000000000: expected a whole number in \[2, 64\]"),
        ({"size": 10**9}, "size=1000000000: expected a whole number in"),
        ({"train_n": 10**18}, "train_n=1000000000000000000: expected"),
        ({"seed": 2**70}, "seed=1180591620717411303424: expected"),
        ({"workers": 10**9}, "workers=1000000000: expected"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_no_recipe_can_have(settings, words):
    with pytest.raises(RecipeError, match=words):
        Recipe(**settings)


def test_an_oracle_needs_scenes(tmp_path):
    root = write_folder(tmp_path / "pictures")
    recipe = SMALL.replace(data=f"folder:{root}", size=32, batch=4, train_n=0, val_n=0, target=0.7)
    with pytest.raises(RecipeError, match="gating='oracle' knows where the objects are in scenes alone"):
        prepare(recipe.replace(gating="oracle"), tmp_path)
    prepare(recipe, tmp_path)


def test_weights_that_are_none(tmp_path):
    for name, data in (("text", b"these are no weights"), ("empty", b""), ("json", b"{}"), ("zip", b"PK\x03\x04")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(RecipeError, match="is neither safetensors nor a file of weights alone"):
            prepare(SMALL.replace(checkpoint=str(tmp_path / name)), tmp_path)
    for name, value in (("list.pth", [1, 2]), ("number.pth", 3), ("texts.pth", {"a": "b"})):
        torch.save(value, tmp_path / name)
        with pytest.raises(RecipeError, match="is refused|is of another model"):
            prepare(SMALL.replace(checkpoint=str(tmp_path / name)), tmp_path)
    with pytest.raises(RecipeError, match="there is no such file"):
        prepare(SMALL.replace(checkpoint=str(tmp_path)), tmp_path)


def test_the_rehearsal_changes_nothing(tmp_path):
    first = prepare(SMALL.replace(mixup=0.5, distill=1.0), tmp_path)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    again = prepare(SMALL.replace(mixup=0.5, distill=1.0), tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == numpy_state  # noqa: NPY002
    ours, theirs = first.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(p.requires_grad and p.grad is None for p in again.model.parameters())


def test_the_rehearsal_of_a_new_gate_does_not_warn_of_it(tmp_path, recwarn):
    """One that is taught and then held is as it was made until then; afterwards it would still warn."""
    parts = prepare(SMALL.replace(epochs_dense=0, gate_start="detail", gate_lr=0.0), tmp_path)
    assert not [w for w in recwarn if "learned nothing" in str(w.message)]
    with pytest.warns(UserWarning, match="learned nothing"):
        parts.model.eval()(torch.zeros(1, 3, 64, 64))


def test_a_plan_is_looked_at_to_its_end_before_anything_trains(tmp_path):
    dense = SMALL.replace(epochs=0)
    gated = SMALL.replace(epochs_dense=0, model=f"run:{dense.run_name}")
    carried = gated.replace(gate=f"run:{gated.run_name}", gate_lr=0.0)
    prepare_all([dense, gated, carried, gated.replace(model=f"run:{gated.run_name}/dense")], tmp_path)
    with pytest.raises(RecipeError, match="the nearest is 'sigma'"):
        prepare_all([dense, gated, carried.replace(gate_lr=1e-3, loss_settings={"sigm": 1})], tmp_path)
    with pytest.raises(RecipeError, match="no model of timm"):
        study.transfer(SMALL, {"model": "vit_smal_patch8_64"}, [0], tmp_path / "runs")
    assert not list(tmp_path.rglob("settings.json"))


def test_broken_pictures_and_labels_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.undo()
    root = write_folder(tmp_path / "pictures")
    for path in (root / "train").rglob("*.png"):
        path.write_bytes(b"")
    sizes = ["--size=32", "--batch=4", "--epochs-dense=1", "--epochs=0", "--device=cpu", "--quiet"]
    assert cli.main(["train", f"--data=folder:{root}", *sizes, f"--runs={tmp_path / 'runs'}"]) in (1, 2)
    said = capsys.readouterr().err
    assert "files in a row cannot be read" in said
    assert len(said.splitlines()) == 1


MAPS = {
    "values": (lambda: np.full((32, 32), 9, np.uint8), r"holds the values \[9\]; known are 0..1 and 255"),
    "colours": (lambda: np.zeros((32, 32, 3), np.uint8), "one number for each pixel"),
    "size": (lambda: np.zeros((32, 16), np.uint8), "has shape"),
    "small": (None, "is larger than .* use a smaller size"),
    "ignored": (lambda: np.full((32, 32), 255, np.uint8), r"whose label maps hold 255 \(ignored\) alone"),
}


@pytest.mark.parametrize("damage", MAPS)
def test_label_maps_that_cannot_be_are_one_line(tmp_path, capsys, monkeypatch, damage):
    monkeypatch.undo()
    make, words = MAPS[damage]
    root = label_folder(tmp_path / "data")
    for name in "abcd":
        if make:
            Image.fromarray(make()).save(root / f"train/labels/{name}.png")
    size = 64 if damage == "small" else 32
    sizes = [f"--size={size}", "--batch=2", "--epochs-dense=1", "--epochs=0", "--device=cpu", "--quiet"]
    code = cli.main(["train", "--task=segment", f"--data=folder:{root}", *sizes, f"--folder={tmp_path / 'run'}"])
    said = capsys.readouterr().err
    assert code in (1, 2)
    assert len(said.splitlines()) == 1, said
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(said)


def label_folder(root):
    for split in ("train", "val"):
        for part, mode in (("images", "RGB"), ("labels", "L")):
            (root / split / part).mkdir(parents=True)
            for name in "abcd":
                Image.new(mode, (32, 32), 0).save(root / split / part / f"{name}.png")
    (root / "classes.json").write_text(json.dumps({"names": ["ground", "thing"]}))
    return root


def test_a_workers_error_is_its_last_line():
    text = "Caught DataError in DataLoader worker process 0.\nTraceback:\n  …\nmsvit.checks.DataError: a.png is odd"
    assert str(DataError(text)) == "a.png is odd"
    assert str(DataError("a.png is odd")) == "a.png is odd"


def test_scenes_are_known_to_the_oracle():
    assert Scenes(1).object_regions(np.array([0]), 16).any()
