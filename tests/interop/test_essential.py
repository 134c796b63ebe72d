"""Tensors that every feature depends on match, are converted as timm converts them, or the load is an error.

Every pair of models over channels, grids, registers and class token: what was trained on one side, what is built on
the other. None may end with a random patch kernel, position or token and exit status 0.
"""

from itertools import product
from typing import NamedTuple

import pytest
import timm
import torch
from tiers import fast
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import adapt_input_conv
from timm.models.vision_transformer import checkpoint_filter_fn

from mim.errors import UserError
from mim.run.weights import init_backbone, load_encoder, untrained_encoder


class Kind(NamedTuple):
    channels: int
    grid: tuple[int, int]
    registers: int
    class_token: bool

    def build(self, depth=1):
        pooling = {"global_pool": "token" if self.class_token else "avg", "fc_norm": False}
        kwargs = {"class_token": self.class_token, **pooling}
        size = tuple(16 * side for side in self.grid)
        kwargs |= {"in_chans": self.channels, "reg_tokens": self.registers, "img_size": size, "depth": depth}
        return timm.create_model("test_vit", num_classes=0, **kwargs)

    def shapes(self):
        prefix = self.class_token + self.registers
        found = {"patch_embed.proj.weight": (64, self.channels, 16, 16)}
        found["pos_embed"] = (1, prefix + self.grid[0] * self.grid[1], 64)
        found |= {"cls_token": (1, 1, 64)} if self.class_token else {}
        return found | ({"reg_token": (1, self.registers, 64)} if self.registers else {})


KINDS = [Kind(*values) for values in product((1, 3, 4, 13), ((4, 4), (2, 4)), (0, 4), (True, False))]


def by(shape):
    return "x".join(map(str, shape))


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {kind: kind.build() for kind in KINDS}


def converted(state, kind, target):
    """What timm's own functions make of ``state`` for ``target``; None if they make nothing of it."""
    if (kind.registers, kind.class_token) != (target.registers, target.class_token):
        return None
    if kind.channels not in (3, target.channels) or (kind.grid != target.grid and kind.grid != (4, 4)):
        return None
    state = dict(state)
    if kind.channels != target.channels:
        state["patch_embed.proj.weight"] = adapt_input_conv(target.channels, state["patch_embed.proj.weight"])
    prefix = kind.registers + kind.class_token
    state["pos_embed"] = resample_abs_pos_embed(
        state["pos_embed"], list(target.grid), list(kind.grid), num_prefix_tokens=prefix
    )
    return state


@pytest.mark.parametrize("kind", fast(KINDS, KINDS[::5]), ids=str)
def test_init_converts_as_timm_does_or_names_both_shapes(kind, models, tmp_path):
    torch.save({"model": models[kind].state_dict()}, tmp_path / "x.pth")
    for target in KINDS:
        vit, expected = models[target], converted(models[kind].state_dict(), kind, target)
        before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
        if expected is None:
            with pytest.raises(UserError) as refused:
                init_backbone(vit, str(tmp_path / "x.pth"))
            different(kind, target, str(refused.value))
            expected = before
        else:
            assert "not in it" not in init_backbone(vit, str(tmp_path / "x.pth"))
        assert all(torch.equal(tensor, expected[name]) for name, tensor in vit.state_dict().items())
        vit.load_state_dict(before)


def different(kind, target, text):
    """Every essential tensor that cannot be had is named with both shapes."""
    there, here = kind.shapes(), target.shapes()
    for name in there.keys() | here.keys():
        if name == "patch_embed.proj.weight" and kind.channels in (3, target.channels):
            continue  # is converted
        if name == "pos_embed" and kind.grid == (4, 4) and len(there) == len(here):
            continue
        if there.get(name) != here.get(name):
            shapes = [by(shapes[name]) if name in shapes else "missing" for shapes in (there, here)]
            assert f"{name} is {shapes[0]} there, {shapes[1]} here" in text
    assert "not in it" not in text


@pytest.mark.parametrize("kind", fast(KINDS, KINDS[1::5]), ids=str)
def test_evaluations_of_a_file_take_channels_and_tokens_from_it(kind, tmp_path):
    vit = kind.build(depth=6).eval()
    torch.save({"model": vit.state_dict()}, tmp_path / "x.pth")
    size = tuple(16 * side for side in kind.grid)
    loaded = load_encoder(str(tmp_path / "x.pth"), model="test_vit", img_size=size)
    images = torch.rand(2, kind.channels, *size)
    assert torch.equal(loaded.encoder(images), vit.forward_features(images))
    assert len(loaded.mean) == len(loaded.std) == kind.channels


