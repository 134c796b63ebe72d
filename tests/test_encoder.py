import pytest
import timm
import torch
from torch import nn

from mim.encoder import Encoder
from mim.errors import UserError
from mim.layers.positions import sincos_positions
from mim.patches import gather_tokens, unpatchify, visible_indices
from mim.reduction import ClassAttention, KeepRate, PerBlock, TokenReducedViT, ToMe, TopKPruning

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2}
VARIANTS = {
    "plain": ("vit_tiny_patch16_224", {}, {}),
    "no class token": ("vit_tiny_patch16_224", {}, {"class_token": False, "global_pool": "avg"}),
    "registers": ("vit_tiny_patch16_224", {}, {"reg_tokens": 3}),
    "registers without positions": ("vit_tiny_patch16_224", {}, {"reg_tokens": 3, "no_embed_class": True}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}, {}),
    "CLIP": ("vit_base_patch16_clip_224", {}, {}),
    "DeiT III": ("deit3_small_patch16_224", {}, {}),
    "SigLIP": ("vit_base_patch16_siglip_224", {}, {}),
    "normalised keys": ("vit_tiny_patch16_224", {}, {"qk_norm": True}),
    "normalised patches": ("vit_tiny_patch16_224", {}, {"embed_norm_layer": "layernorm"}),
    "no positions": ("vit_tiny_patch16_224", {}, {"pos_embed": "none"}),
    "sine-cosine": ("vit_tiny_patch16_224", {"positions": "sincos"}, {}),
    "sine-cosine without class row": ("deit3_small_patch16_224", {"positions": "sincos"}, {}),
    "dynamic size": ("vit_tiny_patch16_224", {"dynamic_img_size": True}, {"reg_tokens": 1}),
    "dynamic distilled": ("deit_tiny_distilled_patch16_224", {"dynamic_img_size": True}, {}),
    "wide": ("vit_tiny_patch16_224", {"img_size": (16, 32)}, {}),
    "one channel": ("vit_tiny_patch16_224", {"in_chans": 1}, {}),
    "six channels": ("vit_tiny_patch16_224", {"in_chans": 6}, {}),
    "test_vit": ("test_vit", {}, None),
}


def build(variant, **changes):
    model, arguments, kwargs = VARIANTS[variant]
    kwargs = None if kwargs is None else TINY | kwargs
    encoder = Encoder(model, **{"img_size": 24, "patch_size": 8, "kwargs": kwargs, **arguments, **changes})
    for parameter in encoder.parameters():  # timm draws class tokens so small that forgetting one would pass
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return encoder.eval()


def images_for(encoder, count=3):
    return torch.randn(count, encoder.in_chans, *encoder.img_size)


def mask_for(encoder, visible, count=3):
    patches = encoder.grid[0] * encoder.grid[1]
    order = torch.rand(count, patches).argsort(1)
    return torch.ones(count, patches, dtype=torch.bool).scatter(1, order[:, :visible], False)


def repaint(encoder, images, where):
    """Other pixels in the patches where ``where (B, N)`` is True."""
    height, width = encoder.patch_size
    area = where[..., None].expand(-1, -1, height * width * encoder.in_chans).contiguous()
    return torch.where(unpatchify(area, encoder.grid, encoder.patch_size, encoder.in_chans), images + 1, images)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def built(variant):
    torch.manual_seed(0)
    return build(variant)


@pytest.fixture
def encoder(built):
    built.zero_grad()
    return built.eval()


def test_without_a_mask_it_is_timm(encoder):
    images = images_for(encoder)
    assert torch.equal(encoder(images), encoder.vit.forward_features(images))


def test_masked_equals_embedding_everything_and_dropping(encoder):
    images, mask = images_for(encoder), mask_for(encoder, visible=3)
    vit, prefix = encoder.vit, encoder.num_prefix
    tokens = vit._pos_embed(vit.patch_embed(images))
    kept = torch.cat([tokens[:, :prefix], gather_tokens(tokens[:, prefix:], visible_indices(mask))], dim=1)
    expected = vit.norm(vit.blocks(vit.norm_pre(kept)))
    latent = encoder(images, mask)
    assert latent.shape == (3, prefix + 3, encoder.dim)
    torch.testing.assert_close(latent, expected, rtol=1e-5, atol=2e-5)


def test_hidden_pixels_leave_the_output_identical_and_visible_ones_do_not(encoder):
    images, mask = images_for(encoder), mask_for(encoder, visible=3)
    latent = encoder(images, mask)
    assert torch.equal(encoder(repaint(encoder, images, mask), mask), latent)
    assert not torch.allclose(encoder(repaint(encoder, images, ~mask), mask), latent)


