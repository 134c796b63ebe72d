"""The parts of fine-tuning against the recipe's own words."""

import copy

import pytest
import timm
import torch
from torch import nn

from mim.data.augment import Augmented
from mim.data.pixels import EIGHT_BIT
from mim.encoder import Encoder
from mim.evaluation.finetune import Finetune, classifier
from mim.interop import ModelCard, export_backbone
from mim.memory import MemoryViT, Task
from mim.options.classification import FinetuneRecipe
from mim.reduction import Cropr, DynamicViT


def module(**settings):
    recipe = FinetuneRecipe(**{"epochs": 10, "batch_size": 8, "pool": "mean", **settings})
    encoder = Encoder("test_vit", img_size=32, patch_size=8)
    return Finetune(classifier(encoder, 5, recipe, seed=0), recipe, 5, images=80, seed=0)


def test_learning_rates_decay_from_the_head_down_to_the_embedding():
    """Layer 0 is the embedding, block i is i + 1, the new norm and the head come last (MAE, appendix A.1)."""
    trained = module(layer_decay=0.5)
    scales = {}
    for group in trained.configure_optimizers().param_groups:
        for parameter in group["params"]:
            name = next(name for name, other in trained.vit.named_parameters() if other is parameter)
            scales[name] = group["lr_scale"], group["weight_decay"]
    depth = len(trained.vit.blocks)
    assert scales["head.weight"] == (1.0, 0.05)
    assert scales["fc_norm.weight"] == (1.0, 0.0)
    assert scales["patch_embed.proj.weight"] == (0.5 ** (depth + 1), 0.05)
    assert scales["pos_embed"] == scales["cls_token"] == (0.5 ** (depth + 1), 0.0)
    assert scales["blocks.0.attn.qkv.weight"] == (0.5**depth, 0.05)
    assert scales["blocks.0.attn.qkv.bias"] == (0.5**depth, 0.0)


def test_the_final_norm_of_a_pooled_class_token_learns_as_the_last_block():
    trained = module(layer_decay=0.5, pool="cls")
    norm = trained.vit.norm.weight
    (scale,) = (
        g["lr_scale"] for g in trained.configure_optimizers().param_groups if any(p is norm for p in g["params"])
    )
    assert scale == 0.5


def test_mean_pooling_moves_the_norm_behind_the_pooling():
    vit = module().vit.eval()
    assert isinstance(vit.norm, nn.Identity)
    tokens = vit.forward_features(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(vit.forward_head(tokens), vit.head(vit.fc_norm(tokens[:, 1:].mean(1))))


def test_the_class_token_keeps_the_encoders_norm():
    encoder = Encoder("test_vit", img_size=32, patch_size=8)
    expected = encoder(torch.ones(1, 3, 32, 32))[:, 0]
    vit = classifier(encoder, 5, FinetuneRecipe(pool="cls", drop_path=0.0), seed=0)
    torch.testing.assert_close(vit(torch.ones(1, 3, 32, 32)), vit.head(expected))


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("model", ["vit_small_patch16_dinov3", "eva02_tiny_patch14_224"])
def test_a_rotary_classifier_trains_and_is_rebuilt_by_timm(model, pool, tmp_path):
    encoder = Encoder(model, img_size=32, patch_size=8, kwargs={"depth": 2, "embed_dim": 32, "num_heads": 2})
    recipe = FinetuneRecipe(epochs=10, batch_size=8, pool=pool, drop_path=0.2, layer_decay=0.5)
    trained = Finetune(classifier(encoder, 5, recipe, seed=0), recipe, 5, images=80, seed=0)
    scales = {
        id(p): group["lr_scale"] for group in trained.configure_optimizers().param_groups for p in group["params"]
    }
    assert scales[id(trained.vit.head.weight)] == 1
    assert scales[id(trained.vit.patch_embed.proj.weight)] == 0.5**3
    assert trained.vit.blocks[1].drop_path2.drop_prob == pytest.approx(0.2)
    card = ModelCard("fine-tuning", "photos")
    assert export_backbone(trained.vit, tmp_path / "x", mean=[0.5] * 3, std=[0.5] * 3, card=card) == 0
    again, images = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True).eval(), torch.randn(2, 3, 32, 32)
    assert torch.equal(again(images), trained.vit.eval()(images))


def test_every_weight_is_trained():
    assert all(parameter.requires_grad for parameter in module().vit.parameters())


def test_stochastic_depth_rises_to_the_last_block():
    rates = [block.drop_path2.drop_prob for block in module(drop_path=0.3).vit.blocks]
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(0.3)


def test_a_model_that_was_loaded_to_be_measured_is_trained_in_training_mode():
    """Lightning leaves modes as they are: in evaluation mode there would be no stochastic depth."""
    recipe = FinetuneRecipe(pool="mean", ema=0.9)
    vit = classifier(Encoder("test_vit", img_size=32, patch_size=8).eval(), 5, recipe, seed=0)
    trained = Finetune(vit, recipe, 5, images=80, seed=0)
    assert all(part.training for part in trained.model.modules())
    assert not trained.evaluated.training


def test_the_learning_rate_warms_up_and_falls_to_its_minimum():
    trained = module(blr=0.32, warmup_epochs=2, min_lr=1e-6)
    assert trained.max_steps == 100
    assert trained.learning_rate(0) == 0
    assert trained.learning_rate(20) == pytest.approx(0.01)
    assert trained.learning_rate(100) == pytest.approx(1e-6)


