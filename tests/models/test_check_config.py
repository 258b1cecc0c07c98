"""Folders of models from strangers: nothing runs, is fetched, or allocated beyond measure; an error is one line."""

import json
import pickle

import pytest
import timm
from safetensors.torch import load_file, save_file

import msvit
from msvit.models import hub
from msvit.models.check_config import ModelFolderError
from msvit.training.build import build
from msvit.training.evaluate_run import evaluate_run
from msvit.training.recipe import Recipe, RecipeError

MINI = "vit_mini_patch8_64"


@pytest.fixture
def folder(tmp_path):
    msvit.MSViT(timm.create_model(MINI)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder, *path, to):
    """Change an entry of the config, deep inside."""
    config = json.loads((folder / "config.json").read_text())
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    (folder / "config.json").write_text(json.dumps(config))


ARGS = ("backbone", "args")


@pytest.mark.parametrize(
    ("path", "to", "words"),
    [
        ((*ARGS, "checkpoint_path"), "evil.pth", "has no setting 'checkpoint_path'"),
        ((*ARGS, "pretrained"), True, "has no setting 'pretrained'"),
        ((*ARGS, "pretrained_cfg"), {"file": "evil.pth"}, "has no setting 'pretrained_cfg'"),
        ((*ARGS, "pretrained_cfg_overlay"), {"file": "evil.pth"}, "has no setting 'file'"),
        ((*ARGS, "cache_dir"), "/", "has no setting 'cache_dir'"),
        ((*ARGS, "block_fn"), {"layer": "torch.nn.Linear"}, "has no setting 'block_fn'"),
        (("backbone", "name"), "hf-hub:someone/model", "names the backbone 'hf-hub:someone/model'"),
        (("backbone", "name"), "local-dir:/tmp", "names the backbone 'local-dir:/tmp'"),
        (("backbone", "name"), 3, "names the backbone 3"),
        ((*ARGS, "depth"), 10**6, "depth=1000000 lies outside"),
        ((*ARGS, "embed_dim"), 10**6, "describes a model of"),
        ((*ARGS, "num_classes"), 10**6, "describes a model of"),
        ((*ARGS, "img_size"), 10**9, "a number in config.json=1000000000 lies outside"),
        ((*ARGS, "mlp_ratio"), float("inf"), "lies outside"),
        (("gate", "width"), 10**6, "describes a model of"),
        (("gate",), {"name": "quota", "width": -1}, "holds no model"),
        (("gate",), [], "holds no model"),
        (("scales",), [1, 10**6], "scale=1000000 lies outside"),
        (("margin",), "x", "holds no model"),
        (("backbone",), None, "has no backbone"),
        (("head",), {"classes": 10**9}, "lies outside"),
        (("head",), {"classes": ["a"] * 200_000}, "a list of 200,000 entries"),
        (("reducer",), {"name": "tome", "layers": "all"}, "holds no model"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_configs_that_claim_too_much_or_nonsense(folder, monkeypatch, path, to, words):
    monkeypatch.setattr(hub.safetensors.torch, "load_file", lambda *a, **k: pytest.fail("loaded its weights"))
    change(folder, *path, to=to)
    with pytest.raises(ModelFolderError, match=words) as caught:
        msvit.MSViT.from_pretrained(folder)
    assert len(str(caught.value).splitlines()) == 1


def test_nothing_is_unpickled(folder, tmp_path, monkeypatch):
    """With timm before 1.0.25, `checkpoint_path` did."""

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "pwned"), "w")

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: pytest.fail("built"))
    change(folder, *ARGS, "checkpoint_path", to=str(tmp_path / "evil.pth"))
    with pytest.raises(ModelFolderError):
        msvit.MSViT.from_pretrained(folder)
    assert not (tmp_path / "pwned").exists()


DAMAGES = {
    "no json": lambda f: (f / "config.json").write_text("{"),
    "no object": lambda f: (f / "config.json").write_text("[]"),
    "deep": lambda f: (f / "config.json").write_text("[" * 100_000),
    "bytes": lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
    "empty object": lambda f: (f / "config.json").write_text("{}"),
    "a timm config": lambda f: (f / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}'),
    "torn weights": lambda f: (f / "model.safetensors").write_bytes(b"torn"),
    "half": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
    "a pickle": lambda f: (f / "model.safetensors").write_bytes(pickle.dumps({"a": 1})),
    "fewer": lambda f: save_file(dict(list(load_file(f / "model.safetensors").items())[1:]), f / "model.safetensors"),
    "none": lambda f: save_file({}, f / "model.safetensors"),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "no config": lambda f: (f / "config.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_and_foreign_folders_get_one_line(folder, damage):
    DAMAGES[damage](folder)
    with pytest.raises((ModelFolderError, FileNotFoundError), match=str(folder)) as caught:
        msvit.MSViT.from_pretrained(folder)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(RecipeError, match="gives no model") as caught:
        build(Recipe(model=str(folder)), folder.parent)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["a/b", "no/such/folder", "runs/typo", "x" * 300, "../a", ""])
def test_a_path_that_is_not_there_is_said_and_the_hub_is_not_asked(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    for place in ("msvit.models.hub.hf_hub_download", "huggingface_hub.hub_mixin.hf_hub_download"):
        monkeypatch.setattr(place, lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match="there is no folder|has no config"):
        msvit.MSViT.from_pretrained(name)
    with pytest.raises(RecipeError, match="is no model of timm, no folder|gives no model"):
        build(Recipe(model=name), tmp_path)


def test_the_hub_is_asked_by_its_prefix(folder, monkeypatch):
    asked = []

    def download(name, file, **options):
        asked.append((name, file, options))
        return str(folder / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    msvit.MSViT.from_pretrained("hub:someone/model", revision="main")
    files = ("config.json", "model.safetensors")
    assert asked == [("someone/model", file, {"revision": "main"}) for file in files]
    monkeypatch.undo()
    with pytest.raises(ModelFolderError, match="hub:not/a/name cannot be had from the hub"):
        msvit.MSViT.from_pretrained("hub:not/a/name")


def test_an_evaluation_says_it_too(folder):
    (folder / "settings.json").write_text(json.dumps(Recipe().to_dict()))
    (folder / "summary.json").write_text("{}")
    change(folder, "scales", to="x")
    with pytest.raises(RuntimeError, match="holds no model that can be built"):
        evaluate_run(folder)
