"""What holds for every ViT with rotary positions, with random weights."""

import pytest
import torch
from torch import nn

from mim.encoder import Encoder
from mim.patches import gather_tokens, patchify, unpatchify
from mim.reduction import KeepRate, PerBlock, RandomScore, TokenReducedViT, ToMe, TopKPruning

CUT = {"depth": 2}
SMALL = CUT | {"embed_dim": 64, "num_heads": 4}
SAPIENS = {"depth": 2, "embed_dim": 64, "num_heads": 4, "num_kv_heads": (4, 2)}  # grouped queries in the second block
MODELS = {
    "vit_small_patch16_dinov3": CUT,
    "vit_small_patch16_dinov3_qkvb": SMALL,
    "vit_small_plus_patch16_dinov3": SMALL,
    "eva_giant_patch14_224": SMALL,  # no rotary positions at all
    "eva02_tiny_patch14_224": CUT,
    "eva02_base_patch16_clip_224": SMALL,
    "eva02_enormous_patch14_clip_224": SMALL,  # norms behind attention and MLP
    "vit_small_patch16_rope_224": SMALL,
    "vit_small_patch16_rope_ape_224": SMALL,
    "vit_small_patch16_rope_mixed_224": SMALL,
    "vit_small_patch16_rope_mixed_ape_224": SMALL,
    "vit_base_patch16_rope_reg1_gap_256": SMALL,  # no class token
    "vit_pe_core_tiny_patch16_384": CUT,
    "vit_pe_spatial_tiny_patch16_512": CUT,
    "vit_small_patch16_lingbot": SMALL,
    "vit_base_patch16_sapiens2": SAPIENS,
    "vit_small_patch16_rope_224, three axes": SMALL
    | {"rope_type": "mrope", "rope_mrope_section": (2, 3, 3), "rope_grid_indexing": "ij"},
}
CLASS_TOKEN = [name for name in MODELS if "gap" not in name]
TURNED = [name for name in MODELS if not name.startswith("eva_giant")]


def build(name, **changes):
    settings = {"img_size": 40, "patch_size": 8, "kwargs": MODELS[name]} | changes
    encoder = Encoder(name.partition(",")[0], **settings)
    for parameter in encoder.parameters():  # large enough for every part of it to matter
        nn.init.normal_(parameter, std=0.25)
    return encoder.eval()


@pytest.fixture(scope="module")
def built():
    torch.manual_seed(0)
    return {}


@pytest.fixture
def encoder_of(built):
    """Encoders by name, each built once: untouched by those who ask for them."""

    def get(name):
        if name not in built:
            built[name] = build(name)
        return built[name]

    return get


def images_for(encoder, count=3, size=(40, 40)):
    return torch.randn(count, 3, *size, dtype=next(encoder.parameters()).dtype)


def mask_for(visible, count=3, patches=25):
    order = torch.rand(count, patches).argsort(1)
    return torch.ones(count, patches, dtype=torch.bool).scatter(1, order[:, :visible], False)


def masked_attention(encoder, images, mask):
    """What timm's blocks make of all patches if nobody may look at the hidden ones: ``(B, P + K, D)``."""
    vit, prefix = encoder.vit, encoder.num_prefix
    x, rope = vit._pos_embed(vit.patch_embed(images))
    x = vit.norm_pre(x)
    alive = nn.functional.pad(~mask, (prefix, 0), value=True)
    bias = torch.zeros(alive.shape, dtype=x.dtype).masked_fill(~alive, -torch.inf)[:, None, None]
    for layer, block in enumerate(vit.blocks):
        x = block(x, rope=rope[layer] if vit.rope_mixed else rope, attn_mask=bias)
    return vit.norm(x)[alive].view(len(images), -1, x.shape[2])


@pytest.mark.parametrize("name", MODELS)
def test_without_a_mask_it_is_timm_to_the_bit(encoder_of, name):
    encoder = encoder_of(name)
    images = images_for(encoder)
    assert torch.equal(encoder(images), encoder.vit.forward_features(images))


