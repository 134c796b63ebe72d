"""``--init``: every kind of source, what is reported, and what is refused."""

import argparse
import random
import re
from contextlib import suppress

import pytest
import timm
import torch

from mim.errors import UserError
from mim.interop import ModelCard, export_backbone, load_weights
from mim.run.weights import init_backbone


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


def test_below_nine_tenths_is_refused(tmp_path):
    state = tiny().state_dict()
    others = {f"other.{number}": torch.ones(1) for number in range(9)}
    torch.save(state | dict(list(others.items())[:8]), tmp_path / "x.pth")  # 78 of 86 are 91 %
    init_backbone(tiny(), str(tmp_path / "x.pth"))
    torch.save(state | others, tmp_path / "x.pth")  # 78 of 87 are 89.7 %
    with pytest.raises(UserError, match="does not fit"):
        init_backbone(tiny(), str(tmp_path / "x.pth"))


@pytest.mark.parametrize(
    ("source", "lost", "name", "shapes"),
    [
        ({"in_chans": 4}, [], "patch_embed.proj.weight", "64x4x8x8 there, 64x3x8x8 here"),
        ({"reg_tokens": 2}, [], "reg_token", "1x2x64 there, missing here"),
        ({}, ["cls_token"], "cls_token", "missing there, 1x1x64 here"),
        ({}, ["pos_embed"], "pos_embed", "missing there, 1x17x64 here"),
        ({}, ["blocks.5.mlp.fc2.bias"], "blocks.5.mlp.fc2.bias", "missing there, 64 here"),
        ({}, ["patch_embed.proj.bias"], "patch_embed.proj.bias", "missing there, 64 here"),
    ],
)
def test_an_essential_tensor_without_its_match_is_an_error_that_names_both_shapes(tmp_path, source, lost, name, shapes):
    state = {key: value for key, value in tiny(**source).state_dict().items() if key not in lost}
    torch.save(state, tmp_path / "x.pth")
    vit = tiny()
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    with pytest.raises(UserError, match="does not fit test_vit") as refused:
        init_backbone(vit, str(tmp_path / "x.pth"))
    if name != "reg_token":  # with two more positions, it is those that are named first
        assert f"e.g. {name} is {shapes}" in str(refused.value)
    assert all(torch.equal(before[key], value) for key, value in vit.state_dict().items())


def test_another_number_of_channels_is_refused_with_the_option_that_helps(tmp_path):
    torch.save(tiny(in_chans=4).state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError) as refused:
        init_backbone(tiny(), str(tmp_path / "x.pth"))
    assert str(refused.value).splitlines()[-1] == "try:   --in_chans 4"


def test_integers_are_no_weights(tmp_path):
    torch.save({name: tensor.to(torch.int8) for name, tensor in tiny().state_dict().items()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="does not fit"):
        init_backbone(tiny(), str(tmp_path / "x.pth"))


def test_python_objects_need_trust(tmp_path):
    source, vit = tiny(), tiny()
    torch.save({"model": source.state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"holds Python objects \(argparse.Namespace\)"):
        init_backbone(vit, str(tmp_path / "x.pth"))
    init_backbone(vit, str(tmp_path / "x.pth"), trust=True)
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
    monkeypatch.setattr("mim.run.weights.timm.create_model", lambda *args, **kwargs: source)
    assert "(timm layout), pos_embed resized 8x8 -> 4x4" in init_backbone(vit, "test_vit.r160_in1k")
    assert torch.equal(vit.norm.weight, source.norm.weight)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no weights"):
        init_backbone(tiny(), str(tmp_path))