def test_mask_token_replaces_hidden_patches_before_positions(encoder):
    images, mask, token = images_for(encoder), mask_for(encoder, visible=3), torch.randn(1, 1, encoder.dim)
    vit = encoder.vit
    patches = vit.patch_embed(images)
    flat = patches.view(3, -1, encoder.dim).clone()
    for image, patch in mask.nonzero().tolist():
        flat[image, patch] = token
    expected = vit.norm(vit.blocks(vit.norm_pre(vit._pos_embed(flat.view_as(patches)))))
    assert torch.equal(encoder(images, mask, token), expected)


def test_mask_tokens_stand_where_hidden_patches_are_not_dropped(encoder):
    images, mask, token = images_for(encoder), mask_for(encoder, visible=3), torch.randn(1, 1, encoder.dim)
    vit, prefix, dropped = encoder.vit, encoder.num_prefix, mask & (mask.cumsum(1) > 2)  # all but two of them
    patches = vit.patch_embed(images)
    replaced = torch.where(mask.view(*patches.shape[:-1], 1), token, patches)
    tokens = vit._pos_embed(replaced)
    kept = torch.cat([tokens[:, :prefix], gather_tokens(tokens[:, prefix:], visible_indices(dropped))], dim=1)
    expected = vit.norm(vit.blocks(vit.norm_pre(kept)))
    torch.testing.assert_close(encoder(images, mask, token, dropped=dropped), expected, rtol=1e-5, atol=2e-5)


def test_every_trainable_parameter_gets_a_gradient(encoder):
    encoder.train()
    encoder(images_for(encoder), mask_for(encoder, visible=3)).square().sum().backward()
    silent = [
        name for name, p in encoder.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert silent == []


@pytest.mark.parametrize("name", ["plain", "registers", "distilled", "CLIP", "DeiT III", "normalised keys"])
def test_attention_equals_the_unfused_path_of_timm(name):
    encoder = build(name)
    images, attn = images_for(encoder), encoder.vit.blocks[-1].attn
    tokens, attention = encoder.forward_with_attention(images)
    seen = []
    attn.fused_attn = False
    attn.attn_drop.register_forward_hook(lambda _, __, output: seen.append(output))
    expected = encoder.vit.forward_features(images)
    torch.testing.assert_close(attention, seen[0].mean(1)[:, 0, encoder.num_prefix :])
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=2e-5)


def test_attention_is_to_the_bit_what_masks_of_earlier_versions_followed():
    """Queries and keys of the class token from the weights, as written before attention was read in one place."""
    encoder = build("registers")
    images, block = images_for(encoder), encoder.vit.blocks[-1]
    x = encoder.vit.blocks[0](encoder.vit._pos_embed(encoder.vit.patch_embed(images)))
    attn = block.attn
    qkv = attn.qkv(block.norm1(x)).view(3, x.shape[1], 3, attn.num_heads, attn.head_dim)
    logits = torch.einsum("bhd,bnhd->bhn", qkv[:, 0, 0] * attn.scale, qkv[:, :, 1])
    expected = logits.softmax(dim=-1)[..., encoder.num_prefix :]
    assert torch.equal(encoder.head_attention(images), expected)
    assert torch.equal(encoder.forward_with_attention(images)[1], expected.mean(dim=1))


def test_attention_needs_a_class_token():
    encoder = build("no class token")
    with pytest.raises(ValueError, match="no class token"):
        encoder.forward_with_attention(images_for(encoder))


def test_feature_map_lays_tokens_out_as_the_image_is(encoder):
    images = images_for(encoder)
    features, tokens = encoder.feature_map(images), encoder(images)[:, encoder.num_prefix :]
    height, width = encoder.grid
    assert features.shape == (3, encoder.dim, height, width)
    assert torch.equal(features[1, :, height - 1, 1], tokens[1, (height - 1) * width + 1])


@pytest.mark.parametrize("name", ["dynamic size", "dynamic distilled"])
def test_another_size_equals_timm_masked_or_not(name):
    encoder = build(name)
    images, mask = torch.randn(2, 3, 16, 40), torch.zeros(2, 10, dtype=torch.bool)
    expected = encoder.vit.forward_features(images)
    assert torch.equal(encoder(images), expected)
    torch.testing.assert_close(encoder(images, mask), expected, rtol=1e-5, atol=2e-5)
    assert encoder.feature_map(images).shape == (2, encoder.dim, 2, 5)


