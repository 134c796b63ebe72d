"""Every method on a ViT with rotary positions: it learns, leaves nothing out, and goes on bit-exactly."""

import copy

import lightning as L
import pytest
import torch
from tiers import fast
from torch.utils.data import DataLoader

from mim.encoder import Encoder
from mim.masking import (
    AttentionMasking,
    BlockMasking,
    GridMasking,
    HardPatchMasking,
    MultiBlockMasking,
    RandomMasking,
    RectangleMasking,
    SampledMasking,
)
from mim.methods import (
    CAPI,
    DTM,
    HPM,
    IBOT,
    IJEPA,
    MAE,
    AdaMAE,
    MaskGIT,
    MomentumMAE,
    OptimConfig,
    Plan,
    SeiT,
    SimMIM,
    TokenUnify,
)
from mim.methods.adamae import SamplerConfig
from mim.methods.capi import ClusterConfig
from mim.methods.hpm import DifficultyConfig
from mim.methods.ibot import HeadConfig, KoLeoConfig, TeacherConfig
from mim.methods.mae import CrossConfig
from mim.pictures.strips import strip
from mim.targets import FeatureTarget, PixelTarget

DINOV3, MIXED = "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"
SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2}
OPTIM = OptimConfig(blr=0.1, warmup_epochs=1)
STEPS, SAVED = 20, 7


def encoder(model=DINOV3, **settings):
    return Encoder(model, 32, 8, kwargs=SMALL, **settings)


def ibot(masking, model=DINOV3):
    head, teacher = HeadConfig(prototypes=16, hidden=16, bottleneck=8), TeacherConfig(warmup_epochs=1)
    return IBOT(encoder(model, dynamic_img_size=True, drop_path_rate=0.2), masking, head, teacher, 0.0, optim=OPTIM)


def dinov2(model=DINOV3):
    head = HeadConfig(prototypes=16, hidden=16, bottleneck=8, shared="nothing")
    teacher = TeacherConfig(warmup_epochs=1, center="sinkhorn")
    koleo = KoLeoConfig(weight=0.1)
    masking = BlockMasking(unmasked_share=0.0)
    return IBOT(encoder(model, dynamic_img_size=True), masking, head, teacher, 0.0, koleo=koleo, optim=OPTIM)


ATTENTION = AttentionMasking(low=0.5, high=0.5, unmasked_share=0.0)
METHODS = {
    "mae": lambda model=DINOV3: MAE(
        encoder(model, positions="sincos"), RandomMasking(), PixelTarget(), 16, 1, 2, OPTIM
    ),
    "momentum_mae": lambda model=DINOV3: MomentumMAE(
        encoder(model), ATTENTION, decoder_width=16, decoder_depth=1, decoder_heads=2, optim=OPTIM
    ),
    "hpm": lambda model=DINOV3: HPM(
        encoder(model), HardPatchMasking(start=0.5), PixelTarget(), DifficultyConfig(units=2), 16, 1, 2, OPTIM
    ),
    "simmim": lambda model=DINOV3: SimMIM(encoder(model), GridMasking(0.6, None), optim=OPTIM),
    "adamae": lambda model=DINOV3: AdaMAE(
        encoder(model), SampledMasking(), None, SamplerConfig(heads=2), 16, 1, 2, OPTIM
    ),
    "crossmae": lambda model=DINOV3: MAE(
        encoder(model), RandomMasking(), None, 16, 2, 2, OPTIM, CrossConfig(predicted=0.5, mixed=2)
    ),
    "ijepa": lambda model=DINOV3: IJEPA(encoder(model), MultiBlockMasking(), 16, 1, 2, stop=0.25, optim=OPTIM),
    "capi": lambda model=DINOV3: CAPI(
        encoder(model), RectangleMasking(), ClusterConfig(count=4, blr=0.1), 16, 1, 2, optim=OPTIM
    ),
    "ibot": lambda model=DINOV3: ibot(BlockMasking(unmasked_share=0.0), model),
    "attmask": lambda model=DINOV3: ibot(ATTENTION, model),
    "dtm": lambda model=DINOV3: DTM(encoder(model), BlockMasking(0.4, 0.4, unmasked_share=0.0), rounds=3, optim=OPTIM),
    "dinov2": lambda model=DINOV3: dinov2(model),
    "maskgit": lambda model=DINOV3: MaskGIT(Encoder(model, 32, 4, kwargs=SMALL), optim=OPTIM),
    "tokenunify": lambda model=DINOV3: TokenUnify(
        encoder(model), RandomMasking(), decoder_width=16, decoder_depth=1, decoder_heads=2, optim=OPTIM
    ),
    "seit": lambda model=DINOV3: SeiT(encoder(model), decoder_width=16, decoder_depth=1, decoder_heads=2, optim=OPTIM),
}


