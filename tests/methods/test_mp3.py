import math

import pytest
import torch
from timm.layers.hybrid_embed import HybridEmbed
from torch import nn
from torch.nn import functional as F

from mim.encoder import Encoder
from mim.errors import UserError
from mim.masking import BlockMasking, GridMasking, RandomMasking
from mim.methods import MP3
from mim.methods.mp3 import PositionConfig, health, looking_at
from mim.patches import patchify, unpatchify

PLAIN = {"pos_embed": "none", "class_token": False, "global_pool": "avg"}
KWARGS = {"embed_dim": 16, "depth": 2, "num_heads": 2, **PLAIN}


def build(positions=None, masking=None, kwargs=None, **encoder):
    arguments = {"img_size": 32, "patch_size": 8, "kwargs": KWARGS | (kwargs or {})} | encoder
    method = MP3(
        Encoder("vit_tiny_patch16_224", **arguments), masking or RandomMasking(0.5), positions or PositionConfig()
    )
    method.log = method.log_dict = lambda *_, **__: None
    return method


def step(method, images, valid=None):
    return method.training_step(([images], torch.zeros(len(images)), *([[valid]] if valid is not None else [])), 0)


def mask_of(method, images):
    """The mask that ``step`` draws."""
    return method.draw_mask(method.row_generator(len(images), 0))


def logits_of(method, images, mask):
    return method.predict(method.encode(images, mask))


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32)


def masked_tokens(method, images, mask):
    """timm's own blocks with a mask of their attention."""
    vit = method.encoder.vit
    bias = torch.zeros(mask.shape).masked_fill(mask, -math.inf)[:, None, None].expand(-1, 1, mask.shape[1], -1)
    tokens = vit.patch_embed(images)
    for block in vit.blocks:
        tokens = block(tokens, attn_mask=bias)
    return vit.norm(tokens)


@pytest.mark.parametrize(
    "settings", [{}, {"img_size": (16, 32)}, {"in_chans": 5}, {"masking": GridMasking(0.5)}], ids=str
)
def test_the_loss_equals_a_slow_loop_over_timms_masked_blocks(settings):
    method = build(**settings)
    images = torch.randn(3, method.encoder.in_chans, *method.encoder.img_size)
    logits, total = method.predict(masked_tokens(method, images, mask_of(method, images))), 0.0
    for image in logits:
        for place, row in enumerate(image):
            total += (row.logsumexp(0) - row[place]).item()
    assert step(method, images).item() == pytest.approx(total / logits.shape[0] / logits.shape[1], rel=1e-5)


@pytest.mark.parametrize(
    "kwargs", [{"qk_norm": True}, {"init_values": 0.1}, {"qkv_bias": False}, {"pre_norm": True}], ids=str
)
def test_every_kind_of_block_looks_at_the_context_as_with_a_mask(images, kwargs):
    method = build(kwargs=kwargs).eval()
    mask = mask_of(method, images)
    tokens = method.encoder.vit.norm_pre(method.encoder.vit.patch_embed(images))
    for block in method.encoder.vit.blocks:
        bias = torch.zeros(4, 1, 16, 16).masked_fill(mask[:, None, None], -math.inf)
        context = (~mask).nonzero()[:, 1].view(4, 8)
        torch.testing.assert_close(
            looking_at(block, tokens, context), block(tokens, attn_mask=bias), atol=1e-5, rtol=1e-4
        )
        tokens = block(tokens)


