import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mim.benchmark import training
from mim.benchmark.plain import PLAIN_LOSSES
from mim.benchmark.training import Contender, MatrixPeak, Timing, compare, ratios
from mim.cli import main
from mim.commands import benchmark
from mim.encoder import Encoder
from mim.errors import UserError
from mim.masking import HardPatchMasking, RandomMasking
from mim.methods import HPM, MAE, Method, OptimConfig
from mim.methods.hpm import DifficultyConfig
from mim.options.recipes import CONFIGS
from mim.targets import PixelTarget

TINY = Path(__file__).parents[1] / "tiny.yaml"


def build(standardise=True, **kwargs):
    torch.manual_seed(0)
    kwargs = {"embed_dim": 16, "depth": 2, "num_heads": 2} | kwargs
    encoder = Encoder("vit_tiny_patch16_224", 32, 8, positions="sincos", kwargs=kwargs)
    return MAE(encoder, RandomMasking(), PixelTarget(standardise), 16, 2, 2)


def rotary(make):
    """Positions that each block turns in its own way, and those that all share."""

    def build(standardise=True, model="vit_small_patch16_dinov3"):
        torch.manual_seed(0)
        encoder = Encoder(model, 32, 8, kwargs={"embed_dim": 16, "depth": 2, "num_heads": 2})
        for parameter in encoder.parameters():
            nn.init.normal_(parameter, std=0.2)
        encoder.pretrained = True
        return make(encoder, standardise)

    return build


ROTARY = {
    "mae": rotary(lambda encoder, standardise: MAE(encoder, RandomMasking(), PixelTarget(standardise), 16, 2, 2)),
    "hpm": rotary(
        lambda encoder, standardise: HPM(
            encoder, HardPatchMasking(start=0.34), PixelTarget(standardise), DifficultyConfig(units=8), 16, 2, 2
        )
    ),
}


@pytest.mark.parametrize("method", ROTARY)
@pytest.mark.parametrize("model", ["vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"])
def test_the_plain_formulation_turns_visible_patches_alike(batch, method, model):
    ours, other = ROTARY[method](model=model), ROTARY[method](model=model)
    plain = Contender.plain(other, batch, "32-true")
    assert not other.encoder.vit.blocks[0].attn.fused_attn
    loss, plain_loss = Contender("ours", ours, batch, "32-true").loss(ours, batch), plain.loss(other, batch)
    torch.testing.assert_close(plain_loss, loss, rtol=1e-5, atol=1e-6)


def build_hpm(standardise=True, **kwargs):
    """A third of the hidden patches are the hardest from the first step on."""
    torch.manual_seed(0)
    kwargs = {"embed_dim": 16, "depth": 2, "num_heads": 2} | kwargs
    encoder = Encoder("vit_tiny_patch16_224", 32, 8, positions="sincos", kwargs=kwargs)
    return HPM(encoder, HardPatchMasking(start=0.34), PixelTarget(standardise), DifficultyConfig(units=8), 16, 2, 2)


@pytest.fixture
def batch():
    return [torch.randn(4, 3, 32, 32)], torch.zeros(4)


class Product(Method):
    """One matrix product whose arithmetic is known."""

    def __init__(self):
        super().__init__(Encoder("test_vit", 32), RandomMasking(), OptimConfig())
        self.map = nn.Linear(64, 32, bias=False)

    def training_step(self, batch, batch_idx):
        return self.map(batch[0][0].flatten(1)[:, :64]).sum()


