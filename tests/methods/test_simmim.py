import pytest
import torch
from torch import nn

from mim.encoder import Encoder
from mim.masking import AttentionMasking, BlockMasking, GridMasking, RandomMasking, RectangleMasking
from mim.methods import HPM, MAE, SimMIM
from mim.patches import patchify, unpatchify
from mim.targets import HOGTarget, PixelTarget

KWARGS = {"embed_dim": 16, "depth": 2, "num_heads": 2}
DINOV3 = "vit_small_patch16_dinov3"


def build(masking=None, target=None, model="vit_tiny_patch16_224", **encoder):
    arguments = {"img_size": 32, "patch_size": 8, "kwargs": KWARGS} | encoder
    method = SimMIM(Encoder(model, **arguments), masking or GridMasking(0.6, None), target)
    method.log = lambda *_, **__: None
    return method


def step(method, images, valid=None):
    return method.training_step(([images], torch.zeros(len(images)), *([[valid]] if valid is not None else [])), 0)


def mask_of(method, images):
    """The mask that ``step`` draws."""
    return method.draw_mask(method.row_generator(len(images), 0))


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32)


@pytest.mark.parametrize(
    "settings",
    [{}, {"img_size": (16, 32)}, {"in_chans": 5}, {"model": DINOV3}, {"masking": RectangleMasking(0.6)}],
    ids=str,
)
def test_the_loss_equals_a_slow_loop(settings):
    method = build(**settings)
    images = torch.randn(3, method.encoder.in_chans, *method.encoder.img_size)
    mask = mask_of(method, images)
    tokens = method.encoder(images, mask, method.mask_token)
    patches, total = patchify(images, 8), 0.0
    for image, patch in mask.nonzero().tolist():
        prediction = method.predict(tokens[image, method.encoder.num_prefix + patch])
        total += (prediction - patches[image, patch]).abs().mean().item()
    assert step(method, images).item() == pytest.approx(total / mask.sum().item(), rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"model": DINOV3}, {"target": HOGTarget()}], ids=["plain", "rotary", "hog"])
def test_every_trainable_parameter_gets_a_gradient(images, settings):
    method = build(**settings)
    step(method, images).backward()
    silent = [name for name, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", DINOV3])
def test_hidden_pixels_do_not_move_any_prediction(images, model):
    method = build(model=model).eval()
    mask = mask_of(method, images)
    area = unpatchify(mask[..., None].expand(-1, -1, 192).contiguous(), (4, 4), 8)
    repainted = torch.where(area, images + 1, images)
    assert torch.equal(method.reconstruct(repainted, mask)[0], method.reconstruct(images, mask)[0])
    assert not torch.equal(method.reconstruct(images + 1, mask)[0], method.reconstruct(images, mask)[0])


def test_thirty_of_49_squares_are_hidden_at_224_px_whatever_the_patch_size():
    for patch in (8, 16, 32):
        method = build(img_size=224, patch_size=patch)
        mask = mask_of(method, torch.zeros(1, 3, 224, 224))
        pixels = unpatchify(
            mask[..., None].expand(-1, -1, patch**2).contiguous().float(), (224 // patch,) * 2, patch, 1
        )
        squares = patchify(pixels, 32).mean(-1)
        assert squares.unique().tolist() == [0, 1]
        assert squares.sum() == 30


def test_masks_are_a_function_of_seed_step_and_row(images, monkeypatch):
    method = build(RandomMasking(0.6))
    masks = [mask_of(method, images)]
    assert torch.equal(mask_of(method, images[:2]), masks[0][:2])
    monkeypatch.setattr(SimMIM, "global_step", 1)
    masks.append(mask_of(method, images))
    monkeypatch.setattr(method, "first_row", lambda *_: len(images))
    masks.append(mask_of(method, images))
    assert len(torch.cat(masks).unique(dim=0)) == 3 * len(images)


def test_what_was_not_measured_moves_the_loss_through_what_is_seen_alone(images):
    method, valid = build(), torch.ones(4, 1, 32, 32, dtype=torch.bool)
    valid[:2, :, :10] = False
    method.reconstruct = lambda images, mask: (torch.ones(4, 10, 192), torch.arange(10).expand(4, -1))
    losses = [step(method, torch.where(valid, images, number), valid) for number in (0.0, 5.0)]
    assert torch.equal(*losses)
    error = (1 - images).abs() * valid
    rows = [patchify(error, 8)[i, n].sum() / patchify(valid.float(), 8)[i, n].sum() / 3 for i, n in counted(valid)]
    torch.testing.assert_close(losses[0], torch.stack(rows).mean())


def counted(valid):
    """Image and patch of the first ten patches that are measured for the most part."""
    share = patchify(valid.float(), 8).mean(-1)
    return [(i, n) for i in range(len(valid)) for n in range(10) if share[i, n] >= 0.5]


def test_a_step_reads_nothing_back_from_the_device(images):
    method = build().to("meta")
    step(method, images.to("meta")).backward()
    assert method.encoder.vit.patch_embed.proj.weight.grad is not None


def test_pictures_show_true_pixels_where_visible_and_predictions_where_hidden(images):
    method = build().eval()
    pictures = method.visualize(images)
    grey = patchify(pictures["hidden"], 8).eq(0).all(2)
    assert grey.sum(1).tolist() == [10] * 4
    kept, shown = patchify(images, 8), patchify(pictures["reconstruction"], 8)
    assert torch.equal(shown[~grey], kept[~grey])
    torch.testing.assert_close(shown[grey].view(4, 10, -1), method.reconstruct(images, grey)[0])
    assert torch.equal(method.visualize(images)["hidden"], pictures["hidden"])


def test_edges_may_be_predicted_and_are_drawn(images):
    assert list(build(target=HOGTarget()).visualize(images)) == ["hidden", "edges", "imagined edges"]


@pytest.mark.parametrize("masking", [BlockMasking(), AttentionMasking()])
def test_a_policy_that_hides_unequally_or_by_scores_is_refused(masking):
    with pytest.raises(ValueError, match="simmim needs a policy that hides equally many patches, unguided"):
        build(masking)


def test_an_image_of_fewer_than_four_squares_is_refused():
    with pytest.raises(ValueError, match="fewer than 4"):
        build(img_size=(8, 24))


@pytest.mark.parametrize("method", [MAE, HPM, SimMIM])
def test_histograms_are_a_target_like_any_other(method, images):
    settings = {} if method is SimMIM else {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    masking = {HPM: "HardPatchMasking"}.get(method, "RandomMasking")
    policy = getattr(__import__("mim.masking", fromlist=["x"]), masking)(0.5)
    built = method(Encoder("vit_tiny_patch16_224", 32, 8, kwargs=KWARGS), policy, HOGTarget(), **settings)
    built.log = built.log_dict = lambda *_, **__: None
    step(built, images).backward()
    assert built.encoder.vit.patch_embed.proj.weight.grad.any()


def test_pixels_and_their_absolute_error_are_predicted_if_nothing_else_is_asked_for():
    target = build().target
    assert isinstance(target, PixelTarget)
    assert (target.standardise, target.distance) == (False, "absolute")
    assert isinstance(build().predict, nn.Linear)