def test_augmentation_depends_on_torchs_generator_alone_and_leaves_others_as_they_were():
    import random

    frames = Augmented(1.0, (0.5, 1.0), "rand-m9-mstd0.5-inc1", erase=0.5)
    frames.configure((32, 32), (0.5,) * 3, (0.25,) * 3, EIGHT_BIT)
    image = torch.randint(256, (3, 40, 40), dtype=torch.uint8)
    before = random.getstate()
    first, second = [], []
    for views in (first, second):
        torch.manual_seed(3)
        views += [frames.crop(image)[0] for _ in range(40)]
        random.random()
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert len({view.numpy().tobytes() for view in first}) == 40
    random.setstate(before)


def test_erasing_replaces_one_rectangle_by_noise():
    frames = Augmented(1.0, (1.0, 1.0), "none", erase=1.0)
    frames.configure((32, 32), (0.5,) * 3, (0.25,) * 3, EIGHT_BIT)
    (view,) = frames.crop(torch.full((3, 32, 32), 7, dtype=torch.uint8))
    erased = (view != 7).any(0)
    rows, columns = erased.any(1).nonzero(), erased.any(0).nonzero()
    assert 0.02 * 1024 * 0.8 < len(rows) * len(columns) < 1024 / 2
    assert len(rows) == rows.max() - rows.min() + 1
    assert erased.sum() > 0.9 * len(rows) * len(columns)


def test_images_that_could_not_be_read_are_not_scored():
    trained = module()
    trained.validation_step((torch.randn(3, 3, 32, 32), torch.tensor([0, -1, 1])), 0)
    assert int(trained.top1.tp + trained.top1.fn) == 2
    assert trained.confusion.compute().sum(1).tolist() == [1, 1, 0, 0, 0]


def reduced(**settings):
    recipe = FinetuneRecipe(**{"epochs": 10, "batch_size": 8, "pool": "mean", **settings})
    encoder = Encoder("test_vit", img_size=32, patch_size=8)
    reduction = Cropr(encoder.dim, 6, 5, r=2)
    return Finetune(classifier(encoder, 5, recipe, seed=0), recipe, 5, images=80, seed=0, reduction=reduction)


def test_what_a_reduction_learns_is_part_of_the_loss_and_its_weights_learn_as_fast_as_the_head(monkeypatch):
    trained = reduced(drop_path=0.0)
    logged = {}
    monkeypatch.setattr(trained, "log", lambda name, value: logged.update({name: value.item()}))
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    loss = trained.training_step(([images], labels), 0)
    assert logged["train/loss"] == loss.item() > logged["train/reduction"] > 0
    loss.backward()
    learning = {
        id(p): group["lr_scale"] for group in trained.configure_optimizers().param_groups for p in group["params"]
    }
    assert {learning[id(parameter)] for parameter in trained.model.reduction.parameters()} == {1.0}
    assert all(parameter.grad is not None for parameter in trained.model.reduction.parameters())
    assert len(learning) == len(list(trained.parameters()))


def test_a_teacher_is_agreed_with_and_never_trained(monkeypatch):
    trained = reduced(drop_path=0.0)
    trained.teacher = copy.deepcopy(trained.vit).requires_grad_(False)
    trained.model.reduction = DynamicViT(trained.vit.embed_dim, 0.5, at=[1])
    nn.init.constant_(trained.model.reduction.predictors[0].decide[-1].bias[:1], 50.0)  # all stay
    logged = {}
    monkeypatch.setattr(trained, "log", lambda name, value: logged.update({name: value.item()}))
    batch = [torch.randn(8, 3, 32, 32)], torch.arange(8) % 5
    trained.training_step(batch, 0)
    assert logged["train/teacher"] == pytest.approx(0, abs=1e-6)
    for parameter in trained.teacher.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    trained.training_step(batch, 0).backward()
    assert logged["train/teacher"] > 0.01
    assert logged["train/loss"] > logged["train/teacher"] + logged["train/reduction"]
    assert all(parameter.grad is None for parameter in trained.teacher.parameters())
    optimized = {id(p) for group in trained.configure_optimizers().param_groups for p in group["params"]}
    assert not optimized & {id(parameter) for parameter in trained.teacher.parameters()}


def test_the_strength_of_a_reduction_is_a_function_of_the_step(monkeypatch):
    trained = reduced(anneal=(0.1, 0.5), ema=0.9)
    strengths = []
    for step in (0, 10, 30, 50, 99):
        monkeypatch.setattr(Finetune, "global_step", step)
        trained.on_validation_epoch_start()
        strengths.append(trained.model.reduction.strength)
        assert trained.evaluated.reduction.strength == strengths[-1]
    assert strengths == pytest.approx([0, 0, 0.5, 1, 1])


def test_of_memory_the_classifiers_matrix_alone_is_decayed_and_all_learn_at_one_rate():
    vit = Encoder("test_vit", img_size=32, patch_size=8).vit
    recipe = FinetuneRecipe(memory=2, epochs=10, batch_size=8)
    trained = Finetune(MemoryViT(vit, {"a": Task(vit, 2, "xyz")}), recipe, 3, images=80, seed=0)
    decays = {
        name: (group["weight_decay"], group.get("lr_scale", 1.0))
        for group in trained.configure_optimizers().param_groups
        for parameter in group["params"]
        for name, other in trained.model.named_parameters()
        if parameter is other
    }
    assert decays == {
        "tasks.a.class_token": (0.0, 1.0),
        "tasks.a.memory": (0.0, 1.0),
        "tasks.a.head.weight": (0.05, 1.0),
        "tasks.a.head.bias": (0.0, 1.0),
    }
