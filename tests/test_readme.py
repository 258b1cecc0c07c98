"""What the README promises: its Python is executed as it stands there, its commands are read by what they call."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from helpers import cells_of, write_folder

import msvit
from msvit import cli
from msvit.studies.params import guard

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TYPED = re.findall(r"^    ((?:msvit|make|papermill) .*)$", README.replace("\\\n", ""), re.MULTILINE)
OWN = next(block for block in BLOCKS if "folder:photos" in block)


@pytest.mark.parametrize("code", [block for block in BLOCKS if block != OWN], ids=lambda code: code.split("\n")[0][:40])
@pytest.mark.filterwarnings("ignore:you are using forward_intermediates")
def test_python_runs_as_it_stands(code, monkeypatch, tmp_path):
    """On a small backbone in the place of published ones."""
    monkeypatch.chdir(tmp_path)
    vit = timm.create_model("vit_mini_patch8_64", depth=12, dynamic_img_size=True).eval()
    published = SimpleNamespace(create_model=lambda name, pretrained: vit)
    images = torch.rand(2, 3, 64, 64)
    names = {"torch": torch, "timm": published, "msvit": msvit, "vit": vit, "images": images, "loader": [images]}
    names |= {"model": msvit.MSViT(vit).eval(), "mask": torch.ones(4, 4, dtype=torch.bool)}
    names |= {"small": torch.ones(4, 4, dtype=torch.bool), "large": torch.ones(2, 2, dtype=torch.bool)}
    names |= {"a": images[0], "b": images[1, :, :32], "c": images[0, :, :, :48]}
    exec(code, names)


def test_three_lines_are_three_and_the_new_gate_says_that_it_is_new():
    (code,) = (block for block in BLOCKS if "pretrained=True" in block)
    assert len(code.splitlines()) == 3
    vit = timm.create_model("vit_mini_patch8_64")
    published = SimpleNamespace(create_model=lambda name, pretrained: vit)
    with pytest.warns(UserWarning, match="has learned nothing"):
        exec(code, {"timm": published, "msvit": msvit, "images": torch.zeros(2, 3, 64, 64)})


@pytest.mark.long
def test_your_own_photographs_in_five_lines(tmp_path, monkeypatch):
    write_folder(tmp_path / "photos", train=4, val=2, classes=("cats", "dogs", "owls"))
    monkeypatch.chdir(tmp_path)
    lines, names = OWN.splitlines(), {}
    assert len(lines) == 5
    exec("\n".join([*lines[:4], f"explorer = {lines[4]}"]), names)
    (state,) = names["explorer"].states
    assert state.gated.loaded.classes == ("cats", "dogs", "owls")
    assert state.gated.picture.name.startswith(("cats/", "dogs/", "owls/"))


@pytest.mark.parametrize("line", TYPED)
def test_commands_are_ones_that_can_be_typed(line):
    program, *words = shlex.split(line, comments=True)
    if program == "msvit":
        _, unknown = cli._parser().parse_known_args(words)
        assert not unknown
    elif program == "make":
        assert words[0] in re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    else:
        names, pairs = {}, zip(words, words[1:], words[2:] + [""], strict=False)
        typed = [
            (two, three) if flag == "-p" else two.split(": ", 1) for flag, two, three in pairs if flag in ("-p", "-y")
        ]
        exec(next(source for source, is_parameters in cells_of(Path(words[0]).stem) if is_parameters), names)
        guard(names | dict(typed) | {"In": ["# Parameters\n" + "".join(f"{name} = 0\n" for name, _ in typed)]})
