"""The main job, driven as a user drives it; methods with a teacher are in ``test_pretrain_teachers.py``."""

import csv
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from strikes import ROOT, checkpoints, differences, final_state, start, wait_for_steps
from torchvision.transforms.v2.functional import to_pil_image

from mim.cli import main
from mim.commands.pretrain import Pretraining
from mim.data.pixels import Pixels
from mim.interop import ModelCard, export_backbone
from mim.options.pretraining import translate
from mim.run.config import parse
from mim.run.weights import load_encoder

pytestmark = pytest.mark.usefixtures("quick_probes")

# Too few images of each class for probes, which would take longer than the run.
TINY = ["--config", str(ROOT / "tests" / "tiny.yaml"), "--probe_images", "40"]


def train(out, *args):
    return main("pretrain", [*TINY, "--out", str(out), *map(str, args)])


def rows(run):
    with Path(run, "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An uninterrupted run."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train(folder) == 0
    return folder


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """A short one with probes."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("probed") / "run"
    assert train(folder, "--epochs", 0.1, "--probe_images", 60) == 0
    return folder


def test_a_run_leaves_everything_it_promises(run):
    names = (
        "config.yaml metrics.csv summary.json report.html command.txt env.txt log.txt tensorboard images checkpoints"
    )
    for name in (*names.split(), "export/backbone/config.json", "export/backbone/model.safetensors"):
        assert (run / name).exists(), name
    assert not (run / "bad_files.txt").exists()
    assert len(list((run / "images").glob("epoch_*.png"))) == 3  # untrained, in between, at the end


def test_the_loss_falls(run):
    history = [float(row["train/loss"]) for row in rows(run) if row["train/loss"]]
    assert len(history) == 24
    assert sum(history[-4:]) < 0.95 * sum(history[:4])


def test_health_is_measured_from_the_untrained_encoder_on(run):
    measured = [row for row in rows(run) if row["val/rankme"]]
    assert [int(row["step"]) for row in measured] == [0, 13, 24]
    assert all(row["val/feature_std"] for row in measured)


def test_probes_are_measured_from_the_untrained_encoder_on(probed):
    measured = [row for row in rows(probed) if row["val/knn_top1"] and row["val/linear_top1"]]
    assert [int(row["step"]) for row in measured] == [0, 6]


def test_the_summary_compares_with_untrained_encoders_over_seeds(probed):
    summary = json.loads((probed / "summary.json").read_text())
    assert summary["status"] == "done"
    assert len(summary["probe"]["linear"]["trained"]) == len(summary["probe"]["linear"]["untrained"]) == 3
    assert summary["steps"] == 6


def test_timm_alone_loads_the_backbone_with_the_trained_weights(run):
    vit = timm.create_model(f"local-dir:{run / 'export' / 'backbone'}", pretrained=True).eval()
    trained = final_state(run)["state_dict"]
    for name, value in vit.state_dict().items():
        assert torch.equal(value, trained[f"encoder.vit.{name}"]), name
    assert vit.pretrained_cfg["input_size"] == (3, 32, 32)


def test_the_saved_config_repeats_the_run(run, tmp_path):
    assert main("pretrain", ["--config", str(run / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert differences(run, tmp_path / "again") == []


def test_a_finished_run_resumes_to_nothing(run, capsys):
    before = final_state(run)["state_dict"]
    assert main("pretrain", ["--resume", str(run)]) == 0
    assert all(torch.equal(value, before[name]) for name, value in final_state(run)["state_dict"].items())


def test_workers_do_not_change_the_weights(run, tmp_path):
    assert train(tmp_path / "run", "--num_workers", 2) == 0
    assert differences(run, tmp_path / "run") == []


@pytest.mark.middle
def test_a_run_that_was_killed_then_stopped_then_resumed_ends_bit_exactly(run, tmp_path):
    out, args = tmp_path / "run", ["--resume", "auto"]
    strikes = [(signal.SIGKILL, -signal.SIGKILL, 6), (signal.SIGTERM, 75, 2), (signal.SIGINT, 75, 1)]
    for workers, (number, status, steps) in zip((0, 2, 0), strikes, strict=True):
        process = start(*TINY, "--out", out, *args, "--num_workers", workers)
        wait_for_steps(process, steps)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == status
    assert json.loads((out / "summary.json").read_text())["status"] == "interrupted"
    assert train(out, *args) == 0
    assert differences(run, out) == []


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(run, out, symlinks=True)
    newest = checkpoints(out)[-1]
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    assert main("pretrain", ["--resume", str(out)]) == 0
    assert f"{newest} is damaged" in capsys.readouterr().out
    assert differences(run, out) == []


def losses(run):
    return torch.tensor([float(row["train/loss"]) for row in rows(run) if row["train/loss"]])


def exported_input(run):
    return json.loads((run / "export" / "backbone" / "config.json").read_text())["pretrained_cfg"]["input_size"]


def test_bf16_trains_on_nearly_the_same_losses_and_says_so(probed, tmp_path):
    assert train(tmp_path / "run", "--epochs", 0.1, "--precision", "bf16-mixed") == 0
    assert ", bf16-mixed, " in (tmp_path / "run" / "log.txt").read_text()
    assert not torch.equal(losses(tmp_path / "run"), losses(probed))
    torch.testing.assert_close(losses(tmp_path / "run"), losses(probed), rtol=0.01, atol=0)


def test_gradient_checkpointing_changes_no_loss(probed, tmp_path):
    assert train(tmp_path / "run", "--epochs", 0.1, "--model.init_args.encoder.grad_checkpointing", "true") == 0
    assert torch.equal(losses(tmp_path / "run"), losses(probed))


def test_a_clipped_gradient_leads_to_other_losses(probed, tmp_path):
    assert train(tmp_path / "run", "--epochs", 0.1, "--trainer.gradient_clip_val", "1e-8") == 0
    clipped, free = losses(tmp_path / "run"), losses(probed)
    assert torch.equal(clipped[:1], free[:1])  # before the first step that moves anything
    assert not torch.equal(clipped, free)


def test_the_pool_that_probes_measure_is_in_their_protocol(tmp_path):
    assert train(tmp_path / "run", "--epochs", 0.1, "--probe_images", 60, "--pool", "cls") == 0
    assert "class token" in json.loads((tmp_path / "run" / "summary.json").read_text())["probe"]["protocol"]


def test_images_of_one_channel_train_a_backbone_of_one_channel(tmp_path):
    from mim.commands.make_shapes import run as make_shapes

    make_shapes(tmp_path / "shapes", train=40, val=20, size=32)  # the generated shapes are RGB
    data = ["--data", tmp_path / "shapes" / "train" / "images"]
    assert train(tmp_path / "run", "--epochs", 0.1, "--in_chans", "1", *data) == 0
    assert exported_input(tmp_path / "run") == [1, 32, 32]


def test_images_that_are_not_square_train_a_backbone_that_is_not_square(tmp_path):
    assert train(tmp_path / "run", "--epochs", 0.1, "--img_size", "[32, 48]") == 0
    assert exported_input(tmp_path / "run") == [3, 32, 48]


@pytest.mark.slow
def test_compiled_blocks_train_and_export(tmp_path):
    assert train(tmp_path / "run", "--epochs", 0.1, "--compile") == 0
    assert (tmp_path / "run" / "export" / "backbone" / "model.safetensors").exists()


def test_a_run_killed_before_its_first_checkpoint_starts_again_from_its_initial_weights(tmp_path):
    assert train(tmp_path / "first", "--epochs", 0.1) == 0
    start_from = ["--init", tmp_path / "first" / "export" / "backbone", "--epochs", 0.1]
    assert train(tmp_path / "whole", *start_from) == 0
    assert train(tmp_path / "killed", *start_from) == 0
    for checkpoint in (tmp_path / "killed" / "checkpoints").iterdir():
        checkpoint.unlink()
    assert main("pretrain", ["--resume", str(tmp_path / "killed")]) == 0
    assert differences(tmp_path / "whole", tmp_path / "killed") == []


def test_labels_of_single_images_do_not_stop_a_run(tmp_path, capsys):
    """One folder per photo is a habit of people and of ImageNet samples: nothing to probe, but enough to learn from."""
    for number in range(12):
        folder = tmp_path / "photos" / f"class{number}"
        folder.mkdir(parents=True)
        pixels = torch.randint(256, (3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        to_pil_image(pixels).save(folder / "photo.png")
    assert train(tmp_path / "run", "--data", tmp_path / "photos", "--epochs", 2) == 0
    assert "12 labels, too few images of each for probes" in capsys.readouterr().out


@pytest.fixture(scope="module")
def dinov3(tmp_path_factory):
    """Random weights of a small DINOv3, as a timm folder."""
    folder = tmp_path_factory.mktemp("dinov3") / "backbone"
    with torch.random.fork_rng():
        vit = timm.create_model(
            "vit_small_patch16_dinov3", img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=2, num_classes=0
        )
        for parameter in vit.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    export_backbone(vit, folder, mean=[0.1] * 3, std=[0.3] * 3, card=ModelCard("DINOv3", "photos"))
    return folder


def test_a_run_goes_on_from_good_weights_and_stands_beside_them(dinov3, tmp_path, capsys):
    small = [*TINY[:2], f"--model=local-dir:{dinov3}", "--img_size=32", "--patch_size=8", "--epochs=0.1875"]
    small += ["--model.init_args.encoder.positions=learned", "--probe_images=300"]
    small += ["--model.init_args.optim.head_warmup=0.25", "--model.init_args.optim.layer_decay=0.5"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert main("pretrain", [*small, f"--continue={dinov3}", f"--out={whole}"]) == 0
    said = capsys.readouterr().out
    assert "start   encoder stands still for 3 steps, layer decay 0.5" in said
    assert "init: 32 of 32 tensors" in said
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["start"] == str(dinov3)
    assert len(summary["probe"]["knn"]["start"]) == len(summary["probe"]["knn"]["trained"]) == 3
    assert "gain over the start" in (whole / "report.html").read_text()
    saved = yaml.safe_load((whole / "config.yaml").read_text())
    assert saved["data"]["mean"] == pytest.approx([0.1] * 3)  # as the weights expect it
    shutil.copytree(whole, part, symlinks=True)
    checkpoints(part)[-1].unlink()
    assert main("pretrain", ["--resume", str(part)]) == 0
    assert differences(whole, part) == []


def test_additions_of_low_rank_learn_resume_and_are_merged_into_what_leaves_the_run(dinov3, tmp_path, capsys):
    small = [*TINY[:2], f"--model=local-dir:{dinov3}", "--img_size=32", "--patch_size=8", "--epochs=0.125"]
    small += ["--model.init_args.encoder.positions=learned"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert main("pretrain", [*small, f"--continue={dinov3}", "--lora=2", "--blr=1", f"--out={whole}"]) == 0
    assert "of it only additions of rank 2 to its attention learn" in capsys.readouterr().out
    shutil.copytree(whole, part, symlinks=True)
    checkpoints(part)[-1].unlink()
    assert main("pretrain", ["--resume", str(part)]) == 0
    assert differences(whole, part) == []
    start, end = (load_file(folder / "model.safetensors") for folder in (dinov3, whole / "export" / "backbone"))
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert start.keys() == end.keys()
    assert moved == {f"blocks.{depth}.attn.{layer}.weight" for depth in (0, 1) for layer in ("qkv", "proj")}
    unexported = load_encoder(str(whole / "checkpoints" / "last.ckpt")).encoder
    assert all(torch.equal(value, end[name]) for name, value in unexported.vit.state_dict().items())


def test_additions_to_random_weights_are_refused(capsys):
    assert main("pretrain", ["--data=shapes", "--lora=4"]) == 2
    assert capsys.readouterr().err.startswith("error: --lora 4: the weights that it adds to stand still")


ABSENT = ("vit_smal_patch16_dinov3", "vit_small_patch16_dinov3.lvd", "nowhere/model.pth", "https://example.org/x.pth")


@pytest.mark.parametrize("weights", ABSENT)
@pytest.mark.parametrize("option", ["--continue", "--init"])
def test_weights_that_are_not_there_are_refused_under_the_option_that_named_them(option, weights, capsys):
    assert main("pretrain", [f"{option}={weights}", "--data=shapes"]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error == f"error: {option} {weights}: no such file, folder or timm weights"
    assert hint.startswith(f"try:   {option} ")


def test_a_model_that_was_meant_by_its_weights_alone_is_refused_under_their_option(capsys):
    assert main("pretrain", ["--continue=resnet50", "--data=shapes"]) == 2
    error, _, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: --continue resnet50 is neither a plain nor a rotary ViT")
    assert hint == "try:   --continue vit_small_patch16_224   or   --continue vit_small_patch16_dinov3"


def test_what_goes_on_from_an_export_reads_numbers_on_its_scale_unless_told_otherwise(tmp_path):
    vit = timm.create_model("test_vit", img_size=32, patch_size=8, in_chans=2, num_classes=0)
    pixels = Pixels((-30.0, 0.0), (5.0, 1.0), "float32", nodata=-9999.0)
    statistics = {"mean": [0.4, 0.6], "std": [0.1, 0.2]}
    export_backbone(vit, tmp_path / "x", card=ModelCard("MAE", "radar"), pixels=pixels.facts(), **statistics)
    for number in range(8):
        np.save(tmp_path / f"{number}.npy", np.full((2, 32, 32), number, np.float32))
    call = [f"--data={tmp_path}", f"--continue={tmp_path / 'x'}"]
    run = Pretraining(parse(translate(call)), None)
    assert run.data.pixels == pixels
    assert (run.data.mean, run.data.std) == (statistics["mean"], statistics["std"])
    assert run.method.encoder.img_size == (32, 32)
    other = Pretraining(parse(translate([*call, "--value_range=0,10"])), None)
    assert other.data.pixels == Pixels((0.0,), (10.0,), "any")


def test_a_run_resumes_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(16):
        Path("images").mkdir(exist_ok=True)
        to_pil_image(torch.full((3, 40, 40), number / 16)).save(f"images/{number}.png")
    assert train("run", "--data", "images") == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for given in ([], ["--data", "../images"]):
        assert main("pretrain", ["--resume", "../run", *given]) == 0


def test_a_published_name_as_the_model_is_said_to_start_from_random_weights(tmp_path, capsys):
    model = "test_vit.r160_in1k"
    assert train(tmp_path / "run", "--epochs", "0.05", "--model", model) == 0
    assert f"note: --model {model} trains from random weights; --init {model} starts" in capsys.readouterr().out


def test_data_that_lost_an_image_do_not_go_on_in_another_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for number in range(16):
        to_pil_image(torch.full((3, 40, 40), number / 16)).save(f"images/{number}.png")
    assert train("run", "--data", "images") == 0
    Path("images/3.png").unlink()
    assert main("pretrain", ["--resume", "run"]) == 2
    assert "the data hold 15 images, the run began with 16" in capsys.readouterr().err
    assert main("pretrain", ["--resume", "run", "--allow_change", "data.path"]) == 0


@pytest.mark.parametrize("option", ["--clip", "--bands=1", "--nodata=0"])
def test_what_the_scale_per_file_does_not_read_is_refused(option, capsys):
    assert main("pretrain", ["--data=shapes", "--value_range=per_file", option]) == 2
    name = option.partition("=")[0]
    assert capsys.readouterr().err.startswith(f"error: {name} and --value_range per_file exclude each other")
