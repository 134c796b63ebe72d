import copy
import math
from itertools import combinations

import lightning as L
import pytest
import timm
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from torch import nn
from torch.utils.data import DataLoader

from mim.encoder import Encoder
from mim.interop import ModelCard, export_backbone
from mim.masking import BlockMasking, HardPatchMasking, RandomMasking
from mim.methods import HPM, MAE, Method, Plan
from mim.methods.hpm import DifficultyConfig, hidden_pairs, rank_correlation, ranking_loss, regression_loss
from mim.patches import gather_tokens, patchify, visible_indices
from mim.randomness import RowGenerator
from mim.targets import FeatureTarget, PixelTarget

KWARGS = {"embed_dim": 16, "depth": 2, "num_heads": 2}


def build(start=0.5, target=None, loss="relative", units=8, depth=1, **encoder):
    """Half of the hidden patches are the hardest from the first step on."""
    arguments = {"img_size": 32, "patch_size": 8, "positions": "sincos", "kwargs": KWARGS} | encoder
    method = HPM(
        Encoder("vit_tiny_patch16_224", **arguments),
        HardPatchMasking(start=start, end=start),
        target or PixelTarget(),
        DifficultyConfig(loss, units),
        decoder_width=16,
        decoder_depth=depth,
        decoder_heads=2,
    )
    silence(method)
    return method


def silence(method):
    """Keeps what is logged in ``method.logged``."""
    method.logged = {}
    method.log = lambda name, value: method.logged.update({name: value})
    method.log_dict = method.logged.update


class Oracle(nn.Module):
    """A trunk that predicts fixed values for every patch."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def forward(self, sequence, indices):
        return gather_tokens(self.values, indices)


def step(method, images):
    return method.training_step(([images], torch.zeros(len(images))), 0)


def mask_of(method, images):
    """The mask that ``step`` draws."""
    return method.draw_mask(method.row_generator(len(images), 0), method.scores(images))


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("frozen") / "backbone"
    vit = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=0)
    export_backbone(vit, path, mean=(0.5,) * 3, std=(0.25,) * 3, card=ModelCard("none", "none"))
    return path


# The loss of difficulty ----------------------------------------------------------------------------------------------


def slow_ranking_loss(difficulty, error):
    """Both orders of every pair of patches, in the reference's probabilities."""
    total, count = 0.0, 0
    for d, e in zip(difficulty.double().tolist(), error.tolist(), strict=True):
        for i in range(len(d)):
            for j in range(len(d)):
                if e[i] != e[j]:
                    probability = 1 / (1 + math.exp(d[i] - d[j]))
                    total -= math.log(probability if e[j] > e[i] else 1 - probability)
                    count += 1
    return total / count


def ranking(difficulty, error):
    return ranking_loss(*hidden_pairs(difficulty, error))


@pytest.mark.parametrize("patches", [2, 3, 12, 13])
def test_the_ranking_loss_equals_a_slow_loop_over_both_orders(patches):
    difficulty, error = torch.randn(3, patches), torch.rand(3, patches)
    assert ranking(difficulty, error).item() == pytest.approx(slow_ranking_loss(difficulty, error), rel=1e-5)


@pytest.mark.parametrize("patches", [2, 3, 12, 13])
def test_every_pair_counts_once(patches):
    order = hidden_pairs(torch.randn(3, patches), torch.rand(3, patches))[1]
    assert order.abs().sum() == 3 * len(list(combinations(range(patches), 2)))


@pytest.mark.parametrize("patches", [12, 13])
def test_ties_count_neither_in_the_sum_nor_in_the_number(patches):
    difficulty, error = torch.randn(3, patches), torch.randint(3, (3, patches)).float()
    assert ranking(difficulty, error).item() == pytest.approx(slow_ranking_loss(difficulty, error), rel=1e-5)


def test_nothing_but_ties_costs_nothing():
    difficulty = torch.randn(2, 7, requires_grad=True)
    loss = ranking(difficulty, torch.ones(2, 7))
    loss.backward()
    assert loss == 0
    assert not difficulty.grad.any()


def test_indifference_costs_ln_2_certainty_nothing_and_the_reverse_much():
    error = torch.rand(3, 13)
    assert ranking(torch.zeros(3, 13), error).item() == pytest.approx(math.log(2), abs=1e-6)
    assert ranking(1e5 * error, error) < 1e-2
    assert ranking(-100 * error, error) > 10


