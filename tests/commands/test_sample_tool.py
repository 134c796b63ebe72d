"""What ``sample`` draws, which part of an image it hides, and which runs it has no use for."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from mim.cli import main
from mim.commands.sample import hidden_part
from mim.data.pretrain import PretrainData
from mim.encoder import Encoder
from mim.methods import MaskGIT
from mim.pictures.strips import read_strip

RUN = ["--run", str(Path(__file__).parents[1] / "old_run" / "mae")]


@pytest.fixture
def maskgit(monkeypatch, tmp_path):
    """A method that draws, in the place of that of the run; and an empty folder."""
    kwargs = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    method = MaskGIT(Encoder("vit_tiny_patch16_224", img_size=16, patch_size=4, kwargs=kwargs), classes=2).eval()
    data = PretrainData("shapes", num_workers=0)
    monkeypatch.setattr("mim.run.weights.load_method", lambda run: (method, data, None))
    monkeypatch.chdir(tmp_path)


def test_images_out_of_nothing_lie_side_by_side_six_times_as_large(maskgit):
    assert main("sample", [*RUN, "--count", "5", "--steps", "2", "--classes", "0,1"]) == 0
    with Image.open("sample.png") as picture:
        assert picture.size == (6 * (3 * 18 + 2), 6 * (2 * 18 + 2))


def test_an_image_with_a_hidden_part_stands_beside_two_drawings_of_it(maskgit):
    assert main("sample", [*RUN, "--hide", "middle", "--count", "2", "--steps", "2", "--out", "rows.png"]) == 0
    assert {title: len(tiles) for title, tiles in read_strip(Path("rows.png")).items()} == {
        "input": 2,
        "hidden": 2,
        "drawn": 2,
        "another": 2,
    }


def test_a_run_of_a_method_that_draws_nothing_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main("sample", RUN) == 2
    assert capsys.readouterr().err.startswith("error: mae draws no images\nwhy:   it predicts no ids\n")


def test_middle_and_border_are_each_others_rest_and_the_right_is_half():
    middle, border, right = (hidden_part(hide, (4, 6)) for hide in ("middle", "border", "right"))
    assert middle.int().tolist() == [[0] * 6, [0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0], [0] * 6]
    assert torch.equal(border, ~middle)
    assert right.int().tolist() == [[0, 0, 0, 1, 1, 1]] * 4