@pytest.mark.parametrize("positions", [PositionConfig(), PositionConfig(1.0, 0.1)], ids=["plain", "smooth"])
def test_every_trainable_parameter_gets_a_gradient(images, positions):
    method = build(positions)
    step(method, images).backward()
    silent = [name for name, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []


def test_moved_patches_take_their_logits_along(images):
    method, order = build().eval(), torch.randperm(16)
    mask = mask_of(method, images)
    moved = unpatchify(patchify(images, 8)[:, order].contiguous(), (4, 4), 8)
    torch.testing.assert_close(logits_of(method, moved, mask[:, order]), logits_of(method, images, mask)[:, order])


def test_a_patch_that_is_not_looked_at_changes_its_own_logits_only(images):
    method = build().eval()
    mask = mask_of(method, images)
    hidden = int(mask[0].nonzero()[0])
    area = unpatchify((torch.arange(16) == hidden)[None, :, None].expand(1, -1, 192).contiguous(), (4, 4), 8)
    one, other = (logits_of(method, torch.where(area, images + shift, images)[:1], mask[:1])[0] for shift in (0, 1))
    changed = [place for place in range(16) if not torch.allclose(one[place], other[place])]
    assert changed == [hidden]


def test_at_first_the_loss_is_that_of_a_guess():
    method = build(kwargs={"embed_dim": 64})
    assert step(method, torch.randn(16, 3, 32, 32)).item() == pytest.approx(math.log(16), abs=0.5)


def test_images_of_one_colour_cannot_be_placed():
    method = build()
    images = torch.randn(3, 3, 1, 1).expand(-1, -1, 32, 32)
    logits = logits_of(method, images, mask_of(method, images))
    torch.testing.assert_close(logits, logits[:, :1].expand_as(logits))
    assert step(method, images) >= math.log(16) - 1e-5


def test_with_nothing_hidden_it_is_ordinary_attention(images):
    method = build(masking=RandomMasking(0.0)).eval()
    torch.testing.assert_close(
        method.encode(images, mask_of(method, images)), method.encoder(images), atol=1e-5, rtol=1e-4
    )


def test_labels_are_smooth_at_first_and_plain_at_the_end(monkeypatch):
    method = build(PositionConfig(smoothing=1.0))
    places = [(row, column) for row in range(4) for column in range(4)]
    expected = [[math.exp(-((a - c) ** 2) - (b - d) ** 2) for c, d in places] for a, b in places]
    expected = torch.tensor(expected) / torch.tensor(expected).sum(1, keepdim=True)
    torch.testing.assert_close(method.labels(), expected)
    monkeypatch.setattr(MP3, "progress", 1.0)
    assert torch.equal(method.labels(), torch.eye(16))
    monkeypatch.setattr(MP3, "progress", 0.999999)
    torch.testing.assert_close(method.labels(), torch.eye(16))


def test_the_loss_with_smooth_labels_and_weights_equals_a_slow_loop(images):
    method = build(PositionConfig(smoothing=1.0, temperature=0.1))
    tokens = method.encode(images, mask_of(method, images))
    labels, total = method.labels(), 0.0
    for image in tokens:
        likeness = torch.stack([F.cosine_similarity(token, image.mean(0), dim=0) for token in image])
        for place, weight in enumerate((likeness / 0.1).softmax(0)):
            total += (weight * -(labels[place] * method.predict(image[place]).log_softmax(0)).sum()).item()
    assert step(method, images).item() == pytest.approx(total / 4, rel=1e-5)


def test_a_patch_that_was_not_measured_is_not_asked_for_its_place(images):
    method, valid = build(), torch.ones(4, 1, 32, 32, dtype=torch.bool)
    valid[0, :, :5, :8] = False
    error = F.cross_entropy(
        logits_of(method, images, mask_of(method, images)).flatten(0, 1), torch.arange(16).repeat(4), reduction="none"
    )
    torch.testing.assert_close(step(method, images, valid), error[1:].mean())


def test_masks_are_a_function_of_seed_step_and_row(images, monkeypatch):
    method = build()
    whole = mask_of(method, images)
    monkeypatch.setattr(method, "first_row", lambda *_: 2)
    assert torch.equal(mask_of(method, images[2:]), whole[2:])
    monkeypatch.setattr(MP3, "global_step", 1)
    assert not torch.equal(mask_of(method, images[2:]), whole[2:])


def test_recomputed_blocks_give_the_same_gradient(images):
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        method = build(grad_checkpointing=recompute)
        step(method, images).backward()
        found.append(method.encoder.vit.patch_embed.proj.weight.grad)
    torch.testing.assert_close(*found)


def test_a_step_reads_nothing_back_from_the_device(images):
    method = build(PositionConfig(1.0, 0.1)).to("meta")
    step(method, images.to("meta")).backward()
    assert method.encoder.vit.patch_embed.proj.weight.grad is not None


def test_pictures_show_the_context_arrows_and_distances(images):
    method = build().eval()
    with torch.no_grad():
        method.predict.weight.zero_()
        method.predict.bias.copy_(torch.arange(16) == 5)  # everything is believed to be at row 1, column 1
    pictures = method.visualize(images)
    assert list(pictures) == ["hidden", "position", "distance"]
    assert patchify(pictures["hidden"], 8).eq(0).all(2).sum(1).tolist() == [8] * 4
    assert pictures["distance"][0, 1, 1] == 0
    torch.testing.assert_close(pictures["distance"][0, 3, 2], torch.tensor(5.0).sqrt())


def test_health_counts_what_is_placed_right_at_the_border_and_everywhere():
    logits = torch.eye(16)[None].clone()
    logits[0, 5] = logits[0, 6]  # one of the four in the middle is off by one
    places = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    values = health(logits, places, (4, 4))
    assert values["health/placed"] == 15 / 16
    assert values["health/placed_at_border"] == 1
    assert values["health/distance"] == 1 / 16


@pytest.mark.parametrize(
    ("model", "kwargs", "what"),
    [
        ("vit_small_patch16_dinov3", {}, "rotary positions"),
        ("vit_tiny_patch16_224", {}, "positions added to its patches"),
        ("vit_tiny_patch16_224", {"pos_embed": "none"}, "tokens beside its patches"),
        ("vit_tiny_patch16_224", PLAIN | {"reg_tokens": 2}, "tokens beside its patches"),
    ],
)
def test_an_encoder_in_which_positions_show_is_refused_by_name(model, kwargs, what):
    encoder = Encoder(model, 32, 8, kwargs={"embed_dim": 16, "depth": 1, "num_heads": 2} | kwargs)
    with pytest.raises(UserError, match=what) as mistake:
        MP3(encoder, RandomMasking(0.5))
    assert "pos_embed: none" in mistake.value.hint


def test_a_stem_that_looks_beyond_patches_is_refused_by_name():
    encoder = build().encoder
    encoder.vit.patch_embed = HybridEmbed(nn.Conv2d(3, 8, 7, 8, 3), img_size=32, patch_size=1, in_chans=3, embed_dim=16)
    with pytest.raises(UserError, match=r"a stem that looks beyond patches \(HybridEmbed\)"):
        MP3(encoder, RandomMasking(0.5))


def test_fixed_positions_are_refused_as_well():
    with pytest.raises(UserError, match="positions added"):
        MP3(Encoder("vit_tiny_patch16_224", 32, 8, positions="sincos", kwargs=KWARGS), RandomMasking(0.5))


def test_a_policy_that_hides_unequally_is_refused():
    with pytest.raises(ValueError, match="mp3 needs a policy that hides equally many patches"):
        build(masking=BlockMasking())
