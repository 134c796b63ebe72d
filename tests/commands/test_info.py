"""``info`` lists what there is."""

import pytest

from mim.cli import main


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["methods"], "MAE: masked autoencoders are scalable vision learners"),
        (["configs"], "mae/demo "),
        (["models", "vit_small_patch16_*"], "vit_small_patch16_224\n"),
        (["--what", "models", "--name", "test_vit*"], "test_vit2"),
    ],
)
def test_lists(args, expected, capsys):
    assert main("info", args) == 0
    assert expected in capsys.readouterr().out


def test_what_a_run_holds(tmp_path, capsys):
    (tmp_path / "summary.json").write_text('{"method": "mae", "loss": 0.5}')
    assert main("info", ["run", str(tmp_path)]) == 0
    assert "mae" in capsys.readouterr().out


def test_a_folder_that_is_no_run(tmp_path, capsys):
    assert main("info", ["run", str(tmp_path)]) == 2
    assert "no run there" in capsys.readouterr().err


def test_something_else_is_refused(capsys):
    assert main("info", ["metods"]) == 2
    assert "methods" in capsys.readouterr().err