def test_only_the_order_of_errors_and_the_gaps_of_difficulties_matter():
    difficulty, error, order = torch.randn(3, 13), torch.rand(3, 13), torch.randperm(13)
    loss = ranking(difficulty, error)
    torch.testing.assert_close(ranking(difficulty + 3, error), loss)
    torch.testing.assert_close(ranking(difficulty, (5 * error).exp()), loss)
    torch.testing.assert_close(ranking(difficulty[:, order], error[:, order]), loss)


def test_gradients_of_the_ranking_loss_pass_finite_differences():
    difficulty = torch.randn(2, 6, dtype=torch.double, requires_grad=True)
    error = torch.rand(2, 6, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda d: ranking(d, error), difficulty)


def test_the_absolute_loss_is_the_distance_from_standardised_errors():
    difficulty, error = torch.randn(3, 13), torch.rand(3, 13)
    total = 0.0
    for d, e in zip(difficulty, error, strict=True):
        total += ((d - (e - e.mean()) / (e.var(unbiased=True) + 1e-6).sqrt()) ** 2).sum().item()
    assert regression_loss(difficulty, error).item() == pytest.approx(total / 39, rel=1e-5)


@pytest.mark.parametrize("patches", [12, 13])
def test_the_rank_correlation_is_kendalls(patches):
    from scipy.stats import kendalltau

    difficulty, error = torch.randn(1, patches), torch.rand(1, patches)
    expected = kendalltau(difficulty[0].numpy(), error[0].numpy()).statistic
    assert rank_correlation(*hidden_pairs(difficulty, error)).item() == pytest.approx(expected, abs=1e-6)
    assert rank_correlation(*hidden_pairs(error, error)) == 1


# The step ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("standardise", [True, False])
@pytest.mark.parametrize("encoder", [{}, {"img_size": (16, 32)}, {"in_chans": 5}])
def test_the_loss_equals_a_slow_loop(standardise, encoder):
    method = build(target=PixelTarget(standardise), **encoder)
    images = torch.randn(3, method.encoder.in_chans, *method.encoder.img_size)
    mask = mask_of(method, images)
    sequence = method.fill(method.encoder(images, mask), mask)
    prediction, difficulty = method.reconstruction(sequence), method.difficulty(sequence).mean(2)
    patches, errors = patchify(images, 8), []
    for image, patch in mask.nonzero().tolist():
        target = patches[image, patch]
        if standardise:
            target = (target - target.mean()) / (target.var(unbiased=True) + 1e-6).sqrt()
        errors.append(((prediction[image, patch] - target) ** 2).mean().item())
    error, chosen = torch.tensor(errors).view(3, -1), difficulty[mask].view(3, -1)
    expected = sum(errors) / len(errors) + slow_ranking_loss(chosen, error)
    assert step(method, images).item() == pytest.approx(expected, rel=1e-5)
    assert method.logged["train/loss"] == method.logged["train/reconstruction"] + method.logged["train/difficulty"]


def test_without_ranking_the_loss_is_that_of_mae_with_the_same_mask_and_weights(images):
    method = build(start=0.0)
    mae = MAE(Encoder("test_vit", 32, 8), RandomMasking(), PixelTarget(), 16, 1, 2)
    silence(mae)
    mae.encoder, mae.decoder.fill, mae.decoder.trunk = method.encoder, method.fill, method.reconstruction
    step(method, images)
    torch.testing.assert_close(step(mae, images), method.logged["train/reconstruction"])