def test_a_stem_that_is_no_linear_map_is_embedded_whole_and_dropped():
    encoder = Encoder("vit_tiny_r_s16_p8_224", img_size=64, kwargs=TINY).eval()
    images, nothing = torch.randn(2, 3, 64, 64), torch.zeros(2, 4, dtype=torch.bool)
    assert encoder.grid == (2, 2)
    assert encoder.patch_size == (32, 32)
    torch.testing.assert_close(encoder(images, nothing), encoder.vit.forward_features(images), rtol=1e-5, atol=2e-5)


def test_blocks_see_the_prefix_and_the_visible_patches_only():
    encoder = build("registers")
    lengths = []
    encoder.vit.blocks[0].register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    encoder(images_for(encoder), mask_for(encoder, visible=2))
    assert lengths == [4 + 2]


def test_images_of_a_batch_do_not_interact():
    encoder = build("plain")
    images, mask = images_for(encoder), mask_for(encoder, visible=3)
    rolled = encoder(images.roll(1, 0), mask.roll(1, 0)).roll(-1, 0)
    torch.testing.assert_close(rolled, encoder(images, mask), rtol=1e-6, atol=1e-6)


def test_checkpointing_changes_neither_output_nor_gradient():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        encoder = build("plain", grad_checkpointing=checkpointing).train()
        encoder(images_for(encoder), mask_for(encoder, visible=3)).square().mean().backward()
        gradients.append(encoder.vit.blocks[0].mlp.fc1.weight.grad)
    assert torch.equal(*gradients)


def test_dropout_of_positions_reaches_masked_tokens():
    encoder = Encoder("vit_tiny_patch16_224", 24, 8, kwargs=TINY | {"pos_drop_rate": 0.999})
    encoder.vit.blocks = nn.Sequential()
    encoder.vit.norm = nn.Identity()
    zeros = encoder(images_for(encoder), mask_for(encoder, visible=3)) == 0
    assert zeros.float().mean() > 0.9


def test_the_state_is_that_of_the_timm_model(variant, encoder):
    model, _, kwargs = VARIANTS[variant]
    sizes = {"img_size": encoder.img_size, "patch_size": 8, "in_chans": encoder.in_chans, "num_classes": 0}
    twin = timm.create_model(model, **sizes, **({} if kwargs is None else TINY | kwargs))
    twin.load_state_dict(encoder.vit.state_dict())


def test_sincos_positions_are_the_fixed_table():
    encoder = build("sine-cosine")
    assert torch.equal(encoder.vit.pos_embed, sincos_positions((3, 3), 16, 1))
    assert not encoder.vit.pos_embed.requires_grad


def test_properties_describe_the_vit():
    encoder = Encoder("vit_tiny_patch16_224", img_size=(24, 32), patch_size=8, in_chans=2, kwargs=TINY)
    assert (encoder.dim, encoder.patch_size, encoder.grid, encoder.img_size) == (16, (8, 8), (3, 4), (24, 32))
    assert (encoder.in_chans, encoder.num_prefix) == (2, 1)


def test_the_size_of_the_model_is_the_default():
    assert Encoder("test_vit").img_size == (160, 160)


def lines(error):
    return str(error.value).splitlines()


def test_an_unknown_model_ends_in_suggestions():
    with pytest.raises(UserError) as error:
        Encoder("vit_tinny_patch16_224")
    assert lines(error)[0] == f"error: --model vit_tinny_patch16_224: timm {timm.__version__} has no such model"
    assert "--model vit_tiny_patch16_224" in lines(error)[1]


def test_an_unknown_tag_ends_in_suggestions():
    with pytest.raises(UserError) as error:
        Encoder("vit_base_patch16_224.maee")
    assert "--model vit_base_patch16_224.mae " in lines(error)[1]


