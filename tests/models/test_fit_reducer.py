import pytest
import torch

from msvit import MSViT, make_reducer, make_rule
from msvit.models.fit_reducer import fit_reducer
from msvit.reducers.registry import REDUCERS
from msvit.studies import study
from msvit.training.recipe import Recipe


@pytest.mark.parametrize("name", REDUCERS)
@pytest.mark.parametrize("share", [0.6, 0.75])
def test_the_model_that_runs_costs_what_was_asked(name, share, tiny_vit):
    vit = tiny_vit.eval()
    images = torch.randn(3, 3, *vit.patch_embed.img_size)
    fitted = make_reducer(name, vit, **fit_reducer(name, vit, share, images=images))
    model = MSViT(vit, gate=make_rule("fine"), reducer=fitted).eval()
    found = model.run(images).macs / model.dense_macs(vit.patch_embed.img_size)
    rough = {"tome": 0.05, "grid": 0.25, "strided_convolution": 0.25}  # whole tokens in every block, and whole blocks
    found = found.mean() if name == "algm" else found  # which merges as much as a picture allows
    assert (found - share).abs().max() <= rough.get(name, 0.02)


def test_the_other_settings_stay(tiny_vit):
    settings = fit_reducer("token_pooling", tiny_vit, 0.7, method="kmedoids")
    assert settings["method"] == "kmedoids"
    assert 0 < settings["keep"] < 1


def test_without_pictures_there_are_scenes(make_vit):
    vit = make_vit(in_chans=1)
    first, second = (fit_reducer("algm", vit, share)["threshold"] for share in (0.6, 0.8))
    assert -1 <= first < second <= 1


def test_rows_of_methods():
    base = Recipe(target=0.6)
    rows = {row.label: row.changes for row in study.reducer_rows(["evit", "gate+tome"], base)}
    assert rows["evit"]["gating"] == "fine"
    assert rows["MSViT + tome"].keys() == {"reducer", "reducer_settings"}
    alone = study.reducer_rows(["tome"], base)[0].changes["reducer_settings"]["r"]
    assert rows["MSViT + tome"]["reducer_settings"]["r"] < alone  # the gate saves the rest
    for row in study.reducer_rows(study.REDUCER_METHODS, base):
        base.replace(**row.changes)
    assert study.reducer_rows([], base) == []
    with pytest.raises(ValueError, match="nearest is 'tome'"):
        study.reducer_rows(["tomme"], base)
