import pytest
import torch

from mim.cli import main
from mim.data.sources import open_source
from mim.tokenizers import VQGANTokenizer, load_tokenizer

SMALL = ["--data", "shapes", "--img_size", "32", "--num_workers", "0"]


def test_a_tokenizer_is_fitted_and_its_tokens_are_images_with_labels(tmp_path, capsys):
    file, folder = tmp_path / "t.safetensors", tmp_path / "tokens"
    args = ["--steps", "3", "--codes", "32", "--batch_size", "8", "--out", str(file)]
    assert main("tokens", ["fit", *SMALL, "--stride", "8", *args]) == 0
    assert main("tokens", ["encode", *SMALL, "--tokenizer", str(file), "--out", str(folder)]) == 0
    assert "16 bytes each" in capsys.readouterr().out
    train, val = open_source(str(folder))
    assert train.read(0).shape == (3, 32, 32)
    assert train.classes == val.classes
    assert main("tokens", ["encode", *SMALL, "--out", str(folder)]) == 2


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["fit", "--kind", "convolutional", "--stride", "6"], "--stride 4"),
        (["fit", "--stride", "64", "--img_size", "32"], "--img_size 64"),
        (["fit", "--stride", "5", "--img_size", "32", "--data", "shapes"], "--img_size 30"),
        (["encode", "--tokenizer", "none.safetensors"], "tokens"),
        (["paint"], "fit"),
    ],
)
def test_what_cannot_be_is_refused_with_something_to_try(args, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main("tokens", args) == 2
    assert said in capsys.readouterr().err


def test_weights_of_a_vqgan_become_a_tokenizer_and_encode(tmp_path, capsys):
    weights, file, folder = tmp_path / "vqgan.ckpt", tmp_path / "t.safetensors", tmp_path / "tokens"
    state = VQGANTokenizer(8, 4, 32, (1, 1), 1, (False, True), 4).state_dict()
    state["quantize.embedding.weight"] = torch.randn_like(state.pop("codebook.codes"))
    torch.save({"state_dict": state, "epoch": 3}, weights)
    assert main("tokens", ["convert", "--tokenizer", str(weights), "--out", str(file)]) == 0
    assert "8 codes, 2 px" in capsys.readouterr().out
    assert main("tokens", ["encode", *SMALL, "--img_size", "8", "--tokenizer", str(weights), "--out", str(folder)]) == 0
    own, other = (load_tokenizer(str(path)).state_dict() for path in (file, folder / "train/tokenizer.safetensors"))
    assert all(torch.equal(own[key], other[key]) for key in own)
    torch.save({"state_dict": {"fc.weight": torch.zeros(2)}}, weights)
    assert main("tokens", ["convert", "--tokenizer", str(weights), "--out", str(file)]) == 2
    assert "quantize.embedding.weight is missing" in capsys.readouterr().err