@pytest.mark.parametrize("name", MODELS)
def test_visible_patches_alone_are_all_patches_under_masked_attention(name):
    encoder = build(name).double()
    images, mask = images_for(encoder), mask_for(visible=9)
    latent = encoder(images, mask)
    assert latent.shape == (3, encoder.num_prefix + 9, encoder.dim)
    torch.testing.assert_close(latent, masked_attention(encoder, images, mask), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_hidden_pixels_leave_the_output_identical(encoder_of, name):
    encoder = encoder_of(name)
    images, mask = images_for(encoder), mask_for(visible=9)
    area = mask[..., None].expand(-1, -1, 8 * 8 * 3).contiguous()
    repainted = torch.where(unpatchify(area, (5, 5), 8), images + 1, images)
    assert torch.equal(encoder(repainted, mask), encoder(images, mask))


@pytest.mark.parametrize("name", [name for name in CLASS_TOKEN if name in TURNED])
def test_shuffled_patches_move_the_class_token(encoder_of, name):
    encoder = encoder_of(name)
    images = images_for(encoder)
    patches = patchify(images, 8)
    shuffled = unpatchify(patches[:, torch.randperm(25)].contiguous(), (5, 5), 8)
    straight, other = (encoder(batch)[:, 0] for batch in (images, shuffled))
    assert ((straight - other).norm() / straight.norm()).item() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_mask_tokens_stand_where_hidden_patches_were(encoder_of, name):
    encoder = encoder_of(name)
    images, mask, token = images_for(encoder), mask_for(visible=9), torch.randn(1, 1, encoder.dim)
    vit = encoder.vit
    embedded = vit.patch_embed(images)
    replaced = torch.where(mask.view(*embedded.shape[:-1], 1), token, embedded)
    x, rope = vit._pos_embed(replaced)
    x = vit.norm_pre(x)
    for layer, block in enumerate(vit.blocks):
        x = block(x, rope=rope[layer] if vit.rope_mixed else rope)
    assert torch.equal(encoder(images, mask, token), vit.norm(x))


@pytest.mark.parametrize("name", MODELS)
def test_dropping_beside_a_mask_token_is_hiding_without_one_or_replacing_alone(encoder_of, name):
    encoder = encoder_of(name)
    images, mask, token = images_for(encoder), mask_for(visible=9), torch.randn(1, 1, encoder.dim)
    for dropped, without in ((mask, encoder(images, mask)), (torch.zeros_like(mask), encoder(images, mask, token))):
        own = encoder(images, mask, token, dropped=dropped)
        torch.testing.assert_close(own, without, rtol=1e-5, atol=1e-4)  # patches of a matrix, not of a convolution


@pytest.mark.parametrize("name", CLASS_TOKEN)
def test_class_attention_is_that_of_timms_unfused_path(name):
    encoder = build(name)
    if not encoder.has_class_attention:
        with pytest.raises(ValueError, match="no class token whose attention could be read"):
            encoder.forward_with_attention(images_for(encoder))
        return
    images, attn, seen = images_for(encoder), encoder.vit.blocks[-1].attn, []
    tokens, attention = encoder.forward_with_attention(images)
    assert torch.equal(tokens, encoder.vit.forward_features(images))
    attn.fused_attn = False
    attn.attn_drop.register_forward_hook(lambda _, __, output: seen.append(output))
    encoder.vit.forward_features(images)
    torch.testing.assert_close(attention, seen[0].mean(1)[:, 0, encoder.num_prefix :])
    torch.testing.assert_close(encoder.head_attention(images), seen[0][:, :, 0, encoder.num_prefix :])


def test_only_norms_behind_the_attention_and_missing_class_tokens_hide_it(encoder_of):
    hidden = [name for name in MODELS if not encoder_of(name).has_class_attention]
    assert hidden == ["eva02_enormous_patch14_clip_224", "vit_base_patch16_rope_reg1_gap_256"]


@pytest.mark.parametrize("name", MODELS)
def test_another_image_size_changes_no_parameter_and_is_timms(name):
    torch.manual_seed(3)
    encoder = build(name, dynamic_img_size=True)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    small = images_for(encoder, size=(24, 32))
    expected = encoder.vit.forward_features(small)
    assert torch.equal(encoder(small), expected)
    nothing = torch.zeros(3, 12, dtype=torch.bool)
    torch.testing.assert_close(encoder(small, nothing), expected, rtol=1e-4, atol=2e-5)
    assert encoder.feature_map(small).shape == (3, encoder.dim, 3, 4)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_every_trainable_parameter_gets_a_gradient(name):
    encoder = build(name).train()
    encoder(images_for(encoder), mask_for(visible=9)).square().sum().backward()
    silent = [key for key, p in encoder.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"])
def test_checkpointing_changes_neither_output_nor_gradient(name):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        encoder = build(name, grad_checkpointing=checkpointing).train()
        images, mask = images_for(encoder), mask_for(visible=9)
        encoder(images, mask).square().mean().backward()
        gradients.append({key: p.grad for key, p in encoder.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradient, gradients[1][key]) for key, gradient in gradients[0].items())


def test_training_and_evaluation_see_the_same_positions_where_timm_would_move_them():
    encoder = build("vit_base_patch16_sapiens2")
    images = images_for(encoder)
    assert torch.equal(encoder.train()(images), encoder.eval()(images))


def test_probes_leave_nothing_behind_that_training_cannot_use():
    encoder = build("vit_small_patch16_dinov3").train()
    with torch.inference_mode():
        encoder(images_for(encoder))
    encoder(images_for(encoder)).square().mean().backward()
    assert encoder.vit.blocks[0].attn.qkv.weight.grad.any()


def test_rotary_positions_stay_in_full_precision_under_autocast(monkeypatch):
    encoder = build("vit_small_patch16_dinov3")
    seen = []
    block = encoder.vit.blocks[0]
    block.register_forward_pre_hook(lambda _, inputs, kwargs: seen.append(kwargs["rope"].dtype), with_kwargs=True)
    with torch.autocast("cpu", torch.bfloat16):
        encoder(images_for(encoder), mask_for(visible=9))
    assert seen == [torch.float32]


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"])
def test_a_reduction_of_all_patches_is_that_of_the_wrapper(name):
    encoder = build(name)
    images = images_for(encoder)
    encoder.reduction = ToMe(PerBlock(4))
    wrapper = TokenReducedViT(encoder.vit, encoder.reduction)
    assert torch.equal(encoder(images), wrapper.forward_features(images))
    assert torch.equal(encoder.feature_map(images), wrapper.forward_dense(images))


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"])
def test_a_reduction_of_visible_patches_turns_each_by_its_place_in_the_image(name):
    encoder = build(name).double()
    images, mask = images_for(encoder), mask_for(visible=9)
    whole = encoder(images, mask)
    encoder.reduction = TopKPruning(KeepRate(1.0), RandomScore())
    torch.testing.assert_close(encoder(images, mask), whole, rtol=0, atol=1e-9)
    encoder.reduction = Picked(KeepRate(0.5, at=[0]), place="after")
    reduced = encoder(images, mask)
    places = (~mask).nonzero()[:, 1].view(3, 9)  # patch behind every visible token
    x = after_first_block(encoder, images, mask)
    kept = torch.cat([x[:, : encoder.num_prefix], x[:, encoder.num_prefix :][:, 4:]], dim=1)
    table = encoder._rotary((5, 5))
    table = table[1] if table.ndim == 4 else table[None]  # (heads or 1, N, 2d)
    expected = encoder.vit.norm(encoder.vit.blocks[1](kept, rope=table[:, places[:, 4:]].transpose(0, 1)))
    torch.testing.assert_close(reduced, expected, rtol=0, atol=1e-9)


class Picked(TopKPruning):
    """Keeps the last tokens."""

    def __init__(self, schedule, place):
        super().__init__(schedule, RandomScore(), place=place)

    def reduce(self, tokens, attending, count, layer):
        order = torch.arange(tokens.count).expand(len(tokens.x), -1)
        return tokens.keep(order[:, tokens.count - count :], order[:, : tokens.count - count])


def after_first_block(encoder, images, mask):
    start = encoder._start(images, mask)
    return encoder.vit.blocks[0](start.x, **start.inputs(0))


def test_sine_cosine_positions_replace_a_learned_table_and_are_not_put_beside_rotary_ones():
    assert build("vit_small_patch16_dinov3", positions="sincos").vit.pos_embed is None
    assert not Encoder("eva02_tiny_patch14_224", 28, kwargs=CUT, positions="sincos").vit.pos_embed.requires_grad


def test_any_size_may_be_left_to_the_model():
    assert build("vit_small_patch16_dinov3", dynamic_img_size=None).any_size
    assert not build("vit_small_patch16_dinov3").any_size
    assert not build("eva02_tiny_patch14_224", dynamic_img_size=None).any_size


def test_blocks_see_the_prefix_and_the_visible_patches_only():
    encoder = build("vit_small_patch16_dinov3")
    lengths = []
    encoder.vit.blocks[0].register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    encoder(images_for(encoder), mask_for(visible=2))
    assert lengths == [5 + 2]


def test_images_of_a_batch_do_not_interact():
    encoder = build("vit_small_patch16_rope_mixed_224")
    images, mask = images_for(encoder, count=4), mask_for(visible=9, count=4)  # as many as there are heads
    rolled = encoder(images.roll(1, 0), mask.roll(1, 0)).roll(-1, 0)
    torch.testing.assert_close(rolled, encoder(images, mask), rtol=1e-5, atol=1e-5)


def test_gathered_tokens_are_those_of_the_whole_patch_embedding():
    encoder = build("vit_pe_core_tiny_patch16_384")  # no bias in its patch embedding
    images, mask = images_for(encoder), mask_for(visible=9)
    places = (~mask).nonzero()[:, 1].view(3, 9)
    expected = gather_tokens(encoder.vit.patch_embed(images), places)
    torch.testing.assert_close(encoder._project_visible(images, places), expected, rtol=1e-5, atol=1e-5)
