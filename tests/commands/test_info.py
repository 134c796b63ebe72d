"""``info`` lists what there is."""

import pytest

from mim.cli import main


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["methods"], "MAE: masked autoencoders are scalable vision learners"),
        (["configs"], "configs/mae/demo.yaml"),
        (["models", "vit_small_patch16_*"], "vit_small_patch16_224\n"),
        (["--what", "models", "--name", "test_vit*"], "test_vit2"),
    ],
)
def test_every_list_names_what_there_is(args, expected, capsys):
    assert main("info", args) == 0
    assert expected in capsys.readouterr().out


def test_a_run_is_shown_with_what_it_holds(tmp_path, capsys):
    (tmp_path / "summary.json").write_text('{"method": "mae", "loss": 0.5}')
    assert main("info", ["run", str(tmp_path)]) == 0
    assert "mae" in capsys.readouterr().out


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main("info", ["run", str(tmp_path)]) == 2
    assert "no run there" in capsys.readouterr().err


def test_a_topic_that_info_does_not_know_is_refused(capsys):
    assert main("info", ["metods"]) == 2
    assert "methods" in capsys.readouterr().err
