"""Reductions as files: what is written builds the same again."""

import pytest
import torch
from small_models import EVERY, build

from mim.errors import UserError
from mim.reduction import KeepRate, PerBlock, TokenReducedViT, ToMe, TopKPruning
from mim.reduction.files import build_reduction, load_reduction, save_reduction
from mim.reduction.scores import RandomScore


@pytest.mark.parametrize("name", EVERY)
def test_a_saved_reduction_is_built_again(models, images, tmp_path, name):
    torch.manual_seed(4)
    reduction = EVERY[name]().eval()
    save_reduction(reduction, tmp_path)
    loaded = load_reduction(tmp_path, models["plain"])
    assert loaded.describe() == reduction.describe()
    assert torch.equal(
        TokenReducedViT(models["plain"], loaded)(images), TokenReducedViT(models["plain"], reduction)(images)
    )
    assert (tmp_path / "reduction.safetensors").exists() == bool(reduction.state_dict())


@pytest.mark.parametrize("schedule", [KeepRate(0.07, at=[1, 3]), PerBlock(3, inflect=-0.5, stop=1)])
def test_schedules_keep_all_their_numbers(models, tmp_path, schedule):
    save_reduction(TopKPruning(schedule, RandomScore(seed=5), rejoin=True), tmp_path)
    loaded = build_reduction(str(tmp_path / "reduction.yaml"), models["plain"])
    assert (repr(loaded.schedule), repr(loaded.score), loaded.rejoin) == (repr(schedule), "RandomScore(seed=5)", True)


def test_a_trained_reduction_is_refused_by_another_model(tmp_path):
    save_reduction(EVERY["Cropr"](), tmp_path)
    with pytest.raises(UserError, match="for models of dim 16; this one has 32"):
        load_reduction(tmp_path, build("plain", embed_dim=32))
    with pytest.raises(UserError, match="for models of depth 4; this one has 3"):
        load_reduction(tmp_path, build("plain", depth=3))


def test_weights_of_another_reduction_are_refused(models, tmp_path):
    save_reduction(EVERY["Cropr"](), tmp_path)
    save_reduction(ToMe(PerBlock(2)), tmp_path)
    with pytest.raises(UserError, match="does not belong to"):
        load_reduction(tmp_path, models["plain"])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("reduction: {class_path: os.system, init_args: {command: ls}}", "class_path"),
        ("reduction: {class_path: mim.reduction.KeepRate, init_args: {keep: 0.5}}", "KeepRate"),
        ("reduction: {class_path: mim.reduction.Cropr, init_args: {r: 2}}", "dim"),
        ("a: &a [1]\nreduction: *a", "alias"),
    ],
)
def test_a_file_names_nothing_but_reductions(models, tmp_path, text, why):
    (tmp_path / "reduction.yaml").write_text(text)
    with pytest.raises(UserError, match=why):
        load_reduction(tmp_path, models["plain"])
