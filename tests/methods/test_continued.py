"""Going on from good weights: heads first, layer decay, anchors; the same for every method."""

import copy

import lightning as L
import pytest
import torch
from test_rotary_vits import METHODS, MIXED, Save, batches, fit
from tiers import fast
from torch.utils.data import DataLoader

from mim.encoder import Encoder
from mim.layers.anchor import AnchorConfig
from mim.masking import RandomMasking
from mim.methods import MAE, OptimConfig, Plan
from mim.targets import PixelTarget

STEPS, HELD = 4, 2
ANCHORS = AnchorConfig(weights=0.1, gram=1.0, features=0.5)


def build(name, monkeypatch, seed=0, **settings):
    optim = {"blr": 0.1, "warmup_epochs": 0.5, "head_warmup": HELD / STEPS, "layer_decay": 0.5} | settings
    monkeypatch.setattr("test_rotary_vits.OPTIM", OptimConfig(**optim))
    torch.manual_seed(seed)
    method = METHODS[name](MIXED)
    # of this seed TokenUnify draws each of its tasks within the four steps
    method.plan = Plan(max_steps=STEPS, steps_per_epoch=2, batch_size=4, seed=2)
    return method


class Watch(L.Callback):
    """The encoder's weights, and whether gradients reached it, after each step."""

    def __init__(self):
        self.weights, self.reached = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.reached.append(any(p.grad is not None for p in pl_module.encoder.parameters()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append(copy.deepcopy(pl_module.encoder.state_dict()))


@pytest.mark.parametrize("name", METHODS)
def test_the_encoder_stands_still_for_its_share_of_the_steps_and_all_else_learns(name, monkeypatch):
    method, watch = build(name, monkeypatch), Watch()
    before = copy.deepcopy(method.state_dict())
    fit(method, callbacks=[watch])
    first = {key: value for key, value in before.items() if key.startswith("encoder.")}
    for step in range(HELD):
        assert all(torch.equal(value, first[f"encoder.{key}"]) for key, value in watch.weights[step].items())
    moved = [key for key, value in watch.weights[-1].items() if not torch.equal(value, first[f"encoder.{key}"])]
    assert "vit.blocks.0.attn.qkv.weight" in moved
    assert watch.reached == [False] * HELD + [True] * (STEPS - HELD)
    rest = {key for key, p in method.named_parameters() if p.requires_grad and not key.startswith("encoder.")}
    still = [key for key in rest if torch.equal(method.state_dict()[key], before[key])]
    assert still == []


@pytest.mark.parametrize("name", fast(METHODS, ("mae", "ibot")))
def test_an_anchored_run_goes_on_bit_exactly_whether_the_encoder_stood_still_or_not(name, tmp_path, monkeypatch):
    for saved in (HELD - 1, HELD + 1):
        monkeypatch.setattr("test_rotary_vits.SAVED", saved)
        whole = fit(build(name, monkeypatch, anchor=ANCHORS), callbacks=[Save(tmp_path / f"{saved}.ckpt")])
        again = build(name, monkeypatch, seed=5, anchor=ANCHORS)
        resumed = fit(again, saved, checkpoint=tmp_path / f"{saved}.ckpt")
        assert len(whole) == len(resumed)
        assert all(torch.equal(*pair) for pair in zip(whole, resumed, strict=True))


def mae(**optim):
    torch.manual_seed(0)
    encoder = Encoder("vit_tiny_patch16_224", 32, 8, kwargs={"depth": 3, "embed_dim": 16, "num_heads": 2})
    method = MAE(encoder, RandomMasking(), PixelTarget(), 16, 1, 2, optim=OptimConfig(**optim))
    method.plan = Plan(max_steps=20, steps_per_epoch=2, batch_size=256)
    method.log = lambda *_, **__: None
    return method


def scales(method):
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    return {
        names[id(parameter)]: (group.get("lr_scale", 1.0), group["weight_decay"])
        for group in method.configure_optimizers().param_groups
        for parameter in group["params"]
    }


def test_rates_fall_from_the_heads_down_to_the_embedding_and_decay_is_that_of_other_runs():
    method, plain = scales(mae(layer_decay=0.5)), scales(mae())
    assert method.keys() == plain.keys()
    assert {name: decay for name, (_, decay) in method.items()} == {name: decay for name, (_, decay) in plain.items()}
    assert method["decoder.trunk.predict.weight"] == (1.0, 0.05)
    assert method["encoder.vit.norm.weight"] == (0.5, 0.0)
    assert method["encoder.vit.blocks.2.attn.qkv.weight"] == (0.5, 0.05)
    assert method["encoder.vit.blocks.0.attn.qkv.weight"] == (0.5**3, 0.05)
    assert method["encoder.vit.patch_embed.proj.weight"] == (0.5**4, 0.05)


def test_the_encoders_rate_rises_from_zero_when_it_begins_to_learn():
    method = mae(head_warmup=0.1, warmup_epochs=2.0)
    assert method.held_steps == 2
    assert [method.encoder_share(step) for step in (0, 1, 2, 3, 5, 19)] == [0, 0, 0.25, 0.5, 1, 1]
    assert mae().encoder_share(0) == 1


def test_an_anchored_loss_is_the_same_at_the_start_and_pulls_back_later():
    method, images = mae(anchor=AnchorConfig(weights=2.0)), torch.randn(2, 3, 32, 32)
    method.setup("fit")
    assert method.anchored(torch.tensor(1.0), images) == 1
    weight = method.encoder.vit.blocks[0].mlp.fc1.weight
    with torch.no_grad():
        weight[0, 0] += 3.0
    loss = method.anchored(torch.tensor(1.0), images)
    loss.backward()
    assert loss.item() == pytest.approx(1 + 2 * 0.5 * 9, rel=1e-5)
    assert weight.grad[0, 0].item() == pytest.approx(2 * 3, rel=1e-5)
    assert weight.grad.abs().sum().item() == pytest.approx(6, rel=1e-5)


@pytest.mark.parametrize("term", ["gram", "features"])
def test_features_are_anchored_to_those_of_the_start(term):
    method, images = mae(anchor=AnchorConfig(**{term: 1.0})), torch.randn(2, 3, 32, 32)
    method.setup("fit")
    assert method.anchored(torch.tensor(1.0), images).item() == pytest.approx(1, abs=1e-5)
    torch.nn.init.normal_(method.encoder.vit.blocks[0].mlp.fc1.weight)
    loss = method.anchored(torch.tensor(1.0), images)
    assert loss > 1.0001
    loss.backward()
    assert method.encoder.vit.blocks[0].mlp.fc1.weight.grad.any()
    assert all(parameter.grad is None for parameter in method.start.parameters())


def test_without_an_anchor_the_loss_is_untouched_and_no_copy_is_kept():
    method = mae()
    loss = torch.tensor(1.0)
    assert method.anchored(loss, torch.zeros(1)) is loss
    assert method.start is None
    assert not any(name.startswith("start") for name in method.state_dict())


def test_the_start_never_learns_or_trains():
    method = mae(anchor=AnchorConfig(weights=1.0)).train()
    assert not method.start.training
    assert not any(parameter.requires_grad for parameter in method.start.parameters())
    assert not any(name.startswith("start") for name in scales(method))


def test_a_run_that_ends_while_the_encoder_stands_still_leaves_it_as_it_was(monkeypatch):
    method = build("mae", monkeypatch, head_warmup=0.99)
    before = copy.deepcopy(method.encoder.state_dict())
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(accelerator="cpu", max_steps=2, max_epochs=-1, **quiet)
    trainer.fit(method, DataLoader(batches(method), batch_size=None))
    assert all(torch.equal(value, before[key]) for key, value in method.encoder.state_dict().items())
