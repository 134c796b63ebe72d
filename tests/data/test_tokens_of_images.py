import json

import numpy as np
import pytest
import torch

from mim.data.labelled import open_labelled
from mim.data.sources import TokenSource, open_source
from mim.data.tokens import write_shard
from mim.errors import UserError
from mim.randomness import keyed_generator
from mim.tokenizers import PatchTokenizer


@pytest.fixture
def tokenizer():
    made = PatchTokenizer(codes=10, stride=4)
    made.start(torch.rand(4, 3, 8, 8), keyed_generator(0))
    return made


def write(folder, tokenizer, count=4):
    ids = np.arange(count * 6).reshape(count, 2, 3) % 10
    write_shard(folder, ids, [index % 2 for index in range(count)], ["cat", "dog"], tokenizer)
    return ids


def test_images_and_labels_come_back_out_of_tokens(tmp_path, tokenizer):
    ids = write(tmp_path / "t", tokenizer)
    source, held = open_source(str(tmp_path / "t"))
    assert (len(source), source.labels, source.classes, held) == (4, [0, 1, 0, 1], ["cat", "dog"], None)
    image = source.read(2)
    assert (image.shape, image.dtype) == ((3, 8, 12), torch.uint8)
    assert torch.equal(tokenizer.encode(image[None] / 255)[0], torch.from_numpy(ids[2]))


def test_a_token_of_a_small_codebook_takes_one_byte(tmp_path, tokenizer):
    ids = np.zeros((2, 2, 3), int)
    assert write_shard(tmp_path, ids, None, [], tokenizer) == 6
    assert write_shard(tmp_path, ids, None, [], PatchTokenizer(codes=300, stride=4)) == 12


def test_what_was_set_apart_stays_apart(tmp_path, tokenizer):
    write(tmp_path / "t/train", tokenizer)
    write(tmp_path / "t/val", tokenizer, 2)
    labelled = open_labelled(str(tmp_path / "t"))
    assert (len(labelled.train), len(labelled.test), labelled.classes) == (4, 2, ["cat", "dog"])


def test_bytes_of_a_token_image_are_the_same_image(tmp_path, tokenizer):
    write(tmp_path, tokenizer)
    source = TokenSource(tmp_path)
    assert torch.equal(source.examine(1).image, source.read(1))


@pytest.mark.parametrize("fault", ["facts", "ids", "labels", "beyond", "tokenizer"])
def test_damaged_tokens_are_refused_by_name(tmp_path, tokenizer, fault):
    write(tmp_path, tokenizer)
    match fault:
        case "facts":
            (tmp_path / "tokens.json").write_text("{")
        case "ids":
            np.save(tmp_path / "ids.npy", np.zeros((3, 2, 3), np.uint8))
        case "labels":
            np.save(tmp_path / "labels.npy", np.array([0, 1, 2, 9]))
        case "beyond":
            np.save(tmp_path / "ids.npy", np.full((4, 2, 3), 10, np.uint8))
        case "tokenizer":
            (tmp_path / "tokenizer.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="--data"):
        open_source(str(tmp_path))


def test_an_index_of_other_images_is_refused(tmp_path, tokenizer):
    write(tmp_path, tokenizer)
    facts = json.loads((tmp_path / "tokens.json").read_text()) | {"images": 5}
    (tmp_path / "tokens.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="damaged tokens"):
        open_source(str(tmp_path))


def test_models_of_other_channels_are_refused(tmp_path, tokenizer):
    write(tmp_path, tokenizer)
    with pytest.raises(UserError, match="takes 4 channels"):
        open_source(str(tmp_path), channels=4)
