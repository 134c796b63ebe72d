"""The front of the command line: quick, torch-free help, and mistakes that end in three lines."""

import subprocess
import sys
import time

import pytest

from mim.cli import COMMANDS, PRETRAIN, main, translate


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "pretrain"])
def test_help_of_every_command_works(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main(command, ["--help"])
    assert stop.value.code == 0
    assert "--" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_does_not_import_torch(command):
    code = (
        "import sys\nfrom mim.cli import main\n"
        f"try: main({command!r}, ['--help'])\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_help_of_pretrain_fits_one_screen_and_takes_under_a_second_of_cpu(capsys):
    start = time.process_time()
    assert main("pretrain", ["--help"]) == 0
    assert time.process_time() - start < 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 48
    assert max(map(len, lines)) <= 120


def test_the_built_in_images_take_the_demo_recipe():
    assert translate([])[0].endswith("configs/mae/demo.yaml")


def test_own_images_take_the_default_recipe():
    assert translate(["--data", "photos"])[0].endswith("configs/mae/default.yaml")


def test_a_config_replaces_the_recipe():
    assert translate(["--config", "my.yaml", "--epochs", "3"]) == ["--config=my.yaml", "--epochs=3"]


def test_dashes_equal_signs_and_switches_are_understood():
    dotted = translate(["--config=c.yaml", "--batch-size=8", "--compile", "--trust", "false", "--a.b", "1"])
    assert dotted == ["--config=c.yaml", "--data.batch_size=8", "--compile=true", "--trust=false", "--a.b=1"]


def test_negative_values_are_values():
    assert translate(["--config=c.yaml", "--seed", "-1"])[-1] == "--seed=-1"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--epoch", "3"], "--epochs"),
        (["--date", "photos"], "--data"),
        (["--method", "mea"], "--method mae"),
        (["--epochs"], "--epochs N"),
        (["photos"], "--data PATH"),
    ],
)
def test_a_typing_mistake_ends_in_a_suggestion_without_torch(args, expected):
    code = (
        f"import sys\nfrom mim.cli import main\nstatus = main('pretrain', {args!r})\n"
        "sys.exit(status if 'torch' not in sys.modules else 99)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert expected in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unknown_command_is_answered_with_the_nearest():
    code = "from mim.cli import main; raise SystemExit(main(None, ['pretrian']))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert "pretrain" in result.stderr


def test_every_short_option_explains_itself():
    assert all(option.text for option in PRETRAIN.values())