def test_the_untrained_encoder_beside_a_file_has_its_channels_and_tokens(tmp_path):
    torch.save(Kind(13, (2, 4), 4, False).build(depth=6).state_dict(), tmp_path / "x.pth")
    encoder = untrained_encoder(str(tmp_path / "x.pth"), 0, model="test_vit", img_size=(32, 64))
    assert encoder(torch.rand(2, 13, 32, 64)).shape == (2, 4 + 8, 64)


def test_positions_that_are_no_square_name_the_sizes_that_they_may_be_of(tmp_path):
    kind = Kind(3, (2, 4), 0, True)
    torch.save({"model": kind.build(depth=6).state_dict()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="pos_embed is 1x9x64 there, 1x101x64 here") as refused:
        load_encoder(str(tmp_path / "x.pth"), model="test_vit", img_size=160)
    assert refused.value.hint == "--img_size [32,64]   or   --img_size [64,32]"
    assert load_encoder(str(tmp_path / "x.pth"), model="test_vit", img_size=(32, 64)).encoder.grid == (2, 4)


def test_positions_of_the_models_proportions_are_no_square(tmp_path):
    torch.save({"model": Kind(3, (2, 4), 0, True).build().state_dict()}, tmp_path / "x.pth")
    assert init_backbone(Kind(3, (4, 8), 0, True).build(), str(tmp_path / "x.pth")).endswith("resized 2x4 -> 4x8")


def dinov2(registers, grid=(3, 3)):
    """As DINOv2 publishes its weights: positions of class token and patches, none of registers."""
    state = Kind(3, grid, 0, True).build().state_dict()
    state = {name: torch.randn_like(tensor) for name, tensor in state.items()}
    tokens = {"register_tokens": torch.randn(1, registers, 64)} if registers else {}
    return state | tokens | {"mask_token": torch.zeros(1, 64)}


@pytest.mark.parametrize("grid", [(3, 3), (4, 4), (2, 4)])
@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_files_give_what_timms_own_loader_gives(registers, grid, tmp_path):
    state = dinov2(registers)
    torch.save(state, tmp_path / "x.pth")
    size = tuple(16 * side for side in grid)
    kwargs = {"img_size": size, "depth": 1, "num_classes": 0}
    kwargs |= {"reg_tokens": registers, "no_embed_class": True} if registers else {}
    ours, timms = (timm.create_model("test_vit", **kwargs) for _ in range(2))
    timms.load_state_dict(checkpoint_filter_fn(dict(state), timms))
    init_backbone(ours, str(tmp_path / "x.pth"))
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in timms.state_dict().items())


def test_an_evaluation_finds_out_that_registers_have_no_positions(tmp_path):
    vit = timm.create_model("test_vit", img_size=48, num_classes=0, reg_tokens=4, no_embed_class=True).eval()
    tensors = {name: torch.randn_like(tensor) for name, tensor in vit.state_dict().items()}
    tensors["cls_token"], position = tensors["cls_token"].bfloat16().float(), torch.randn(1, 1, 64).bfloat16().float()
    vit.load_state_dict(tensors)  # a sum of numbers of 8 bits is exact
    tensors["register_tokens"] = tensors.pop("reg_token")
    tensors["pos_embed"] = torch.cat([position, tensors["pos_embed"]], dim=1)
    tensors["cls_token"] = tensors["cls_token"] - tensors["pos_embed"][:, :1]
    torch.save(tensors, tmp_path / "x.pth")
    loaded = load_encoder(str(tmp_path / "x.pth"), model="test_vit", img_size=48)
    images = torch.rand(1, 3, 48, 48)
    torch.testing.assert_close(loaded.encoder(images), vit.forward_features(images))
    assert "positions of cls_token added to them" in loaded.note


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        (Kind(13, (4, 4), 0, True), "--in_chans 13"),
        (Kind(3, (4, 4), 4, True), """--model.init_args.encoder.kwargs '{"reg_tokens": 4}'"""),
        (
            Kind(1, (4, 4), 0, False),
            "--in_chans 1 --model.init_args.encoder.kwargs "
            """'{"class_token": false, "global_pool": "avg", "fc_norm": false}'""",
        ),
    ],
)
def test_the_hint_builds_the_model_that_the_file_was_made_for(kind, hint, models, tmp_path):
    torch.save(models[kind].state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError) as refused:
        init_backbone(models[Kind(3, (4, 4), 0, True)], str(tmp_path / "x.pth"))
    assert refused.value.hint == hint
