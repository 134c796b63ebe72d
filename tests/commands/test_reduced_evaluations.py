"""``--reduction`` of the evaluations, driven as a user drives it."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from mim.cli import main
from mim.commands import make_shapes
from mim.reduction import TokenReducedViT
from mim.reduction.files import load_reduction
from mim.transfer.measurement import section_name


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def knn(weights, photos, *args):
    common = ["--num_workers", "0", "--k", "[3]", "--seeds", "1"]
    return main("knn", ["--weights", weights, "--data", str(photos), *common, *map(str, args)])


def finetune(weights, photos, *args):
    short = ["--num_workers", "0", "--epochs", "3", "--warmup_epochs", "1", "--batch_size", "12", "--device", "cpu"]
    short += ["--from_scratch", "false", "--mixup", "0", "--cutmix", "0", "--blr", "0.02"]
    return main("finetune", ["--weights", weights, "--data", str(photos), *short, *map(str, args)])


def result(folder):
    return json.loads(Path(folder, "metrics.json").read_text())


@pytest.fixture
def masks(tmp_path):
    make_shapes.run(tmp_path / "masks", train=10, val=5, size=32)
    return tmp_path / "masks"


def segment(weights, masks, *args):
    tiny = [
        "--steps",
        "3",
        "--batch_size",
        "4",
        "--device",
        "cpu",
        "--num_workers",
        "0",
        "--devices",
        "1",
        "--pictures",
        "1",
    ]
    return main("segment", ["--weights", weights, "--data", str(masks), *tiny, *map(str, args)])


def test_neighbours_of_reduced_features_say_so_and_have_a_cache_of_their_own(weights, photos):
    assert knn(weights, photos, "--out", "whole") == 0
    assert knn(weights, photos, "--out", "reduced", "--pool", "mean", "--reduction", "evit:0.5") == 0
    assert knn(weights, photos, "--out", "other", "--pool", "mean", "--reduction", "evit:0.6") == 0
    assert len(list(Path("runs/features").iterdir())) == 3 * 4
    assert "tokens reduced by TopKPruning(schedule=KeepRate(keep=0.5, at=None)" in result("reduced")["protocol"]
    facts = result("reduced")["reduction"]
    assert facts["name"] == "evit:0.5"
    assert facts["share_of_multiply_adds"] < result("other")["reduction"]["share_of_multiply_adds"] < 1
    assert "reduction" not in result("whole")


def test_a_reduction_that_reduces_nothing_changes_nothing(weights, photos):
    assert knn(weights, photos, "--out", "whole", "--pool", "both", "--layers", 2) == 0
    assert knn(weights, photos, "--out", "same", "--pool", "both", "--layers", 2, "--reduction", "tome:0") == 0
    assert result("whole")["metrics"] == result("same")["metrics"]


@pytest.mark.parametrize("head", ["linear", "attentive"])
def test_probes_learn_on_reduced_features(weights, photos, head):
    options = ["--weights", weights, "--data", str(photos), "--num_workers", "0", "--epochs", "2", "--seeds", "1"]
    options += ["--head", head, "--batch_size", "8", "--warmup_epochs", "1", "--lrs", "[0.01]", "--out", "probe"]
    assert main("linear_probe", [*options, "--reduction", "tome:2"]) == 0
    assert "ToMe(schedule=PerBlock(r=2" in result("probe")["protocol"]


def test_fine_tuning_trains_on_fewer_tokens(weights, photos):
    assert finetune(weights, photos, "--out", "tuned", "--reduction", "tome:2", "--anneal", "[0.0,0.5]") == 0
    assert "ToMe(schedule=PerBlock(r=2" in result("tuned")["protocol"]
    assert "annealed over 0 to 0.5 of it" in result("tuned")["protocol"]
    assert not Path("tuned/export/reduction.safetensors").exists()  # nothing was learnt
    assert knn("tuned/export", photos, "--out", "scored", "--pool", "mean", "--reduction", "tuned/export") == 0
    assert "ToMe(schedule=PerBlock(r=2" in result("scored")["protocol"]
    model = timm.create_model("local-dir:tuned/export", pretrained=True).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_what_a_trained_reduction_has_learnt_lies_beside_the_model(weights, photos):
    assert finetune(weights, photos, "--out", "tuned", "--reduction", "cropr:2", "--ema", 0.9) == 0
    vit = timm.create_model("local-dir:tuned/export", pretrained=True).eval()
    reduction = load_reduction(Path("tuned/export"), vit)
    assert TokenReducedViT(vit, reduction)(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    assert reduction.routers[0].head.out_features == 3
    assert knn("tuned/export", photos, "--out", "scored", "--reduction", "tuned/export") == 0
    assert "Cropr(" in result("scored")["protocol"]


@pytest.mark.parametrize(
    "options",
    [
        ["--reduction", "expedite:0.4"],
        ["--reduction", "tome:1", "--head", "knn", "--inference", "whole"],
        ["--reduction", "cropr:2", "--finetune", "true", "--anneal", "0.5", "--taps", "2"],
    ],
)
def test_segmentation_reads_features_that_were_put_back(weights, masks, options):
    assert segment(weights, masks, "--out", "result", *options) == 0
    assert "tokens reduced by" in result("result")["protocol"]
    assert result("result")["reduction"]["name"] == options[1]


@pytest.mark.parametrize(
    ("command", "args", "line"),
    [
        (knn, ["--reduction", "cropr"], "python -m mim finetune --weights WEIGHTS --reduction cropr"),
        (knn, ["--reduction", "nonsense"], "--reduction nonsense: there is no such reduction"),
        (knn, ["--reduction", "."], "holds no reduction"),
        (finetune, ["--reduction", "tome", "--anneal", "[0.5,0.1]"], "--anneal [0.5,0.1]"),
        (segment, ["--reduction", "cropr"], "random until they are trained"),
    ],
)
def test_mistakes_end_in_lines_that_help(weights, photos, masks, command, args, line, capsys):
    assert command(weights, masks if command is segment else photos, *args) == 2
    assert line.replace("WEIGHTS", str(weights)) in capsys.readouterr().err


@pytest.mark.parametrize("reduction", ["dynamicvit:0.6", "ltp:0.1", "bat:0.6", "dart_greedy:0.6"])
def test_every_other_reduction_can_be_fine_tuned_with(weights, photos, reduction):
    assert finetune(weights, photos, "--out", "tuned", "--reduction", reduction, "--epochs", 1) == 0
    assert result("tuned")["reduction"]["name"] == reduction


def test_early_exit_learns_from_masks_alone(weights, photos, masks, capsys):
    assert segment(weights, masks, "--out", "result", "--reduction", "dtop:0.6", "--finetune", "true") == 0
    assert "EarlyExit(" in result("result")["protocol"]
    assert finetune(weights, photos, "--reduction", "dtop") == 2
    assert f"python -m mim segment --finetune --weights {weights} --reduction dtop" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reduction", "folder"),
    [(None, "knn"), ("tome:8", "knn-tome-8"), ("topk:0.7", "knn-topk-0.7"), ("some/where/mine.yaml", "knn-mine")],
)
def test_every_setting_of_a_reduction_has_a_section_of_its_own(reduction, folder):
    assert section_name("knn", reduction) == folder


@pytest.mark.middle
def test_a_trained_reduction_outlives_the_file_that_described_it(weights, photos):
    """What was exported is all that is needed to score with it, or to train on from it."""
    Path("mine.yaml").write_text(
        "reduction: {class_path: mim.reduction.Cropr, init_args: {dim: 64, depth: 6, num_classes: 3, r: 2}}"
    )
    assert finetune(weights, photos, "--out", "tuned", "--reduction", "mine.yaml") == 0
    Path("mine.yaml").unlink()
    assert knn("tuned/export", photos, "--out", "scored", "--reduction", "tuned/export") == 0
    assert "Cropr(dim=64" in result("scored")["protocol"]
    assert finetune("tuned/export", photos, "--out", "again", "--reduction", "tuned/export", "--epochs", 1) == 0
    states = [load_file(Path(folder, "export/reduction.safetensors")) for folder in ("tuned", "again")]
    assert states[0].keys() == states[1].keys()
    assert not torch.equal(states[0]["routers.0.queries"], states[1]["routers.0.queries"])


@pytest.mark.middle
def test_a_reduced_model_learns_from_the_whole_one(weights, photos, capsys):
    assert finetune(weights, photos, "--out", "whole", "--epochs", 1) == 0
    options = ["--out", "tuned", "--reduction", "dynamicvit:0.6", "--teacher", "whole/export", "--ema", 0.9]
    assert finetune(weights, photos, *options, "--epochs", 1) == 0
    assert "agreeing with a teacher" in result("tuned")["protocol"]
    timm.create_model("local-dir:tuned/export", pretrained=True)
    assert finetune(weights, photos, "--out", "tuned", "--teacher", "whole/export") == 2
    assert "nothing is reduced" in capsys.readouterr().err
    assert finetune(weights, photos, "--out", "tuned", "--reduction", "tome:1", "--teacher", "whole") == 2
    assert "is no exported model" in capsys.readouterr().err
    assert finetune(weights, photos, "--out", "tuned", "--reduction", "tome:1", "--teacher", weights) == 2
    assert "another kind of model" in capsys.readouterr().err


def test_learnt_thresholds_become_a_file_of_fixed_numbers(weights, photos):
    assert finetune(weights, photos, "--out", "tuned", "--reduction", "ltp:0.2") == 0
    fixed = "tuned/export/static-ltp-0.2.yaml"
    assert finetune(weights, photos, "--out", "fixed", "--reduction", fixed, "--epochs", 1) == 0
    assert "TopKPruning(schedule=Counts(counts=" in result("fixed")["protocol"]
    assert section_name("knn", fixed) == "knn-static-ltp-0.2"


def test_thresholds_rest_in_a_second_stage_with_hard_masks(weights, photos):
    assert finetune(weights, photos, "--out", "tuned", "--reduction", "ltp:0.2", "--epochs", 1) == 0
    settings = Path("tuned/export/reduction.yaml")
    settings.write_text(settings.read_text().replace("hard: false", "hard: true"))
    assert finetune("tuned/export", photos, "--out", "again", "--reduction", "tuned/export", "--epochs", 1) == 0
    assert "hard=True" in result("again")["protocol"]
    states = [load_file(Path(folder, "export/reduction.safetensors")) for folder in ("tuned", "again")]
    assert torch.equal(states[0]["thresholds"], states[1]["thresholds"])


def test_a_resumed_training_is_not_that_of_an_edited_file(weights, photos, capsys):
    schedule = "{class_path: mim.reduction.PerBlock, init_args: {r: %d}}"
    text = f"reduction: {{class_path: mim.reduction.ToMe, init_args: {{schedule: {schedule}}}}}"
    Path("mine.yaml").write_text(text % 2)
    assert finetune(weights, photos, "--out", "tuned", "--reduction", "mine.yaml", "--epochs", 1) == 0
    Path("mine.yaml").write_text(text % 3)
    assert (
        finetune(weights, photos, "--out", "tuned", "--reduction", "mine.yaml", "--epochs", 1, "--resume", "true") == 2
    )
    assert "r=2" in capsys.readouterr().err