@pytest.mark.parametrize("model", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_what_is_neither_a_plain_nor_a_rotary_vit_is_refused(model):
    with pytest.raises(UserError) as error:
        Encoder(model, img_size=64)
    assert lines(error)[0] == f"error: --model {model} is neither a plain nor a rotary ViT, so patches cannot be hidden"
    assert lines(error)[2] == "try:   --model vit_small_patch16_224   or   --model vit_small_patch16_dinov3"


def test_arguments_that_timm_refuses_end_in_its_words():
    with pytest.raises(UserError, match="num_kv_heads sequence must have one entry per block"):
        Encoder("vit_base_patch16_sapiens2", img_size=32, kwargs={"depth": 2})


@pytest.mark.parametrize(
    "argument", [{"rope_shift_coords": 0.5}, {"rope_jitter_coords": 1.5}, {"rope_rescale_coords": 2.0}]
)
def test_rotary_positions_that_move_at_random_are_refused(argument):
    with pytest.raises(UserError, match="would move rotary positions at random"):
        Encoder("vit_small_patch16_dinov3", img_size=32, kwargs={"depth": 1} | argument)


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_registers_are_tokens_that_can_be_asked_for(model):
    encoder = Encoder(model, img_size=32, kwargs={"depth": 1}, registers=7)
    assert encoder.num_prefix == 1 + 7
    assert encoder.vit.reg_token.shape[1] == 7


@pytest.mark.parametrize(
    ("size", "given", "hint"),
    [
        (100, "100", "--img_size 96   or   --img_size 112"),
        (7, "7", "--img_size 16"),
        ((96, 100), "[96,100]", "--img_size 96   or   --img_size [96,112]"),
    ],
)
def test_a_size_that_does_not_divide_names_its_neighbours(size, given, hint):
    with pytest.raises(UserError) as error:
        Encoder("vit_tiny_patch16_224", img_size=size)
    assert lines(error)[0] == f"error: --img_size {given} does not divide by the patch size 16 of vit_tiny_patch16_224"
    assert lines(error)[2] == f"try:   {hint}"


def test_images_of_another_size_are_refused():
    encoder = build("plain")
    with pytest.raises(ValueError, match="16 x 24 pixels, but the encoder was built for 24 x 24"):
        encoder(torch.zeros(1, 3, 16, 24), torch.zeros(1, 6, dtype=torch.bool))


def test_a_mask_of_another_grid_is_refused():
    encoder = build("plain")
    with pytest.raises(ValueError, match=r"mask is \(3, 4\), but there are 3 images of 9 patches"):
        encoder(images_for(encoder), torch.zeros(3, 4, dtype=torch.bool))


def test_rows_that_hide_different_numbers_are_refused_unless_replaced():
    encoder = build("plain")
    images, mask = images_for(encoder), torch.zeros(3, 9, dtype=torch.bool)
    mask[0, 0] = True
    with pytest.raises(ValueError, match="from 0 to 1 patches"):
        encoder(images, mask)
    assert encoder(images, mask, torch.zeros(1, 1, 16)).shape == (3, 10, 16)


def test_a_reduction_shortens_the_sequence_and_the_feature_map_is_whole():
    encoder = build("registers", reduction=TopKPruning(KeepRate(0.5, at=[1]), ClassAttention()))
    images = images_for(encoder)
    wrapper = TokenReducedViT(encoder.vit, encoder.reduction)
    assert encoder(images).shape == (3, 4 + 5, 16)
    assert torch.equal(encoder(images), wrapper.forward_features(images))
    assert torch.equal(encoder.feature_map(images), wrapper.forward_dense(images))


def test_a_reduction_of_nothing_is_timm():
    encoder = build("registers", reduction=ToMe(PerBlock(0)))
    images = images_for(encoder)
    assert torch.equal(encoder(images), encoder.vit.forward_features(images))


def test_hidden_patches_are_dropped_before_the_reduction():
    encoder = build("plain", reduction=ToMe(PerBlock(1)))
    images, mask = images_for(encoder), mask_for(encoder, visible=5)
    latent = encoder(images, mask)
    assert latent.shape == (3, 1 + 5 - 2, 16)
    assert torch.equal(encoder(repaint(encoder, images, mask), mask), latent)


def test_attention_for_pictures_is_read_from_all_patches():
    encoder = build("plain")
    images = images_for(encoder)
    expected = encoder.forward_with_attention(images)
    encoder.reduction = ToMe(PerBlock(2))
    for ours, whole in zip(encoder.forward_with_attention(images), expected, strict=True):
        assert torch.equal(ours, whole)


def test_a_reduction_that_cannot_work_is_refused_when_the_encoder_is_built():
    with pytest.raises(TypeError, match="class token"):
        build("no class token", reduction=TopKPruning(KeepRate(0.5), ClassAttention()))


def test_stretched_positions_equal_timms_at_the_own_size_and_differ_at_another():
    antialiased = Encoder("test_vit", 64, 8, dynamic_img_size=True).eval()
    stretched = Encoder("test_vit", 64, 8, dynamic_img_size=True, resampling="stretched").eval()
    stretched.load_state_dict(antialiased.state_dict())
    large, small = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(stretched(large), antialiased(large))
    assert stretched(small).shape == antialiased(small).shape
    assert not torch.allclose(stretched(small), antialiased(small))
