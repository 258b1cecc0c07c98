"""The rows of the protocol for real pictures, and what its figures and tables say of a gated model."""

import json

import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb

from msvit import MSViT, plots
from msvit.gating.rules import make_rule
from msvit.models.fit_reducer import fit_reducer
from msvit.studies import protocol
from msvit.studies.inspect import Inspection
from msvit.training.build import build
from msvit.training.recipe import Recipe, RecipeError

BASE = Recipe(model="tiny", target=0.6, epochs_dense=2, epochs=1)


@pytest.fixture
def inspection(make_vit):
    """A gated model whose threshold is in the middle, and pictures of which it gets every third right."""
    model, images = MSViT(make_vit()).eval(), torch.randn(9, 3, 64, 64)
    model.threshold = model.run(images).gates.median().item()
    result = model.run(images)
    predicted = result.logits.argmax(1)
    targets = (predicted + (torch.arange(9) % 3 > 0)) % 5
    decisions = (result.gates, result.coarse, result.tokens)
    return Inspection(model, images, *decisions, predicted, targets, (0.5,) * 3, (0.2,) * 3)


CORES, SMOKE = protocol.EFFORTS["cores"], protocol.EFFORTS["smoke"]


def test_all_rows_start_alike_and_every_method_has_every_budget():
    found = protocol.rows(BASE, CORES, 5e-4)
    assert len({row.label for row in found}) == len(found) == 2 + 2 + 14 * 4
    assert all(row.dense and row.changes["lr"] == 5e-4 for row in found)
    for row in found[4:]:
        assert row.label.endswith(f" at {row.changes['target']:g}")
    assert [row.label for row in found[2:4]] == [f"{protocol.SMALLER} at {side} px" for side in (32, 48)]
    l0 = next(row.changes for row in found if row.label == "MSViT, l0 at 0.4")
    assert l0 == {"loss": "l0", "target": 0.4, "lr": 5e-4}


def test_a_reducer_is_fitted_to_each_budget():
    vit, keeps = build(BASE, None).vit, []
    for row in protocol.rows(BASE, CORES, 1e-3):
        if row.label.startswith("dynamicvit"):
            keeps.append(row.changes["reducer_settings"]["keep"])
            assert row.changes["reducer_settings"] == fit_reducer("dynamicvit", vit, row.changes["target"])
    assert keeps == sorted(keeps)
    assert len(set(keeps)) == 4


def test_more_than_two_scales_are_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(RecipeError, match=r"scales=\[1, 2, 4\]: the protocol, .* use scales=\[1, 2\]"):
        protocol.run_protocol(BASE.replace(scales=[1, 2, 4]), SMOKE, 1e-3, tmp_path)
    assert not list(tmp_path.iterdir())


def test_smaller_pictures_are_whole_coarse_patches_and_each_of_them_once():
    assert protocol.smaller(BASE, (0.05, 0.5, 0.625, 0.75, 0.875, 1)) == [16, 32, 48]
    assert protocol.smaller(BASE.replace(size=128), (0.5, 0.625, 0.75, 0.875)) == [64, 80, 96, 112]


def test_points_of_a_method_are_a_series_and_smaller_pictures_cost_what_they_cost(tmp_path, monkeypatch):
    """The table's MACs are shares of the full size's, whichever size a row has."""
    full, half = (build(BASE.replace(size=size), None).dense_macs((size, size)) for size in (64, 32))
    found = [
        {"method": "dense", "dense_macs": full, "macs": 1.0, "macs_sd": 0.0},
        {"method": "dense, trained on", "dense_macs": full, "macs": 1.0, "macs_sd": 0.0},
        {"method": f"{protocol.SMALLER} at 32 px", "dense_macs": half, "macs": 1.0, "macs_sd": 0.0},
        {"method": "MSViT, l0 at 0.4", "dense_macs": full, "macs": 0.4, "macs_sd": 0.1},
    ]
    monkeypatch.setattr(protocol, "run_rows", lambda *_: pd.DataFrame(found))
    table = protocol.run_protocol(BASE, SMOKE, 1e-3, tmp_path)
    assert table["series"].tolist() == ["dense", protocol.SMALLER, protocol.SMALLER, "MSViT, l0"]
    assert table["macs"].tolist() == pytest.approx([1, 1, half / full, 0.4])