@pytest.mark.parametrize("build", [build, build_hpm])
@pytest.mark.parametrize("standardise", [True, False])
@pytest.mark.parametrize("kwargs", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}])
def test_the_plain_formulation_computes_the_same_loss_and_gradients(batch, build, standardise, kwargs):
    ours, other = build(standardise, **kwargs), build(standardise, **kwargs)
    plain = Contender.plain(other, batch, "32-true")
    loss, plain_loss = Contender("ours", ours, batch, "32-true").loss(ours, batch), plain.loss(other, batch)
    torch.testing.assert_close(plain_loss, loss, rtol=1e-5, atol=1e-6)
    loss.backward()
    plain_loss.backward()
    for (name, parameter), twin in zip(ours.named_parameters(), other.parameters(), strict=True):
        if parameter.requires_grad:
            torch.testing.assert_close(twin.grad, parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_a_step_of_either_formulation_leads_to_the_same_weights(batch):
    ours, plain = Contender("ours", build(), batch, "32-true"), Contender.plain(build(), batch, "32-true")
    before = copy.deepcopy(ours.method.state_dict())
    ours.step()
    plain.step()
    after, other = ours.method.state_dict(), plain.method.state_dict()
    weight = "decoder.trunk.predict.weight"
    assert not torch.equal(after[weight], before[weight])
    torch.testing.assert_close(other[weight], after[weight], rtol=1e-3, atol=1e-6)


def test_what_a_method_does_after_the_optimizer_belongs_to_the_step(batch):
    contender = Contender("ours", build_hpm(), batch, "32-true")
    before = copy.deepcopy(contender.method.teacher.module.state_dict())
    contender.step()
    weight = "difficulty.predict.weight"
    assert not torch.equal(contender.method.teacher.module.state_dict()[weight], before[weight])


def test_the_method_of_a_step_keeps_fused_attention_while_the_plain_one_has_none(batch):
    ours, plain = Contender("ours", build(), batch, "32-true"), Contender.plain(build(), batch, "32-true")
    fused = [{block.attn.fused_attn for block in c.method.encoder.vit.blocks} for c in (ours, plain)]
    assert fused == [{True}, {False}]


def test_a_multiply_add_counts_as_two_operations():
    images = torch.randn(5, 3, 32, 32)
    contender = Contender("product", Product(), ([images], torch.zeros(5)), "32-true")
    forward = 2 * 5 * 64 * 32
    assert contender.flops() == 2 * forward  # forward and the gradient of the weight; pixels need none


def test_attention_is_counted_although_it_is_fused(monkeypatch):
    def attend(self, batch, batch_idx):
        tokens = self.map(batch[0][0].flatten(1)[:, :64]).view(5, 1, 8, 4)
        return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens).sum()

    contender = Contender("product", Product(), ([torch.randn(5, 3, 32, 32)], torch.zeros(5)), "32-true")
    alone = contender.flops()
    monkeypatch.setattr(Product, "training_step", attend)
    two_products = 2 * (2 * 5 * 8 * 8 * 4)
    assert contender.flops() - alone == 3 * two_products  # one forward, two backward


def test_step_memory_holds_at_least_the_gradients(batch):
    contender = Contender("ours", build(), batch, "32-true")
    contender.step()
    gradients = sum(4 * p.numel() for p in contender.method.parameters() if p.requires_grad)
    assert gradients < contender.memory() < 100 * gradients


def test_twice_the_images_need_more_memory():
    memory = []
    for size in (8, 64):
        contender = Contender("ours", build(), ([torch.randn(size, 3, 32, 32)], torch.zeros(size)), "32-true")
        contender.step()
        memory.append(contender.memory())
    assert memory[1] > 2 * memory[0]


def test_contenders_take_turns():
    turns = []

    class Turn:
        def __init__(self, name):
            self.name = name

        def step(self):
            turns.append(self.name)
            return Timing(1, 2, 3, 4)

    timings = compare([Turn("A"), Turn("B")], rounds=2, between=lambda: turns.append("|"))
    assert "".join(turns) == "AABB" + "AB|AB|"
    assert [len(taken) for taken in timings] == [2, 2]


def test_the_ratio_is_a_median_over_turns():
    first = [Timing(1, 0, 0, 1), Timing(1, 0, 0, 1), Timing(8, 0, 0, 1)]
    second = [Timing(2, 0, 0, 3), Timing(3, 0, 0, 3), Timing(8, 0, 0, 3)]
    assert ratios(first, second) == {"median": 2, "fastest": 2, "processor": 3}


