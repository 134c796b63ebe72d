"""Token-level masking: which connections a token loses, and that a scored model has them all."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mim.encoder import Encoder
from mim.evaluation.connections import ConnectionMaskedViT, connections
from mim.evaluation.finetune import Finetune, classifier
from mim.options.classification import FinetuneRecipe

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build():
    return VisionTransformer(32, 8, embed_dim=32, depth=2, num_heads=2, num_classes=3)


def test_a_token_looks_at_all_at_all_but_itself_or_at_itself_alone():
    seen = connections(400, 5, 0.5)[:, 0]  # (images, rows, columns)
    others = seen.sum(2) - seen.diagonal(dim1=1, dim2=2).long()
    kinds = torch.stack([seen.diagonal(dim1=1, dim2=2).long(), others], dim=2).flatten(0, 1)
    counts = {tuple(kind): int((kinds == torch.tensor(kind)).all(1).sum()) for kind in ((1, 4), (0, 4), (1, 0))}
    assert sum(counts.values()) == 2000
    assert counts[1, 4] == pytest.approx(1000, abs=90)  # four standard deviations
    assert counts[0, 4] == pytest.approx(500, abs=80)


def test_no_share_is_all_connections():
    assert connections(3, 4, 0.0).all()


def test_each_block_equals_a_loop_over_tokens_that_leaves_connections_out(monkeypatch):
    model, masks = ConnectionMaskedViT(build(), 0.5).double().train(), []

    def remembered(*args):
        masks.append(connections(*args))
        return masks[-1]

    monkeypatch.setattr("mim.evaluation.connections.connections", remembered)
    logits = model(IMAGES.double())
    assert len(masks) == 2
    assert not torch.equal(*masks)
    vit = model.vit
    for image, expected in zip(range(2), logits, strict=True):
        x = vit._pos_embed(vit.patch_embed(IMAGES[image : image + 1].double()))[0]
        for block, mask in zip(vit.blocks, masks, strict=True):
            rows = []
            q, k, v = block.attn.qkv(block.norm1(x)).view(17, 3, 2, 16).unbind(1)
            for token in range(17):
                seen = mask[image, 0, token].nonzero().flatten()
                scores = torch.einsum("hd,shd->hs", q[token], k[seen]) / 4
                rows.append(torch.einsum("hs,shd->hd", scores.softmax(1), v[seen]).flatten())
            x = x + block.attn.proj(torch.stack(rows))
            x = x + block.mlp(block.norm2(x))
        torch.testing.assert_close(vit.forward_head(vit.norm(x)[None])[0], expected, atol=1e-12, rtol=0)


def test_a_scored_model_is_timms_to_the_bit():
    vit = build().eval()
    assert torch.equal(ConnectionMaskedViT(vit, 0.5).eval()(IMAGES), vit(IMAGES))


def test_other_models_are_refused_by_name():
    with pytest.raises(TypeError, match="Linear is no plain ViT"):
        ConnectionMaskedViT(nn.Linear(2, 2), 0.5)


def test_fine_tuning_masks_by_the_key_of_the_step_and_trains_every_weight(monkeypatch):
    recipe = FinetuneRecipe(epochs=10, batch_size=8, pool="cls", tlm=0.3, drop_path=0.0, mixup=0, cutmix=0, ema=0.9)
    vit = classifier(Encoder("test_vit", img_size=32, patch_size=8), 3, recipe, seed=0)
    trained = Finetune(vit, recipe, 3, images=80, seed=0)
    nn.init.normal_(vit.head.weight)
    monkeypatch.setattr(trained, "log", lambda name, value: None)
    losses = []
    for key in (1, 1, 2):
        torch.manual_seed(key)
        losses.append(trained.training_step(([IMAGES], torch.tensor([0, 2])), 0))
    assert losses[0] == losses[1] != losses[2]
    losses[0].backward()
    assert trained.vit is vit
    assert all(parameter.grad is not None for parameter in vit.parameters())
    assert len([p for g in trained.configure_optimizers().param_groups for p in g["params"]]) == len(
        list(vit.parameters())
    )
    assert not trained.evaluated.training
