import pytest
import timm
import torch
from small_models import EVERY, MODELS, REDUCTIONS, TRAINED, build
from tiers import fast
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mim.reduction import KeepRate, PerBlock, TokenReducedViT, ToMe, TopKPruning
from mim.reduction.macs import count_macs
from mim.reduction.recipes import RECIPES
from mim.reduction.scores import ClassAttention


@pytest.fixture(scope="module")
def base():
    with torch.device("meta"):
        return timm.create_model("vit_base_patch16_224")


def counted(model, images):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() / 2 / len(images)


@pytest.mark.parametrize("model", MODELS)
def test_a_whole_model_costs_what_a_counter_counts(models, images, model):
    vit = models[model]
    assert count_macs(vit).total == counted(vit, images)


@pytest.mark.parametrize("reduction", [*REDUCTIONS, *TRAINED])
@pytest.mark.parametrize("model", ["plain", "EVA-02"])
def test_a_reduced_model_costs_what_a_counter_counts(images, model, reduction):
    vit = build(model)
    wrapper = TokenReducedViT(vit, EVERY[reduction]()).eval()
    assert count_macs(vit, wrapper.reduction).total == pytest.approx(counted(wrapper, images), rel=2e-3)


def test_whole_and_reduced_models_cost_what_the_papers_say(base):
    """GMAC of ViT-B/16: whole, ToMe with r = 8, 13, 16, and EViT with keep rate 0.7 without its fused token."""
    assert count_macs(base).total / 1e9 == pytest.approx(17.56, abs=0.01)
    for r, expected in ((8, 13.1), (13, 10.4), (16, 8.8)):
        assert count_macs(base, ToMe(PerBlock(r))).total / 1e9 == pytest.approx(expected, abs=0.05)
    reduction = TopKPruning(KeepRate(0.7), ClassAttention())
    assert count_macs(base, reduction).total / 1e9 == pytest.approx(11.5, abs=0.1)


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.shortens])
@pytest.mark.parametrize("share", fast([0.75, 0.5], [0.5]))
def test_every_recipe_comes_near_a_share(base, name, share):
    reduction = RECIPES[name].fit(base, share)
    got = count_macs(base, reduction).total / count_macs(base).total
    assert got == pytest.approx(share, abs=0.04)