def test_the_peak_keeps_the_best_rate_it_has_seen():
    peak = MatrixPeak(torch.device("cpu"), "32-true", tokens=16, dim=16)
    peak.shapes = [(64, 64, 64)]
    peak.measure()
    peak.rate, peak.shape = 1e30, (1, 1, 1)
    peak.measure()
    assert (peak.rate, peak.shape) == (1e30, (1, 1, 1))


def test_the_command_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(MatrixPeak, "measure", lambda self: setattr(self, "rate", 1e9))
    monkeypatch.setattr(training, "WORKERS", (0,))
    file = tmp_path / "speed" / "mae.json"
    options = {"batch_size": 2, "rounds": 2, "data": "shapes", "num_workers": 0}
    benchmark.run(TINY, against="plain", device="cpu", json=file, **options)
    results, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert [step["name"] for step in results["steps"]] == ["tests/tiny", "plain"]
    assert len(results["steps"][0]["timings"]) == 2
    assert f"median {results['ratio']['median']:.2f}" in printed
    assert f"together {results['loader']['together']:.1f} img/s" in printed
    assert list(results["loader"]["milliseconds"]) == ["decode", "crop", "collate", "transfer and normalise"]
    assert f"decode {results['loader']['milliseconds']['decode']:.2f}, crop" in printed
    assert results["loader"]["decode_bound"] == 1000 / results["loader"]["milliseconds"]["decode"]
    assert f"workers: 0 {results['loader']['by_workers']['0']:.0f}; a core that only decodes: " in printed


def test_two_recipes_can_be_compared(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(MatrixPeak, "measure", lambda self: setattr(self, "rate", 1e9))
    deeper = tmp_path / "deeper.yaml"
    deeper.write_text(TINY.read_text().replace("decoder_depth: 1", "decoder_depth: 3"))
    file = tmp_path / "both.json"
    benchmark.run(TINY, against=str(deeper), batch_size=2, rounds=1, device="cpu", json=file)
    first, second = (step["flop"] for step in json.loads(file.read_text())["steps"])
    assert second > first
    assert "tests/tiny over" in capsys.readouterr().out


def test_a_method_without_a_plain_formulation_is_refused(monkeypatch, capsys):
    monkeypatch.delitem(PLAIN_LOSSES, MAE)
    assert main("benchmark", ["--config", str(TINY), "--against", "plain", "--device", "cpu"]) == 2
    assert "MAE has no plain formulation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "foreign"),
    [
        ("benchmark", ["reduction", "shares", "weights", "masks", "finetuned", "out"]),
        ("benchmark_reduction", ["against", "compile", "data", "num_workers", "weights", "masks", "finetuned", "out"]),
        ("pareto", ["against", "compile", "precision", "json", "finetuned"]),
        (
            "pareto_finetuned",
            ["reduction", "shares", "weights", "data", "masks", "model", "img_size", "precision", "json"],
        ),
    ],
)
def test_an_option_of_another_measurement_is_refused_instead_of_ignored(command, foreign, capsys):
    own = {"pareto": ["--weights=test_vit"], "pareto_finetuned": ["--finetuned=runs"]}.get(command, [])
    for option in foreign:
        assert main(command, [*own, f"--{option}=1"]) == 2
        assert f"there is no option --{option}" in capsys.readouterr().err


def test_a_recipe_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="no such file, nor a recipe"):
        benchmark.run(Path("nothing.yaml"), device="cpu")


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("mae/vit_*_224.yaml")), ids=lambda path: path.stem)
def test_published_recipes_parse(config):
    parsed = benchmark._parse(config, {})
    assert parsed.model.init_args.encoder.model == config.stem
    assert parsed.data.batch_size == 4096


def test_help_does_not_wait_for_torch():
    code = "import sys, mim.commands.benchmark; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
