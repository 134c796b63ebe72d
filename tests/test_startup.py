"""What is told before anything heavy is imported. Modules are counted, never seconds: a clock measures the machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm

from mim.cli import PRETRAIN
from mim.errors import UserError
from mim.options.ranges import fits
from mim.options.timm_names import check_model, check_weights, model_names

HEAVY = {"torch", "timm", "torchvision", "lightning", "kornia", "torchmetrics", "scipy", "numpy", "matplotlib"}
TINY = str(Path(__file__).with_name("tiny.yaml"))

MISTAKES = [
    ("pretrain", "--data photoz", "--data photoz: no such folder"),
    ("pretrain", "--data empty", "0 images in 1 folder"),
    ("pretrain", "--data empty.csv", "the list is empty"),
    ("pretrain", "--data photo.zip", "is a file of another type"),
    ("pretrain", "--data a-{0..1}.tar", "a-0.tar"),
    ("pretrain", "--model vit_tinny_patch16_224", "--model vit_tiny_patch16_224"),
    ("pretrain", "--init nowhere.pth", "--init nowhere.pth: no such file, folder or timm weights"),
    ("pretrain", "--continue vit_smal_patch16_dinov3.lvd1689m", "--continue vit_small_patch16_dinov3.lvd1689m"),
    ("pretrain", "--out used", "--out used holds a run already"),
    ("pretrain", "--out photo.zip/run", "--out photo.zip/run cannot be written"),
    ("pretrain", "--resume nowhere", "--resume nowhere: no run there"),
    ("pretrain", "--value_range 5,1", "--value_range 5,1 is no range"),
    ("pretrain", "--bands 0", "--bands 0 is no list of channels"),
    ("knn", "--weights nowhere", "--weights nowhere: no such file, folder or timm weights"),
    ("knn", "--weights test_vit --data photoz", "--data photoz: no such folder"),
    ("linear_probe", "--weights test_vit --data photoz", "--data photoz: no such folder"),
    ("finetune", "--weights test_vit --data empty", "0 images in 1 folder"),
    ("segment", "--weights test_vit --data photoz", "--data photoz: no such folder"),
    ("features", "--weights test_vit --data photoz", "--data photoz: no such folder"),
    ("check_data", "--data photoz", "--data photoz: no such folder"),
    ("visualize", "--model vit_tinny_patch16_224", "has no such model"),
    ("benchmark", "--model vit_tinny_patch16_224", "has no such model"),
]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each of the mistakes is answered with, and the heavy modules that were imported until then."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "empty").mkdir()
    (folder / "empty.csv").touch()
    (folder / "photo.zip").touch()
    (folder / "used").mkdir()
    (folder / "used" / "config.yaml").touch()
    code = (
        "import contextlib, io, json, sys\nfrom mim.cli import main\ntold = []\n"
        "for command, args, _ in json.loads(sys.argv[1]):\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as text:\n"
        "        status = main(command, args.split())\n"
        "    told.append((status, text.getvalue(), sorted(set(json.loads(sys.argv[2])) & set(sys.modules))))\n"
        "print(json.dumps(told))"
    )
    arguments = [sys.executable, "-c", code, json.dumps(MISTAKES), json.dumps(sorted(HEAVY))]
    result = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=True)
    return dict(zip(MISTAKES, json.loads(result.stdout), strict=True))


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: " ".join(mistake[:2]))
def test_a_mistake_that_needs_no_model_is_told_before_anything_heavy_is_imported(mistake, told):
    status, text, imported = told[mistake]
    assert (status, imported) == (2, [])
    assert mistake[2] in text
    assert text.startswith("error: ")


@pytest.mark.parametrize("what", ["methods", "models", "configs"])
def test_lists_import_nothing_heavy(what):
    code = f"import sys\nfrom mim.cli import main\nmain('info', ['{what}'])\nsys.exit(bool({HEAVY} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) >= 5


@pytest.mark.parametrize("module", ["vision_transformer", "eva"])
@pytest.mark.parametrize("pattern", ["*", "vit_small*", "eva02*", "nothing"])
def test_names_of_models_are_those_that_timm_lists(module, pattern):
    assert model_names(pattern, module) == timm.list_models(pattern, module=module)


def test_no_model_or_weights_that_timm_knows_are_refused():
    for name in [*timm.list_models(), *timm.list_pretrained(), "vit_tiny_patch16_224_in21k"]:  # the last: its old name
        check_model(name)
        check_weights(name)
    for elsewhere in ("hf-hub:timm/x", "hf_hub:timm/x", "local-dir:nowhere"):
        check_model(elsewhere)


@pytest.mark.parametrize("name", ["vit_tinny_patch16_224", "", "../x", "vit_tinny_patch16_224.mae"])
def test_a_name_that_timm_does_not_know_is_refused(name):
    with pytest.raises(UserError, match="has no such model"):
        check_model(name)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("img_size", ["224", "[96,128]"], ["0", "a", "[96,0]", "1.5"]),
        ("patch_size", ["16"], ["0", "[8,8]"]),
        ("batch_size", ["256"], ["0", "1.5", "x"]),
        ("blr", ["1.5e-4"], ["0", "-1", "x"]),
        ("nodata", ["-9999", "0.5"], ["x", "nan"]),
        ("devices", ["1", "auto", "-1", "[0,1]"], ["0", "x"]),
        ("precision", ["32-true", "bf16-mixed", "16", "32"], ["half", "8", "bf16-true"]),
        ("accumulate", ["4"], ["0", "x"]),
        ("num_workers", ["0", "auto"], ["-1", "x"]),
        ("pool", ["cls", "mean"], ["max"]),
    ],
)
def test_values_of_short_options_are_told_apart_without_the_schema(name, good, bad):
    kind = PRETRAIN[name].kind
    assert [value for value in [*good, *bad] if fits(kind, value)] == good


def test_every_short_option_with_a_number_says_what_it_may_be():
    numbers = {name for name, option in PRETRAIN.items() if option.value[:1] in ("N", "X") and option.value[1:2] != "A"}
    assert {name for name in numbers if PRETRAIN[name].kind is None} == set()