def build(name, model=DINOV3, seed=0):
    torch.manual_seed(seed)
    method = METHODS[name](model)
    method.plan = Plan(max_steps=STEPS, steps_per_epoch=2, batch_size=4)
    return method


def batches(method):
    generator = torch.Generator().manual_seed(1)
    sizes = [32, 32, 16] if isinstance(method, IBOT) else [32]
    views = [torch.randn(4, 3, size, size, generator=generator) for size in sizes]
    return [(views, torch.zeros(4, dtype=torch.long))] * method.plan.max_steps


class Save(L.Callback):
    """Saves once, between two steps."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == SAVED:
            trainer.save_checkpoint(self.path, weights_only=False)


def fit(method, first=0, callbacks=(), checkpoint=None):
    """Trains to the end; returns everything that a checkpoint holds of weights and optimizer."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=method.plan.max_steps, max_epochs=-1, callbacks=list(callbacks), **quiet
    )
    loader = DataLoader(batches(method)[first:], batch_size=None)
    trainer.fit(method, loader, ckpt_path=checkpoint, weights_only=True)
    assert trainer.global_step == method.plan.max_steps
    leaves = torch.utils._pytree.tree_leaves(trainer.optimizers[0].state_dict()["state"])
    return copy.deepcopy([*method.state_dict().values(), *leaves])


@pytest.mark.parametrize("model", fast([DINOV3, MIXED], [DINOV3]))
@pytest.mark.parametrize("name", fast(METHODS, ("mae", "hpm", "ibot")))
def test_it_learns_and_goes_on_bit_exactly(name, model, tmp_path):
    method = build(name, model)
    before = copy.deepcopy(method.encoder.state_dict())
    whole = fit(method, callbacks=[Save(tmp_path / "half.ckpt")])
    assert not any(torch.equal(value, before[key]) for key, value in method.encoder.state_dict().items())
    resumed = fit(build(name, model, seed=5), SAVED, checkpoint=tmp_path / "half.ckpt")
    assert len(whole) == len(resumed)
    assert all(torch.equal(*pair) for pair in zip(whole, resumed, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_learned_frequencies_are_not_decayed(name):
    method = build(name, MIXED)
    decay = {
        id(parameter): group["weight_decay"]
        for group in method.configure_optimizers().param_groups
        for parameter in group["params"]
    }
    assert decay[id(method.encoder.vit.rope.freqs)] == 0
    assert decay[id(method.encoder.vit.blocks[0].attn.qkv.weight)] == 0.05


@pytest.mark.parametrize("name", METHODS)
def test_pictures_can_be_drawn(name):
    method = build(name).eval()
    images = torch.randn(2, 3, 32, 32)
    pictures = method.visualize(images)
    assert "hidden" in pictures
    assert strip(images, pictures, method.evaluated, (0.5,) * 3, (0.25,) * 3).size[1] > 64


@pytest.mark.parametrize("name", ["momentum_mae", "attmask"])
def test_masks_do_not_follow_an_attention_that_cannot_be_read(name):
    with pytest.raises(ValueError, match="masks follow the attention of the class token, which this encoder does not"):
        build(name, "eva02_enormous_patch14_clip_224")


def test_ibot_draws_what_there_is_where_attention_cannot_be_read():
    method = build("ibot", "eva02_enormous_patch14_clip_224").eval()
    images = torch.randn(2, 3, 32, 32)
    assert list(method.visualize(images)) == ["hidden", "clusters"]
    assert strip(images, {}, method.evaluated, (0.5,) * 3, (0.25,) * 3).info["layout"].count("similarity") == 1


def test_features_of_a_rotary_vit_can_be_the_target(tmp_path):
    frozen = FeatureTarget.__new__(FeatureTarget)
    torch.nn.Module.__init__(frozen)
    frozen.encoder, frozen.projection, frozen.distance = encoder().eval(), False, "direction"
    frozen.register_buffer("scale", torch.ones(3, 1, 1))
    frozen.register_buffer("shift", torch.zeros(3, 1, 1))
    places = torch.tensor([[0, 5]])
    images = torch.randn(1, 3, 32, 32)
    expected = torch.nn.functional.normalize(frozen.encoder(images)[:, 5:][:, places[0]], dim=-1)
    torch.testing.assert_close(frozen(images, (4, 4), places), expected)
