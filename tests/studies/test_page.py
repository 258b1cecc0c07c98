"""The report's page: what it says of the runs, in words, points and settings."""

import base64
import json
import re

import numpy as np
import pytest
from helpers import mini_model, plotted
from plotly.offline import get_plotlyjs

from msvit.studies import page, report, study
from msvit.training.files import RunWarning
from msvit.training.recipe import Recipe


def write(folder, accuracy, macs, **settings):
    """A finished run with two epochs, without the training."""
    recipe = Recipe(**settings)
    path = folder / recipe.run_name
    path.mkdir(parents=True)
    (path / "settings.json").write_text(json.dumps(recipe.to_dict()))
    lines = [{"epoch": k, "stage": "gated", "val_accuracy": accuracy - 0.2 + k / 10} for k in (1, 2)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "summary.json").write_text(json.dumps({"accuracy": accuracy, "macs": macs, "tokens": 30.0}))


@pytest.fixture
def folder(tmp_path):
    for seed in (0, 1):
        write(tmp_path, 0.95, 1.0, epochs=0, seed=seed)
        write(tmp_path, 0.93 + seed / 100, 0.58, seed=seed)
        write(tmp_path, 0.80, 0.58, seed=seed, gating="random")
    return tmp_path


def values(packed):
    """The numbers of an array as plotly packs it."""
    return np.frombuffer(base64.b64decode(packed["bdata"]), packed["dtype"])


def test_the_verdict_is_of_the_best_that_saves(folder):
    (group,) = report.groups(study.finished(folder)).values()
    assert page.verdict(group) == (
        "MSViT GBaS at 0.58 has 93.5 % of the pictures right at 58 % of the MACs, the dense model 95.0 %: "
        "-1.5 points, over 2 seeds."
    )
    assert page.verdict(group[group["method"] != "dense"]) == ""
    segmented = group.assign(miou=group["accuracy"] - 0.2)
    assert "a mean IoU of 73.5 %" in page.verdict(segmented)


def test_the_page_holds_all_and_points_nowhere(folder, tmp_path):
    text = report.report(folder, tmp_path / "out").read_text()
    assert text.count(get_plotlyjs()) == 1
    text = text.replace(get_plotlyjs(), "")
    assert not re.findall("http|href|src=.(?!data:)", text)
    points, curves = plotted(text)
    runs = [trace for trace in points if "customdata" in trace]
    assert {trace["legendgroup"] for trace in runs} == {"dense", "MSViT gbas at 0.58", "random mask at 0.58"}
    assert sorted(y for trace in runs for y in values(trace["y"])) == pytest.approx([80, 80, 93, 94, 95, 95])
    assert [len(trace["y"]) for trace in curves] == [2] * 6
    assert sum(trace["showlegend"] for trace in curves) == 3
    assert text.count("role='img'") == text.count("aria-label=") == 2
    names = {name for trace in runs for name, seed in trace["customdata"]}
    assert any(name.startswith("MSViT gbas · 58 % · seed 1 · ") for name in names)
    assert 'class="dataframe sortable"' in text
    differ = text.partition("settings that differ")[2].partition("</details>")[0]
    heads, row = (
        re.findall(r"<th>(\w*)</th>", differ),
        differ.partition("<th>random at 0.58</th>")[2].partition("</tr>")[0],
    )
    assert dict(zip(heads[1:], re.findall("<td>(.*)</td>", row), strict=False))["gating"] == "random"


def test_gate_maps_travel_in_the_page(tmp_path):
    write(tmp_path / "runs", 0.9, 0.58, val_n=16)
    (path,) = (tmp_path / "runs").iterdir()
    mini_model().save_pretrained(path)
    text = report.report(tmp_path / "runs", tmp_path / "out").read_text().replace(get_plotlyjs(), "")
    ((alt, data),) = re.findall(r"<img alt='([^']*)' src='data:image/png;base64,([^']*)'>", text)
    assert alt.startswith("Gate maps, scenes:easy, 64 px")
    (file,) = (tmp_path / "out/figures").glob("gate_maps-*.png")
    assert base64.b64decode(data) == file.read_bytes()
    (path / "model.safetensors").unlink()
    with pytest.warns(RunWarning, match="no gate maps of"):
        text = report.report(tmp_path / "runs", tmp_path / "out").read_text().replace(get_plotlyjs(), "")
    assert "<img" not in text


def test_one_point_has_an_axis_too(tmp_path):
    write(tmp_path, 0.9, 0.58)
    text = report.report(tmp_path, tmp_path / "out").read_text().replace(get_plotlyjs(), "")
    assert "NaN" not in text.replace("isNaN", "")
