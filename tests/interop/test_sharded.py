"""Weights in several files: each layout is built here; all of it lands, or the part that is not enough is named."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_foreign_layouts import hugging_face, prefixed, vit

from mim.errors import UserError
from mim.interop import load_weights
from mim.run.weights import init_backbone, load_encoder

WRITERS = {"safetensors": save_file, "bin": torch.save}
STEMS = {"safetensors": "model", "bin": "pytorch_model"}


def sharded(folder, tensors, kind, count=3):
    """Shards as transformers writes them; the path of their index."""
    folder.mkdir(exist_ok=True)
    stem, names = STEMS[kind], sorted(tensors)
    files = {name: f"{stem}-{1 + n % count:05d}-of-{count:05d}.{kind}" for n, name in enumerate(names)}
    for file in set(files.values()):
        part = {name: tensors[name].clone() for name in names if files[name] == file}
        WRITERS[kind](part, folder / file)
    index = folder / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    return index


def equal(model, source):
    return all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("named", ["folder", "index"])
def test_a_sharded_hugging_face_folder_lands_whole(kind, named, tmp_path):
    source, target = vit(), vit()
    index = sharded(tmp_path / "hub", hugging_face(source.state_dict()), kind)
    (tmp_path / "hub" / "config.json").write_text(json.dumps({"model_type": "vit", "image_size": 32, "patch_size": 8}))
    report = init_backbone(target, str(index.parent if named == "folder" else index))
    assert report.startswith("init: 30 of 30 tensors")
    assert equal(target, source)


@pytest.mark.parametrize("kind", WRITERS)
def test_an_evaluation_opens_a_sharded_folder_by_what_it_says(kind, tmp_path):
    source = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=(32, 64)).eval()
    sharded(tmp_path / "hub", hugging_face(source.state_dict()), kind)
    config = {"model_type": "vit", "image_size": [32, 64], "patch_size": 16}
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    images = torch.rand(1, 3, 32, 64)
    assert torch.equal(load_encoder(str(tmp_path / "hub")).encoder(images), source.forward_features(images))


@pytest.mark.parametrize("kind", WRITERS)
def test_one_shard_of_several_is_named_and_the_folder_offered(kind, tmp_path):
    index = sharded(tmp_path / "hub", vit().state_dict(), kind)
    shard = next(tmp_path.glob(f"hub/*00001*.{kind}"))
    with pytest.raises(UserError) as refused:
        load_weights(shard)
    assert refused.value.error == f"--init {shard} is one of 3 shards of the weights"
    assert refused.value.hint == f"--init {index.parent}"
    index.unlink()
    with pytest.raises(UserError, match="is one of 3 shards") as refused:
        load_weights(shard)
    assert refused.value.why == f"{index.name}, which tells what lies where, is not beside it"


def test_a_single_shard_is_whole(tmp_path):
    index = sharded(tmp_path, vit().state_dict(), "safetensors", count=1)
    assert load_weights(next(tmp_path.glob("*-of-00001.safetensors"))).keys() == load_weights(index).keys()


@pytest.mark.parametrize("kind", WRITERS)
def test_a_missing_shard_is_named(kind, tmp_path):
    sharded(tmp_path, vit().state_dict(), kind)
    gone = tmp_path / f"{STEMS[kind]}-00002-of-00003.{kind}"
    gone.unlink()
    with pytest.raises(UserError, match="1 of 3 shards are missing") as refused:
        init_backbone(vit(), str(tmp_path))
    assert gone.name in refused.value.why


INDICES = ([], {}, {"a": "../x.bin"}, {"a": "/x.bin"}, {"a": "m.index.json"}, {"a": 3})


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "[" * 100_000, *(json.dumps({"weight_map": files}) for files in INDICES)],
)
def test_a_damaged_index_is_refused(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="is not an index of shards"):
        init_backbone(vit(), str(tmp_path))


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    index = sharded(tmp_path, vit().state_dict(), "safetensors", count=2)
    save_file({"cls_token": torch.ones(1, 1, 64)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"cls_token": torch.ones(1, 1, 64)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match="cls_token is in more than one shard"):
        load_weights(index)


# DeepSpeed ------------------------------------------------------------------------------------------------------------


def deepspeed(root: Path, state, *, tag="global_step100", latest=True, file="mp_rank_00_model_states.pt"):
    """A checkpoint's folder as DeepSpeed's ``save_checkpoint`` leaves it."""
    home = root / tag
    home.mkdir(parents=True)
    content = {"module": state, "buffer_names": [], "optimizer": None, "mp_world_size": 1, "ds_version": "0.18"}
    content["param_shapes"] = [{name: tensor.shape for name, tensor in state.items()}]
    torch.save(content, home / file)
    torch.save({"optimizer_state_dict": {}}, home / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (root / "zero_to_fp32.py").write_text("")
    if latest:
        (root / "latest").write_text(f"{tag}\n")
    return home


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("latest", [True, False])
def test_a_deepspeed_folder_lands_whole(dtype, latest, tmp_path):
    source, target = vit().to(dtype), vit()
    deepspeed(tmp_path / "old", vit().state_dict(), tag="global_step20", latest=False).rename(
        tmp_path / "global_step20"
    )
    home = deepspeed(tmp_path, prefixed("module.model.", source.state_dict()), latest=latest)
    for weights in (tmp_path, home, home / "mp_rank_00_model_states.pt"):
        init_backbone(target, str(weights))
        assert equal(target, source.float())


def test_an_evaluation_opens_a_deepspeed_folder(tmp_path):
    source = timm.create_model("vit_tiny_patch16_224", num_classes=0, in_chans=4).eval()
    deepspeed(tmp_path, prefixed("model.", source.state_dict()))
    images = torch.rand(1, 4, 224, 224)
    for model in (None, "vit_tiny_patch16_224"):
        loaded = load_encoder(str(tmp_path), model=model)
        assert torch.equal(loaded.encoder(images), source.forward_features(images))


def test_lightnings_deepspeed_folder_lands_whole(tmp_path):
    source, target = vit(), vit()
    deepspeed(tmp_path / "last.ckpt", prefixed("_forward_module.encoder.", source.state_dict()), tag="checkpoint")
    init_backbone(target, str(tmp_path / "last.ckpt"))
    assert equal(target, source)


def hollow(state):
    return {name: tensor.new_empty(0) for name, tensor in state.items()}


@pytest.mark.parametrize("named", ["root", "step", "file"])
def test_zero_3_is_named_with_the_script_that_makes_it_whole(named, tmp_path):
    file = "zero_pp_rank_0_mp_rank_00_model_states.pt"
    home = deepspeed(tmp_path, hollow(vit().state_dict()), file=file)
    weights = {"root": tmp_path, "step": home, "file": home / file}[named]
    with pytest.raises(UserError, match=r"holds the weights in parts \(ZeRO-3 of DeepSpeed\)") as refused:
        init_backbone(vit(), str(weights))
    whole = tmp_path / "whole"
    assert refused.value.hint == f"python {tmp_path / 'zero_to_fp32.py'} {tmp_path} {whole}   then   --init {whole}"


@pytest.mark.parametrize("written", ["a folder", "a sharded folder", "a file"])
def test_what_that_script_writes_lands_whole(written, tmp_path):
    source, target, whole = vit(), vit(), tmp_path / "whole"
    if written == "a sharded folder":
        sharded(whole, source.state_dict(), "bin")
    else:
        whole.mkdir() if written == "a folder" else None
        torch.save(source.state_dict(), whole / "pytorch_model.bin" if written == "a folder" else whole)
    init_backbone(target, str(whole))
    assert equal(target, source)


def test_a_part_of_zero_3_under_another_name_is_seen_by_its_empty_tensors(tmp_path):
    torch.save({"module": hollow(vit().state_dict())}, tmp_path / "x.pt")
    with pytest.raises(UserError) as refused:
        init_backbone(vit(), str(tmp_path / "x.pt"))
    assert "30 of its 30 tensors are empty" in refused.value.why


def test_model_parallel_parts_are_named(tmp_path):
    home = deepspeed(tmp_path, vit().state_dict())
    torch.save({"module": {}}, home / "mp_rank_01_model_states.pt")
    with pytest.raises(UserError, match="is one of 2 model-parallel parts"):
        init_backbone(vit(), str(tmp_path))


def test_the_state_of_an_optimizer_is_no_weights(tmp_path):
    home = deepspeed(tmp_path, vit().state_dict())
    with pytest.raises(UserError, match="holds the state of DeepSpeed's optimizer") as refused:
        init_backbone(vit(), str(home / "zero_pp_rank_0_mp_rank_00_optim_states.pt"))
    assert refused.value.hint == f"--init {home}"


@pytest.mark.parametrize("latest", ["../elsewhere", "", "gone", "\x00"])
def test_a_strange_latest_is_passed_over(latest, tmp_path):
    source, target = vit(), vit()
    deepspeed(tmp_path, source.state_dict())
    (tmp_path / "latest").write_text(latest)
    init_backbone(target, str(tmp_path))
    assert equal(target, source)


def test_a_sharded_checkpoint_of_torch_is_named_with_the_command_that_makes_it_whole(tmp_path):
    (tmp_path / ".metadata").write_bytes(b"")
    (tmp_path / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(UserError, match=r"is a sharded checkpoint of torch\.distributed") as refused:
        init_backbone(vit(), str(tmp_path))
    assert "python -m torch.distributed.checkpoint.format_utils dcp_to_torch" in refused.value.hint