@pytest.mark.parametrize("loss", ["relative", "absolute"])
@pytest.mark.parametrize("kwargs", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}])
def test_every_trainable_parameter_gets_a_gradient_and_the_teacher_none(images, kwargs, loss):
    method = build(kwargs=KWARGS | kwargs, loss=loss)
    step(method, images).backward()
    silent = {name for name, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    # What only shifts all difficulties ranks nothing: its gradient is zero but for rounding.
    assert silent <= ({"difficulty.norm.bias", "difficulty.predict.bias"} if loss == "relative" else set())
    assert all(not p.requires_grad and p.grad is None for p in method.teacher.parameters())


def test_the_ranking_trains_predictor_and_encoder_but_not_the_reconstructor(images):
    method = build()
    step(method, images)
    method.logged["train/difficulty"].backward()
    assert all(p.grad is None for p in method.reconstruction.parameters())
    trained = [method.encoder.vit.patch_embed.proj.weight, method.fill.project.weight, method.fill.mask_token]
    trained += [method.difficulty.blocks[0].attn.qkv.weight, method.difficulty.predict.weight]
    assert all(p.grad.abs().max() > 1e-6 for p in trained)
    assert method.difficulty.predict.bias.grad.abs().max() < 1e-7  # a constant ranks nothing


@pytest.mark.parametrize("loss", ["relative", "absolute"])
def test_errors_are_constants_to_the_loss_of_difficulty(images, loss):
    method = build(loss=loss)
    step(method, images)
    method.logged["train/difficulty"].backward()
    found = method.encoder.vit.patch_embed.proj.weight.grad.clone()
    method.zero_grad()
    prediction, difficulty, hidden = method.predict(images, mask_of(method, images))
    error = method.target.error(prediction, method.target(images, (4, 4), hidden))
    constants = torch.tensor(error.tolist())
    (ranking if loss == "relative" else regression_loss)(difficulty, constants).backward()
    torch.testing.assert_close(found, method.encoder.vit.patch_embed.proj.weight.grad)


def test_twenty_steps_on_one_batch_lower_both_losses_and_rank_better_than_chance(images):
    method = build()
    optimizer, history = torch.optim.AdamW((p for p in method.parameters() if p.requires_grad), lr=3e-3), []
    for _ in range(20):
        loss = step(method, images)
        history.append(copy.copy(method.logged))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name in ("train/reconstruction", "train/difficulty"):
        assert history[-1][name] < history[0][name]
    assert history[-1]["health/rank_correlation"] > 0.3


def test_an_averaged_head_equals_one_unit_with_averaged_weights(images):
    many = build(units=8)
    one = build(units=1)
    state = many.state_dict()
    for name in [name for name in state if "difficulty.predict" in name]:
        state[name] = state[name].mean(0, keepdim=True)
    one.load_state_dict(state)
    torch.testing.assert_close(step(one, images), step(many, images))


def test_hidden_pixels_do_not_reach_the_student_but_the_teacher(images):
    method = build()
    mask = mask_of(method, images)
    area = mask.view(4, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    repainted = images + area
    assert torch.equal(method.encoder(repainted, mask), method.encoder(images, mask))
    assert not torch.allclose(method.scores(repainted), method.scores(images))


def test_predictions_belong_to_the_hidden_patches_in_raster_order():
    numbers = torch.arange(16.0).view(1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3).expand(2, 3, 32, 32)
    method = build()
    mask = mask_of(method, numbers)
    _, _, hidden = method.predict(numbers, mask)
    targets = method.target(numbers, (4, 4), hidden)
    assert targets[..., 0].tolist() == [row.nonzero()[:, 0].tolist() for row in mask]
    method.reconstruction = Oracle(patchify(numbers, 8))
    step(method, numbers)
    assert method.logged["train/reconstruction"] == 0


def test_decoding_visible_patches_first_predicts_the_same(images):
    """The reference puts visible tokens before hidden ones; blocks do not mind the order."""
    method = build(depth=2).eval()
    mask = mask_of(method, images)
    hidden, visible = visible_indices(~mask), visible_indices(mask)
    sequence = method.fill(method.encoder(images, mask), mask)
    sorted_tokens = gather_tokens(sequence[:, 1:], torch.cat([visible, hidden], dim=1))
    sequence = torch.cat([sequence[:, :1], sorted_tokens], dim=1)
    for trunk, found in zip((method.reconstruction, method.difficulty), method.predict(images, mask)[:2], strict=False):
        tokens = trunk.predict(trunk.norm(trunk.blocks(sequence)))[:, 1 + visible.shape[1] :]
        expected = tokens if found.ndim == 3 else tokens.mean(2)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["relative", "absolute"])
def test_a_step_reads_nothing_back_from_the_device(images, loss):
    method = build(loss=loss).to("meta")
    step(method, images.to("meta")).backward()
    assert method.encoder.vit.patch_embed.proj.weight.grad is not None


def test_constant_images_have_a_finite_loss_and_gradient():
    method = build(target=PixelTarget(standardise=True))
    step(method, torch.full((2, 3, 32, 32), 0.5)).backward()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


def test_the_ranking_is_computed_in_full_precision(images):
    method = build()
    with torch.autocast("cpu", torch.bfloat16):
        loss = step(method, images)
        _, difficulty, _ = method.predict(images, mask_of(method, images))
    assert loss.dtype == difficulty.dtype == torch.float32


def test_features_of_a_frozen_vit_can_be_the_target(images, folder):
    method = build(target=FeatureTarget(f"local-dir:{folder}"))
    before = copy.deepcopy(method.target.state_dict())
    mask = mask_of(method, images)
    prediction, _, hidden = method.predict(images, mask)
    wanted = method.target.encoder(images * method.target.scale + method.target.shift)[:, 1:]
    cosine = F.cosine_similarity(prediction, gather_tokens(wanted, hidden), dim=2)
    step(method, images).backward()
    torch.testing.assert_close(method.logged["train/reconstruction"], (2 - 2 * cosine).mean())
    assert all(torch.equal(value, before[name]) for name, value in method.target.state_dict().items())
    assert "reconstruction" not in method.visualize(images)


# Masks and teacher ---------------------------------------------------------------------------------------------------


def test_half_of_the_hidden_patches_are_those_the_teacher_finds_hardest(images):
    method = build(start=0.5)
    hardest = method.scores(images).topk(6).indices
    assert mask_of(method, images).gather(1, hardest).all()
    step(method, images)
    assert method.logged["health/hard_share"] == 0.5


def test_the_share_of_the_hardest_follows_progress(images, monkeypatch):
    method = build()
    method.masking = HardPatchMasking()
    method.plan = Plan(max_steps=10)
    for finished, share in ((0, 0.0), (5, 3 / 12), (9, 5 / 12)):
        monkeypatch.setattr(HPM, "global_step", finished)
        step(method, images)
        assert method.logged["health/hard_share"].item() == pytest.approx(share)


def test_random_masks_need_no_teacher_in_the_step(images, monkeypatch):
    method = build(start=0.0)
    monkeypatch.setattr(method, "scores", None)
    step(method, images)
    assert set(method.logged) == {
        "train/loss",
        "train/reconstruction",
        "train/difficulty",
        "health/rank_correlation",
    }


def test_the_error_of_hidden_patches_is_compared_with_that_of_random_ones(images):
    method, patches = build(), 16
    scores, error = torch.arange(12.0).expand(4, 12), torch.tensor([1.0] * 6 + [3.0] * 6).expand(4, 12)
    health = method.health(scores, error)  # the six with the highest scores are the chosen ones
    assert health["health/error_over_random"].item() == pytest.approx(2 / (1 + 2 * 6 / patches))
    assert health["health/teacher_rank_correlation"] == 1


def test_the_teacher_looks_at_everything_and_never_trains(images):
    method = build(drop_path_rate=0.5).train()
    assert not any(module.training for module in method.teacher.modules())
    scores = method.scores(images)
    assert not scores.requires_grad
    assert torch.equal(method.scores(images), scores)  # nothing random in it
    method.eval().train()
    assert not any(module.training for module in method.teacher.modules())


def test_the_teacher_starts_as_the_student_and_holds_what_predicts_difficulty(images):
    method = build().eval()
    nothing = torch.zeros(4, 16, dtype=torch.bool)
    sequence = method.fill(method.encoder(images), nothing)
    assert torch.equal(method.scores(images), method.difficulty(sequence).mean(2))
    assert list(method.teacher.module) == ["encoder", "fill", "difficulty"]


def test_given_weights_reach_the_teacher_before_training(images):
    method = build()
    torch.nn.init.normal_(method.encoder.vit.patch_embed.proj.weight)
    method.setup("fit")
    weights = method.teacher.module["encoder"].vit.patch_embed.proj.weight
    assert torch.equal(weights, method.encoder.vit.patch_embed.proj.weight)
    assert weights is not method.encoder.vit.patch_embed.proj.weight


@pytest.mark.parametrize(
    ("epoch", "momentum"), [(0, 0.999), (50, 0.99945), (99, 0.999891), (100, 0.9999), (799, 0.9999)]
)
def test_momentum_rises_with_the_epoch_of_the_step(epoch, momentum):
    method = build()
    method.plan = Plan(max_steps=8000, steps_per_epoch=10.3)
    assert method.momentum(math.ceil(epoch * 10.3)) == pytest.approx(momentum, abs=1e-9)
    assert method.momentum(math.ceil((epoch + 1) * 10.3) - 1) == pytest.approx(momentum, abs=1e-9)


def fit(method, steps, **arguments):
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batches = [([images], torch.zeros(4))] * (steps * trainer.accumulate_grad_batches)
    trainer.fit(method, DataLoader(batches, batch_size=None))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_teacher_moves_once_per_optimizer_step(accumulate):
    method = build()
    del method.log, method.log_dict
    method.plan = Plan(max_steps=4, steps_per_epoch=2, batch_size=25600)
    expected, students = copy.deepcopy(method.teacher.module.state_dict()), []
    student = nn.ModuleDict({name: getattr(method, name) for name in ("encoder", "fill", "difficulty")})
    names = [name for name in expected if expected[name].is_floating_point()]

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if (batch_idx + 1) % accumulate == 0:
                students.append(copy.deepcopy(student.state_dict()))

    fit(method, 4, callbacks=[Watch()], accumulate_grad_batches=accumulate)
    assert len(students) == 4
    for finished, student in enumerate(students):
        decay = 0.999 + 0.0009 * (finished // 2) / 100
        for name in names:
            expected[name] = decay * expected[name] + (1 - decay) * student[name]
    moved = method.teacher.module.state_dict()
    for name in names:
        torch.testing.assert_close(moved[name], expected[name], rtol=1e-5, atol=1e-7)
    assert not torch.equal(students[0]["fill.mask_token"], students[-1]["fill.mask_token"])


def test_gradients_are_clipped_to_a_global_norm():
    method, norms = build(), []
    del method.log, method.log_dict
    method.plan = Plan(max_steps=2)

    class Watch(L.Callback):
        def on_before_zero_grad(self, *_):
            grads = [p.grad for p in method.parameters() if p.grad is not None]
            if grads:
                norms.append(torch.nn.utils.get_total_norm(grads).item())

    fit(method, 2, callbacks=[Watch()], gradient_clip_val=0.1)
    assert norms
    assert norms == pytest.approx([0.1] * len(norms), rel=1e-4)


def test_the_teacher_is_in_the_checkpoint_and_in_no_optimizer_group():
    method = build()
    assert "teacher.module.encoder.vit.cls_token" in method.state_dict()
    grouped = {id(p) for group in method.configure_optimizers().param_groups for p in group["params"]}
    assert not any(id(p) in grouped for p in method.teacher.parameters())


def test_the_student_is_what_is_measured_and_exported():
    method = build()
    assert method.evaluated is method.encoder
    assert method.backbone is method.encoder.vit


# Pictures and settings -----------------------------------------------------------------------------------------------


def test_pictures_show_what_is_hidden_its_reconstruction_and_two_maps(images):
    method = build().eval()
    pictures = method.visualize(images)
    assert list(pictures) == ["hidden", "reconstruction", "difficulty", "error"]
    mask = method.draw_mask(RowGenerator.for_rows(0, 0, 4), method.scores(images))
    grey = patchify(pictures["hidden"], 8).eq(0).all(2)
    assert torch.equal(grey, mask)
    assert torch.equal(patchify(pictures["reconstruction"], 8)[~mask], patchify(images, 8)[~mask])
    assert torch.equal(pictures["difficulty"].flatten(1), method.scores(images))
    assert pictures["error"].shape == (4, 4, 4)
    torch.rand(3)
    assert all(torch.equal(picture, pictures[name]) for name, picture in method.visualize(images).items())


def test_the_error_map_shows_the_true_error_of_a_patch(images):
    method = build().eval()
    method.reconstruction = Oracle(torch.zeros(4, 16, 192))
    expected = patchify(images, 8).square().mean(2).view(4, 4, 4)
    torch.testing.assert_close(method.visualize(images)["error"], expected)


def test_a_policy_without_a_common_count_is_refused_by_its_type():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Method, "model")
    with pytest.raises(Exception, match="HardPatchMasking"):
        parser.parse_object({"model": settings({"class_path": "mim.masking.BlockMasking"})})
    assert BlockMasking().visible_count(16) is None


def settings(masking):
    return {
        "class_path": "HPM",
        "init_args": {
            "encoder": {"model": "test_vit", "img_size": [32, 64], "patch_size": 8, "positions": "sincos"},
            "masking": masking,
            "target": {"class_path": "PixelTarget", "init_args": {"standardise": True}},
            "difficulty": {"loss": "absolute", "units": 1, "momentum": [0.9, 0.99]},
            "decoder_width": 16,
            "decoder_heads": 2,
            "decoder_depth": 1,
        },
    }


def test_a_config_file_builds_hpm():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Method, "model")
    masking = {"class_path": "HardPatchMasking", "init_args": {"ratio": 0.5, "end": 1.0, "stairs": 7}}
    method = parser.instantiate(parser.parse_object({"model": settings(masking)})).model
    assert isinstance(method, HPM)
    assert method.masking.stairs == 7
    assert method.settings == DifficultyConfig("absolute", 1, (0.9, 0.99))
    assert method.target.standardise
