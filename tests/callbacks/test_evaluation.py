from collections import Counter
from pathlib import Path

import pytest
import torch

from mim.callbacks import Evaluation, RunLog
from mim.data.pretrain import PretrainData
from mim.data.shapes import ShapeSource
from mim.encoder import Encoder
from mim.run.folder import RunFolder


@pytest.fixture
def evaluation(tmp_path: Path) -> Evaluation:
    data = PretrainData("shapes", num_workers=0)
    data.open((16, 16), 3, seed=0)
    return Evaluation(RunLog(RunFolder(tmp_path), 1), data, steps=[], pool="mean", probe_images=60, pictures=0)


def encoder(seed: int) -> Encoder:
    torch.manual_seed(seed)
    return Encoder("test_vit", img_size=16, patch_size=8)


def test_features_of_several_encoders_are_those_of_each_alone(evaluation: Evaluation) -> None:
    several = evaluation.features(encoder(0), encoder(1))
    for seed in (0, 1):
        (alone,) = evaluation.features(encoder(seed))
        assert all(torch.equal(*pair) for pair in zip(several[seed], alone, strict=True))


def test_final_probes_read_an_image_once(evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    read, reads = ShapeSource.read, Counter()

    def counted(source: ShapeSource, index: int) -> torch.Tensor:
        reads[source.split, index] += 1
        return read(source, index)

    monkeypatch.setattr(ShapeSource, "read", counted)
    result = evaluation.final(encoder(0), [encoder(1), encoder(2), encoder(3)])
    assert set(reads.values()) == {1}
    assert len(reads) == 60 + 12
    assert len(result["knn"]["untrained"]) == 3
