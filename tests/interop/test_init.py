"""``--init``: every kind of source, what is reported, and what is refused."""

import random
import re
from contextlib import suppress
from pathlib import Path

import pytest
import timm
import torch

from mim.errors import UserError
from mim.interop import ModelCard, export_backbone, load_weights
from mim.run.config import parse, save_config
from mim.run.weights import init_backbone

TINY = Path(__file__).parents[1] / "tiny.yaml"


def tiny(img_size=32, **kwargs):
    return timm.create_model("test_vit", img_size=img_size, patch_size=8, num_classes=0, **kwargs)


def same(a, b):
    return all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


def export(vit, folder):
    export_backbone(vit, folder, mean=[0.5] * 3, std=[0.5] * 3, card=ModelCard("MAE", "photos"))
    return folder


def decoder():
    return {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 64)}


def test_a_full_mae_file_fits(tmp_path):
    source, vit = tiny(), tiny()
    torch.save({"model": source.state_dict() | decoder()}, tmp_path / "x.pth")
    report = init_backbone(vit, str(tmp_path / "x.pth"))
    assert report == f"init: 78 of 78 tensors from {tmp_path / 'x.pth'} (mae layout)"
    assert same(vit, source)


def test_positions_are_resized_and_reported(tmp_path):
    torch.save({"model": tiny(32).state_dict() | decoder()}, tmp_path / "x.pth")
    report = init_backbone(tiny(64), str(tmp_path / "x.pth"))
    assert report.endswith("(mae layout), pos_embed resized 4x4 -> 8x8")


def test_a_fine_tuned_mae_file_fits_but_for_the_norm_it_lacks(tmp_path):
    state = tiny(global_pool="avg").state_dict() | {"head.weight": torch.ones(7, 64), "head.bias": torch.ones(7)}
    torch.save({"model": state}, tmp_path / "x.pth")
    report = init_backbone(tiny(), str(tmp_path / "x.pth"))
    assert "76 of 78" in report
    assert "not in it and left as they were: norm.weight, norm.bias" in report
    assert "4 of its tensors not used" in report


def test_a_fine_tuned_mae_file_fits_its_own_model(tmp_path):
    source, vit = tiny(global_pool="avg"), tiny(global_pool="avg")
    torch.save({"model": source.state_dict()}, tmp_path / "x.pth")
    init_backbone(vit, str(tmp_path / "x.pth"))
    assert same(vit, source)


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_a_timm_folder_fits(tmp_path, prefix):
    source, vit = tiny(), tiny()
    export(source, tmp_path / "x")
    init_backbone(vit, f"{prefix}{tmp_path / 'x'}")
    assert same(vit, source)


def test_the_grid_of_a_timm_folder_need_not_be_square(tmp_path):
    export(tiny((16, 64)), tmp_path / "x")
    assert init_backbone(tiny(64), str(tmp_path / "x")).endswith("pos_embed resized 2x8 -> 8x8")


def test_a_run_gives_its_export(tmp_path):
    source, vit = tiny(), tiny()
    export(source, tmp_path / "run" / "export" / "backbone")
    init_backbone(vit, str(tmp_path / "run"))
    assert same(vit, source)


def test_a_run_without_export_gives_its_last_checkpoint(tmp_path):
    source, vit = tiny(), tiny()
    (tmp_path / "checkpoints").mkdir()
    state = {f"encoder.vit.{name}": tensor for name, tensor in source.state_dict().items()}
    torch.save({"state_dict": state | {"decoder.norm.weight": torch.ones(3)}}, tmp_path / "checkpoints" / "last.ckpt")
    assert "(mim run layout)" in init_backbone(vit, str(tmp_path))
    assert same(vit, source)


def test_weights_of_another_model_are_refused_and_that_model_is_named(tmp_path):
    small = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    torch.save(small.state_dict(), tmp_path / "x.pth")
    vit = tiny()
    before = vit.pos_embed.clone()
    with pytest.raises(UserError) as info:
        init_backbone(vit, str(tmp_path / "x.pth"))
    assert str(info.value).splitlines() == [
        f"error: --init {tmp_path / 'x.pth'} does not fit test_vit",
        "why:   matched 0 of 78 tensors; e.g. blocks.0.attn.qkv.weight is 576x192 there, 192x64 here "
        "-> looks like vit_tiny_patch16_224",
        "try:   --model vit_tiny_patch16_224",
    ]
    assert torch.equal(vit.pos_embed, before)


