from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

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
    assert len(result["knn"]["untrained"]) == len(result["linear"]["pixels"]) == 3
    assert result["knn"]["chance"] == 5 / 12  # of the dozen that are asked, five are of one class


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("few", [30, 10])
def test_probes_of_a_run_show_the_balanced_accuracy_where_classes_are_uneven(tmp_path, few, held_out) -> None:
    for part in ("train", "val") if held_out else (".",):
        for name, count in (("few", few), ("many", 30)):
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (16, 16), (number, 7 * number % 256, len(name))).save(folder / f"{number}.png")
    data = PretrainData(str(tmp_path / "data"), num_workers=0)
    data.open((16, 16), 3, seed=0)
    run = Evaluation(RunLog(RunFolder(tmp_path), 1), data, steps=[], pool="mean", probe_images=300, pictures=0)
    result = run.final(encoder(0), [encoder(1), encoder(2), encoder(3)], encoder(4))
    values = run._values(SimpleNamespace(evaluated=encoder(0)))
    kinds = {"knn_balanced", "linear_balanced"}
    if few == 30:
        assert not kinds & result.keys()
        assert not any("balanced" in name for name in values)
        return
    assert result["images_per_class"] == {"few": 10, "many": 30}
    for kind in kinds:
        assert {who: len(scores) for who, scores in result[kind].items()} == {"trained": 3, "untrained": 3, "start": 3}
        assert 0 <= values[f"val/{kind}"] <= 1


def test_evaluations_are_rows_of_one_table_to_those_who_watch(evaluation: Evaluation, monkeypatch) -> None:
    monkeypatch.setattr("mim.callbacks.evaluation.paint", lambda text, colour: f"[{text.strip()}]" if colour else text)
    values = {"val/knn_top1": 0.5, "val/linear_top1": 0.625, "val/rankme": 30.4}
    first = evaluation._table_row("0", values, 128).splitlines()
    assert [line.split() for line in first] == [["[epoch", "knn", "linear", "rankme]"], ["0[50.0%][62.5%]", "30/128"]]
    later = evaluation._table_row("8", values | {"val/knn_top1": 0.4, "val/linear_top1": 0.7}, 128)
    assert later.split() == ["8", "40.0%[70.0%]", "30/128"]
