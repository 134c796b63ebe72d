"""What holds for every recipe that there is: found, not listed."""

import pytest
import timm
import torch
from recipes import ROOT, SETTINGS
from tiers import fast

from mim.methods import Plan
from mim.options.pretraining import translate
from mim.run.config import instantiate, parse
from mim.run.weights import ModelCard, export_backbone


@pytest.fixture
def objects(request, monkeypatch):
    """Method and data of a tiny run, in the middle of ten steps."""
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    objects = instantiate(parse(translate(SETTINGS[request.param])))
    method = objects.model
    method.plan, method.log, method.log_dict = Plan(max_steps=10, batch_size=16), lambda *_: None, lambda *_: None
    method.setup("fit")
    objects.data.open(method.encoder.img_size, 3, 0)
    return objects


every_recipe = pytest.mark.parametrize("objects", SETTINGS, indirect=True)


@pytest.mark.parametrize("objects", fast(SETTINGS, ("mae", "hpm", "ibot", "ijepa", "simmim")), indirect=True)
def test_twenty_steps_on_one_batch_lower_the_loss(objects):
    method, batch = objects.model, objects.data.batch(0)[:2]
    optimizer = torch.optim.AdamW((p for p in method.parameters() if p.requires_grad), lr=3e-3)
    losses = []
    for _ in range(20):
        torch.manual_seed(0)
        losses.append(loss := method.training_step(batch, 0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]


@every_recipe
def test_the_exported_backbone_gives_the_tokens_of_the_encoder_in_timm(objects, tmp_path):
    encoder = objects.model.evaluated.eval()
    card = ModelCard(method="any", data="shapes", data_licence="cc0-1.0")
    export_backbone(encoder.vit, tmp_path / "out", mean=[0.5] * 3, std=[0.25] * 3, card=card, model_args={})
    twin = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(2, 3, *encoder.img_size)
    features = twin.forward_features(images)
    tokens = features if features.ndim == 3 else features.flatten(2).transpose(1, 2)  # conv nets give maps
    assert torch.equal(tokens, encoder(images))