@pytest.mark.parametrize("name", ["blocks.5.mlp.fc2.bias", "patch_embed.proj.bias", "cls_token"])
def test_one_tensor_that_would_stay_random_is_refused(name, tmp_path):
    state = tiny().state_dict()
    shape = "x".join(map(str, state.pop(name).shape))
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match=f"matched 77 of 78 tensors; {name} is missing there, {shape} here"):
        init_backbone(tiny(), str(tmp_path / "x.pth"))


def test_a_deeper_model_is_refused_however_many_blocks_fit(tmp_path):
    torch.save(tiny(depth=13).state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError, match="matched 150 of 150 tensors, but 12 of its own have no place"):
        init_backbone(tiny(depth=12), str(tmp_path / "x.pth"))


def test_the_grid_of_a_run_is_that_of_its_settings(tmp_path):
    config = parse([f"--config={TINY}", "--model.init_args.encoder.img_size=[16,64]"])
    save_config(config, tmp_path / "config.yaml")
    (tmp_path / "checkpoints").mkdir()
    state = {f"encoder.vit.{name}": tensor for name, tensor in tiny((16, 64)).state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "checkpoints" / "last.ckpt")
    assert init_backbone(tiny(64), str(tmp_path)).endswith("pos_embed resized 2x8 -> 8x8")


def test_integers_are_no_weights(tmp_path):
    torch.save({name: tensor.to(torch.int8) for name, tensor in tiny().state_dict().items()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="does not fit"):
        init_backbone(tiny(), str(tmp_path / "x.pth"))


class Settings:
    """Of a package that nobody knows."""


def test_python_objects_need_trust(tmp_path):
    source, vit = tiny(), tiny()
    torch.save({"model": source.state_dict(), "args": Settings()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"holds Python objects \(test_init.Settings\)"):
        init_backbone(vit, str(tmp_path / "x.pth"))
    init_backbone(vit, str(tmp_path / "x.pth"), trust=True)
    assert same(vit, source)


def test_a_json_file_beside_a_foreign_checkpoint_says_nothing_about_it(tmp_path):
    source, vit = tiny(), tiny()
    torch.save({"state_dict": source.state_dict()}, tmp_path / "model.ckpt")
    (tmp_path / "model.json").write_text('{"step": 3, "sha256": "of something else"}')
    init_backbone(vit, str(tmp_path / "model.ckpt"))
    assert same(vit, source)


def test_every_flipped_bit_and_every_cut_in_an_export_is_noticed(tmp_path):
    path, draw = export(tiny(), tmp_path / "x") / "model.safetensors", random.Random(0)
    good = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for place in (draw.randrange(len(good)) for _ in range(1000)):
            file.seek(place)
            file.write(bytes([good[place] ^ 1 << draw.randrange(8)]))
            with pytest.raises(UserError, match=re.escape(f"{path} is damaged")):
                load_weights(path)
            file.seek(place)
            file.write(good[place : place + 1])
        for length in sorted((draw.randrange(len(good)) for _ in range(200)), reverse=True):
            file.truncate(length)
            with pytest.raises(UserError, match=re.escape(f"{path} is damaged")):
                load_weights(path)


def test_damaged_checksums_are_no_crash(tmp_path):
    path = export(tiny(), tmp_path / "x") / "model.safetensors"
    sums = path.with_name("SHA256SUMS")
    for place in range(len(good := sums.read_bytes())):
        sums.write_bytes(good[:place] + b"\xff" + good[place + 1 :])
        with suppress(UserError):
            load_weights(path)


def test_an_unknown_name_is_refused_with_near_ones():
    with pytest.raises(UserError, match="no such file, folder or timm weights") as info:
        init_backbone(tiny(), "vit_base_patch16_224.mea")
    assert "vit_base_patch16_224.mae" in str(info.value)


@pytest.mark.parametrize("name", ["test_vit2", "test_vit2.r160_in1k"])
def test_a_name_that_cannot_be_fetched_is_one_error(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="timm could not get these weights"):
        init_backbone(tiny(), name)


def test_weights_that_timm_fetches_are_resized_too(monkeypatch):
    source, vit = tiny(64), tiny(32)
    monkeypatch.setattr("mim.run.weights.missing_published", lambda name: None)
    monkeypatch.setattr("mim.run.weights.timm.create_model", lambda *args, **kwargs: source)
    assert "(timm layout), pos_embed resized 8x8 -> 4x4" in init_backbone(vit, "test_vit.r160_in1k")
    assert torch.equal(vit.norm.weight, source.norm.weight)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no weights"):
        init_backbone(tiny(), str(tmp_path))