def test_each_method_has_a_panel_with_the_baselines():
    rows = []
    for series, values in {"dense, smaller pictures": (50, 60), "random mask": (52, 58), "tome": (55, 59)}.items():
        for budget, accuracy in zip((0.4, 0.6), values, strict=True):
            for seed in (0, 1):
                row = {"series": series, "method": f"{series} at {budget:g}", "macs": budget, "seed": seed}
                rows.append(row | {"accuracy": accuracy / 100 + 0.01 * seed})
    figure = plots.beside_baselines(pd.DataFrame(rows), protocol.BASELINES)
    (axes,) = figure.axes
    assert axes.get_title() == "ToMe"
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn["ToMe"] == [pytest.approx([40, 55.5]), pytest.approx([60, 59.5])]
    assert drawn.keys() == {"ToMe", "random", "dense, smaller pictures"}
    colour = pytest.approx(to_rgb(axes.lines[-1].get_color()))
    (band,) = (band for band in axes.collections if band.get_facecolor()[0, :3] == colour)
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(59.5 + 100 * 0.01 / 2**0.5)


def test_accuracy_by_class_is_counted_by_hand(inspection):
    named = Inspection(**{**vars(inspection), "classes": tuple("abcde")})
    table = protocol.by_class({"own": named})
    for k, name in enumerate("abcde"):
        mine = [p == t for p, t in zip(named.predicted.tolist(), named.targets.tolist(), strict=True) if t == k]
        assert name not in table.index if not mine else table.loc[name, "own"] == round(100 * sum(mine) / len(mine), 1)
    assert table.loc["all", "own"] == pytest.approx(100 / 3, abs=0.05)


def test_other_decisions_than_its_own(inspection):
    table = protocol.compare_decisions(inspection, batch=4).set_index("decisions")
    assert table.loc["as the gate decides", "accuracy"] == pytest.approx(1 / 3)
    model, size = inspection.model, (64, 64)
    dense, n = model.dense_macs(size), round(inspection.coarse.flatten(1).sum(1).double().mean().item())
    rule = MSViT(model.vit, gate=make_rule("fine")).macs_of
    for name, macs in table["macs"].items():
        if "as many" in name:
            assert macs * dense == pytest.approx(rule(torch.tensor([n]), size).item())
    assert table.loc["all fine", "macs"] == 1
    assert table["macs"].idxmin() == "all coarse"
    fine = model.run(inspection.images, torch.zeros(inspection.coarse.shape[1:], dtype=torch.bool)).logits.argmax(1)
    assert table.loc["all fine", "accuracy"] == (fine == inspection.targets).double().mean().item()
    first = inspection.gates.flatten(1).argsort(1, descending=True) < 0  # shape and type
    for row, order in zip(first, inspection.gates.flatten(1).argsort(1, descending=True), strict=True):
        row[order[:n]] = True
    right = model.run(inspection.images, first.view_as(inspection.coarse)).logits.argmax(1) == inspection.targets
    (name,) = (name for name in table.index if "first" in name)
    assert table.loc[name, "accuracy"] == right.double().mean().item()


@pytest.mark.parametrize("lost", [0, 5, 9])
def test_lost_pictures_are_counted_and_shown(inspection, lost):
    dense = Inspection(**{**vars(inspection), "predicted": inspection.targets.clone()})
    gated = Inspection(**{**vars(inspection), "predicted": (inspection.targets + (torch.arange(9) < lost)) % 5})
    figure = protocol.lost_pictures(dense, gated, list("abcde"))
    assert figure.get_suptitle().startswith(f"{lost} of 9 pictures are lost, 0 won")
    assert sum(axes.get_visible() for axes in figure.axes) == 2 * lost


def test_decisions_of_several_methods_stand_side_by_side_in_per_cent(inspection):
    own = protocol.compare_decisions(inspection).set_index("decisions")
    table = protocol.decisions_table({"a": inspection, "b": inspection})
    assert list(table) == [f"{name}: {value} (%)" for value in ("accuracy", "macs") for name in "ab"]
    assert list(table.index) == list(own.index)
    for name in "ab":
        assert (table[f"{name}: macs (%)"] - own["macs"] * 100).abs().max() <= 0.05 + 1e-9


def test_gated_rows_are_those_that_a_learned_gate_decides_alone(tmp_path):
    changes = {
        "gate": {},
        "dense": {"epochs": 0},
        "mask": {"gating": "random"},
        "both": {"reducer": "tome"},
        "other": {"loss": "l0"},
    }
    for name, settings in changes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.json").write_text(json.dumps(BASE.replace(**settings).to_dict()))
    methods = [f"{name} at 0.6" for name in changes]
    table = pd.DataFrame({"run": [*changes, "gate"], "method": [*methods, "gate at 0.75"]})
    assert protocol.gated_rows(tmp_path, table, 0.6)["run"].tolist() == ["gate", "other"]


def test_positions_are_means_over_pictures(inspection):
    figure = plots.positions({"a": inspection.coarse})
    shown = torch.as_tensor(figure.axes[0].images[0].get_array().data)
    torch.testing.assert_close(shown, 100 * (~inspection.coarse).double().mean(0))
