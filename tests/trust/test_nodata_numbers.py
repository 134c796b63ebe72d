"""Nodata in every method that there is: what number stands for it changes nothing."""

import math

import numpy as np
import pytest
import torch
from recipes import ROOT, SETTINGS

from mim.data.pretrain import PretrainData
from mim.methods import Plan
from mim.options.pretraining import translate
from mim.run.config import instantiate, parse

NUMBERS = (math.nan, -9999.0, 0.0, 1e20)


def images(folder, number):
    """Four images of three bands in 1..2, each with a corner that was not measured."""
    folder.mkdir()
    for index in range(4):
        values = np.random.default_rng(index).uniform(1, 2, (48, 40, 3)).astype(np.float32)
        values[: 10 + 6 * index, :24] = number
        np.save(folder / f"{index}.npy", values)
    return str(folder)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_number_that_stands_for_nodata_changes_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    objects = instantiate(parse(translate(SETTINGS[name])))
    method, losses = objects.model, []
    method.plan, method.log, method.log_dict = Plan(max_steps=9), lambda *_: None, lambda *_: None
    method.setup("fit")
    for place, number in enumerate(NUMBERS):
        nodata = None if math.isnan(number) else number
        data = PretrainData(images(tmp_path / str(place), number), objects.data.views, 4, 0, nodata=nodata)
        data.open(method.encoder.img_size, 3, 0)
        data.check()
        views, labels, _, valid = data.batch(0)
        assert len(valid) == 1
        torch.manual_seed(0)
        losses.append(method.training_step((views, labels, *valid), 0).item())
    assert math.isfinite(losses[0])
    assert set(losses) == {losses[0]}
