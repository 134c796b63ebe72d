"""The mistakes people make, and the three lines that they end in (texts as in the user guide)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hints import check_hint
from PIL import Image

from mim.cli import main

TINY = str(Path(__file__).with_name("tiny.yaml"))


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def mistake(capsys, monkeypatch, tmp_path):
    """Runs pretrain, expects its exit status without a traceback, and returns the error text."""
    monkeypatch.chdir(tmp_path)

    def run(*args, config=TINY, status=2):
        assert main("pretrain", [*(("--config", config) if config else ()), *args]) == status
        text = capsys.readouterr().err
        assert text.startswith("error: ")
        assert "Traceback" not in text
        heads = [line.split(":")[0] for line in text.splitlines() if not line.startswith("         ")]
        assert heads in (["error", "try"], ["error", "why", "try"])
        check_hint("pretrain", text, args)
        return text

    return run


def test_1_a_folder_that_does_not_exist(mistake, photos):
    text = mistake("--data", "photoz")
    assert "--data photoz" in text
    assert "photos" in text.split("try:")[1]


def test_2_a_folder_without_images_counts_what_it_found(mistake, tmp_path):
    folder = tmp_path / "phone"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.heic").write_bytes(b"x")
    text = mistake("--data", "phone")
    assert "0 images" in text
    assert "found .heic 3" in text


def test_3_too_many_unreadable_images_stop_the_run_and_name_the_first(mistake, photos):
    (photos / "broken.png").write_bytes((photos / "0.png").read_bytes()[:100])
    text = mistake("--data", "photos")
    assert "1 of 9 images are unreadable (11.1%, limit 1.0%)" in text
    assert "broken.png" in text
    assert "check_data" in text


def test_4_an_image_size_that_does_not_divide_by_the_patch_size(mistake):
    text = mistake("--img_size", "100", "--patch_size", "16")
    assert "100 does not divide by the patch size 16" in text
    assert "96" in text
    assert "112" in text


def test_5_a_timm_model_that_does_not_exist(mistake):
    text = mistake("--model", "vit_tinny_patch16_224")
    assert "timm" in text
    assert "vit_tiny_patch16_224" in text.split("try:")[1]


@pytest.mark.parametrize("model", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_6_a_model_that_is_not_a_plain_vit(mistake, model):
    text = mistake("--model", model)
    assert model in text
    assert "vit_small_patch16_224" in text.split("try:")[1]


def test_7_out_of_memory_names_the_settings_that_help(mistake, monkeypatch, photos):
    def explode(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 94.00 GiB. And more.")

    monkeypatch.setattr("mim.methods.mae.MAE.training_step", explode)
    text = mistake("--data", "photos", status=4)
    assert "out of memory at batch 16 per device" in text
    assert "--accumulate 4" in text


def test_8_weights_that_do_not_fit_name_the_model_they_look_like(mistake, photos):
    import timm

    tensors = timm.create_model("test_vit2", num_classes=0).state_dict()
    torch.save({"model": tensors}, "other.pth")
    text = mistake("--data", "photos", "--init", "other.pth")
    assert "--init other.pth does not fit test_vit" in text
    assert "but 43 of its own have no place" in text
    assert not Path("runs").exists()


def test_8b_a_file_with_python_objects_is_not_loaded(mistake, photos):
    from fractions import Fraction

    torch.save({"model": {}, "args": Fraction(1, 2)}, "other.pth")
    text = mistake("--data", "photos", "--init", "other.pth")
    assert "fractions.Fraction" in text
    assert "--trust" in text


def test_9_resuming_with_other_settings_shows_the_difference(mistake, photos):
    assert main("pretrain", ["--config", TINY, "--data", "photos", "--out", "run", "--epochs", "2"]) == 0
    text = mistake("--resume", "run", "--blr", "0.5", "--num_workers", "0", "--data", "photos", config=None)
    assert "--resume run: 1 setting differs from the saved run" in text
    assert "0.01 -> 0.5" in text
    assert "--allow_change model.init_args.optim.blr" in text


def test_11_an_unknown_dotted_option_gets_a_suggestion(mistake):
    text = mistake("--model.init_args.decoder_widht", "3")
    assert "decoder_widht" in text


def test_11b_an_unknown_key_in_yaml_is_named(mistake, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(Path(TINY).read_text().replace("epochs:", "epoch:"))
    text = mistake(config=str(config))
    assert "epoch" in text


def test_11c_a_class_from_elsewhere_is_refused(mistake, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(Path(TINY).read_text().replace("class_path: RandomMasking", "class_path: os.system"))
    assert "os.system" in mistake(config=str(config))


def test_12_an_output_folder_in_use(mistake, photos):
    Path("run").mkdir()
    Path("run/config.yaml").write_text("epochs: 1")
    text = mistake("--data", "photos", "--out", "run")
    assert "--resume run" in text
    assert "--overwrite" in text


def test_12b_an_output_folder_that_is_a_file(mistake, photos):
    Path("run").write_text("")
    assert "--out run" in mistake("--data", "photos", "--out", "run")


def test_13_a_loss_that_is_not_finite_stops_the_run_before_the_optimizer(mistake, monkeypatch, photos):
    from mim.methods.mae import MAE

    honest = MAE.training_step

    def poisoned(self, batch, batch_idx):
        loss = honest(self, batch, batch_idx)
        return loss * float("nan") if self.global_step == 5 else loss

    monkeypatch.setattr(MAE, "training_step", poisoned)
    text = mistake("--data", "photos", "--out", "run", "--epochs", "20", "--save_every", "2", status=3)
    assert "not finite at step 6" in text
    assert "last good checkpoint: run/checkpoints/step-00000005.ckpt" in text
    assert text.split("batch (")[1].startswith("photos/")
    dump = torch.load("run/debug/nan_step_000005.pt", weights_only=True)
    assert len(dump["names"]) == 16
    assert all(torch.isfinite(value).all() for value in dump["state_dict"].values())
    assert json.loads(Path("run/summary.json").read_text())["status"] == "failed"


def test_a_batch_that_does_not_divide(mistake, photos):
    text = mistake("--data", "photos", "--batch_size", "15", "--accumulate", "2")
    assert "--batch_size 15 does not divide" in text


def test_resuming_what_is_not_a_run(mistake):
    assert "--resume nowhere: no run there" in mistake("--resume", "nowhere", config=None)


def test_resuming_a_checkpoint_names_its_run_or_init(mistake, photos):
    assert main("pretrain", ["--config", TINY, "--data", "photos", "--out", "run"]) == 0
    file = "run/checkpoints/last.ckpt"
    text = mistake("--resume", file, config=None)
    assert f"--resume {file} is a file, not a run" in text
    assert f"try:   --resume run   or   --init {file}" in text
    shutil.copy(file, "x.ckpt")
    assert "try:   --init x.ckpt   to start a new run" in mistake("--resume", "x.ckpt", config=None)


def test_resuming_a_run_whose_images_have_moved_says_how(mistake, photos):
    assert main("pretrain", ["--config", TINY, "--data", "photos", "--out", "run"]) == 0
    photos.rename(photos.with_name("moved"))
    text = mistake("--resume", "run", config=None)
    assert f"--data {photos}: no such" in text
    assert "try:   --resume run --data NEW --allow_change data.path" in text
    assert main("pretrain", ["--resume", "run", "--data", "moved", "--allow_change", "data.path"]) == 0
    assert main("pretrain", ["--resume", "run"]) == 0


@pytest.mark.parametrize("arguments", [["--model", "hf-hub:someone/something"], ["--init", "test_vit.r160_in1k"]])
def test_a_hub_that_cannot_be_reached_is_asked_once(mistake, photos, monkeypatch, arguments):
    def refuse(*_, **__):
        asked.append(1)
        raise ConnectionError("Name or service not known\nand a page more")

    asked = []
    monkeypatch.setattr("huggingface_hub.HfApi.file_exists", refuse)
    monkeypatch.setattr("mim.hub.try_to_load_from_cache", lambda *_, **__: None)
    text = mistake("--data", "photos", *arguments)
    assert "why:   Name or service not known\n" in text
    assert len(asked) == 1


def test_a_config_that_does_not_exist(mistake):
    assert "nowhere.yaml" in mistake(config="nowhere.yaml")


def test_a_device_that_is_not_there(mistake, photos):
    text = mistake("--data", "photos", "--trainer.accelerator", "nonsense")
    assert text.startswith("error: --trainer.accelerator nonsense")
    assert text.endswith("try:   --trainer.accelerator auto\n")


def test_arguments_that_a_model_does_not_take_are_named_with_what_they_came_from(capsys):
    assert main("pretrain", ["--method", "mp3", "--model", "vit_small_patch16_dinov3"]) == 2
    error, why, _ = capsys.readouterr().err.splitlines()
    assert error == "error: --model vit_small_patch16_dinov3: timm's Eva (rotary positions) takes no pos_embed"
    assert "--model.init_args.encoder.kwargs" in why


@pytest.mark.parametrize("model", ["vit_small_patch16_dinov3", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("name", ["pos_embed_kind", "use_fc"])
def test_an_argument_that_no_vit_takes_is_named(model, name, capsys):
    kwargs = f"--model.init_args.encoder.kwargs={{{name}: 1}}"
    assert main("pretrain", ["--model", model, kwargs]) == 2
    assert f"takes no {name}" in capsys.readouterr().err
