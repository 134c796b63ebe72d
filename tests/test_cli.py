"""The front of the command line: quick, torch-free help, one grammar, and mistakes that end in three lines."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hints import check_hint, own_options

from mim.cli import COMMANDS, EXAMPLES, PRETRAIN, help_page, main, translate
from mim.errors import UserError
from mim.options.grammar import read
from mim.options.recipes import method_names

TINY = str(Path(__file__).with_name("tiny.yaml"))
RESUMES = ("finetune", "segment")


# Help ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_one_screen_with_every_option_two_examples_and_no_types(command, capsys):
    assert main(command, ["--help"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert len(lines) <= 64
    assert max(map(len, lines)) <= 100
    assert text.count("python -m mim") == len(EXAMPLES[command]) == 2
    assert [name for name in own_options(command) if f"--{name}" not in text] == []
    assert "class '" not in text
    assert "type:" not in text
    assert str(Path(__file__).parents[1]) not in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_text(command):
    assert [name for name, option in own_options(command).items() if not option.text] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_of_a_help_can_be_typed(command):
    for line in help_page(command).splitlines():
        if line.startswith("  python -m mim"):
            check_hint(command, f"try: {line}")


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "pretrain"])
def test_the_whole_help_leaves_nothing_out(command):
    text = " ".join(help_page(command, whole=True).split())
    assert [name for name, option in own_options(command).items() if option.text not in text] == []


@pytest.fixture(scope="module")
def imported_by_help():
    """Command to what of the libraries for numbers it or one before it has imported: in one process, pretrain first.

    What takes long is importing; a clock would measure the machine.
    """
    code = (
        "import contextlib, io, json, sys\nfrom mim.cli import main\nfound = {}\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    with contextlib.redirect_stdout(io.StringIO()):\n"
        "        main(command, ['--help'])\n"
        "    found[command] = sorted({'torch', 'lightning', 'timm', 'numpy', 'PIL'} & set(sys.modules))\n"
        "print(json.dumps(found))"
    )
    order = sorted(COMMANDS, key=lambda command: command != "pretrain")
    asked = [sys.executable, "-c", code, json.dumps(order)]
    return json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_does_not_import_torch(command, imported_by_help):
    assert "torch" not in imported_by_help[command]


def test_help_of_pretrain_imports_no_library_for_numbers(imported_by_help):
    assert imported_by_help["pretrain"] == []


# Grammar -------------------------------------------------------------------------------------------------------------


def switches(command):
    return [name for name, option in own_options(command).items() if not option.value]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_switch_stands_alone_or_takes_true_or_false_in_every_command(command):
    known = own_options(command)
    for name in switches(command):
        for args, value in (
            ([f"--{name}"], "true"),
            ([f"--{name}", "false"], "false"),
            ([f"--{name}=false"], "false"),
            ([f"--{name.replace('_', '-')}", "--debug"], "true"),
        ):
            assert read(args, known)[0] == (name, value)


@pytest.mark.parametrize("command", RESUMES)
def test_resume_is_a_switch_where_the_weights_say_which_run(command):
    assert "resume" in switches(command)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("knn", "k"),
        ("linear_probe", "lrs"),
        ("finetune", "scale"),
        ("segment", "scales"),
        ("segment", "taps"),
        ("segment", "ignore"),
        ("compare", "runs"),
        ("compare", "methods"),
        ("visualize", "policy"),
        ("benchmark_reduction", "shares"),
        ("pretrain", "img_size"),
        ("pretrain", "data.mean"),
    ],
)
def test_a_list_is_the_same_with_and_without_brackets(command, name):
    known = own_options(command)
    plain, bracketed = (read([f"--{name}", text], known, dotted=True) for text in ("1,2", "[1,2]"))
    assert plain == bracketed


@pytest.mark.parametrize("form", [["--k", "10,20"], ["--k", "[10,20]"], ["--k=10,20"], ["--k", "[10, 20]"]])
def test_lists_reach_the_command_as_numbers(form, monkeypatch):
    import mim.commands.knn as knn

    seen = {}
    from mim.options.classification import ClassificationOptions

    def run(options: ClassificationOptions, k: tuple[int, ...] = (1,)) -> None:
        seen.update(weights=options.weights, k=k)

    monkeypatch.setattr(knn, "run", run)
    assert main("knn", ["--weights", "test_vit", *form]) == 0
    assert seen == {"weights": "test_vit", "k": (10, 20)}


def test_a_single_number_is_a_list_of_one_where_a_list_belongs():
    assert read(["--k", "10"], own_options("knn")) == [("k", "[10]")]
    assert read(["--taps", "4"], own_options("segment")) == [("taps", "4")]  # so many, evenly


def test_dashes_equal_signs_and_switches_are_understood():
    dotted = translate([f"--config={TINY}", "--batch-size=8", "--compile", "--trust", "false", "--a.b", "1"])
    assert dotted == [f"--config={TINY}", "--data.batch_size=8", "--compile=true", "--trust=false", "--a.b=1"]


def test_negative_values_are_values():
    assert translate([f"--config={TINY}", "--seed=3", "--nodata", "-1"])[-1] == "--data.nodata=-1"


# Recipes -------------------------------------------------------------------------------------------------------------


def test_the_built_in_images_take_the_demo_recipe():
    assert translate([])[0] == "--config=mae/demo"


@pytest.mark.parametrize("args", [["--data", "photos"], ["--model", "vit_tiny_patch16_224"]])
def test_own_images_and_own_models_take_the_default_recipe(args):
    assert translate(args)[0] == "--config=mae/default"


@pytest.fixture
def yaml_file(tmp_path):
    def write(text):
        (tmp_path / "mine.yaml").write_text(text)
        return str(tmp_path / "mine.yaml")

    return write


def test_a_config_with_a_model_stands_as_it_is():
    assert translate(["--config", TINY, "--epochs", "3"]) == [f"--config={TINY}", "--epochs=3"]


@pytest.mark.parametrize(
    ("text", "args", "recipe"),
    [
        ("epochs: 3", [], "mae/demo"),
        ("data: {path: photos}", [], "mae/default"),
        ("data: {path: photos}", ["--data", "builtin"], "mae/demo"),
        ("data: {batch_size: 8}", ["--method", "ibot"], "ibot/demo"),
    ],
)
def test_a_config_without_a_model_goes_over_the_recipe_of_the_method(text, args, recipe, yaml_file):
    config = yaml_file(text)
    assert translate(["--config", config, *args])[:2] == [f"--config={recipe}", f"--config={config}"]


@pytest.mark.parametrize("command", ["knn", "linear_probe", "finetune", "segment"])
def test_an_option_of_an_evaluation_wins_over_a_config_that_stands_behind_it(command, yaml_file, capsys):
    own = ["--weights", "w", "--threads", "3"]
    for args in ([*own, "--config", yaml_file("threads: 7")], ["--config", yaml_file("threads: 7"), *own]):
        with pytest.raises(SystemExit) as end:
            main(command, [*args, "--print_config"])
        assert end.value.code == 0
        assert yaml.safe_load(capsys.readouterr().out)["threads"] == 3


@pytest.mark.parametrize(
    ("config", "method", "own"),
    [
        (TINY, "ibot", "mae"),
        ("ibot/vit_small_patch16_224", "attmask", "ibot"),
        ("attmask/demo", "ibot", "attmask"),
        ("ibot/demo", "dinov2", "ibot"),
        ("dinov2/demo", "ibot", "dinov2"),
        ("momentum_mae/demo", "mae", "momentum_mae"),
    ],
)
def test_a_config_of_another_method_is_refused(config, method, own):
    with pytest.raises(UserError, match=f"is one of {own}") as mistake:
        translate(["--config", config, "--method", method])
    assert mistake.value.hint == f"--method {own}"


@pytest.mark.parametrize("method", method_names())
def test_a_config_of_the_method_itself_is_taken(method):
    assert translate(["--config", f"{method}/default", "--method", method]) == [f"--config={method}/default"]


def test_a_run_of_another_method_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text(Path(TINY).read_text())
    with pytest.raises(UserError, match="is one of mae"):
        translate(["--resume", str(tmp_path), "--method", "hpm"])
    assert translate(["--resume", str(tmp_path), "--method", "mae"]) == [f"--resume={tmp_path}"]


def test_a_recipe_that_is_not_there_is_answered_with_the_nearest():
    with pytest.raises(UserError) as mistake:
        translate(["--config", "configs/mae/vit_base_patch16_244.yaml"])
    assert mistake.value.hint == "--config mae/vit_base_patch16_224"


# Mistakes ------------------------------------------------------------------------------------------------------------


TYPED = [
    ("pretrain", ["--epoch", "3"], "try:   --epochs 3\n"),
    ("pretrain", ["--date", "photos"], "try:   --data photos\n"),
    ("pretrain", ["--method", "mea"], "--method mae"),
    ("pretrain", ["--epochs"], "--epochs X"),
    ("pretrain", ["photos"], "try:   --data photos\n"),
    ("pretrain", ["--epochs", "0"], "expected a float above 0"),
    ("pretrain", ["--resume", "nowhere"], "no run there"),
    ("pretrain", ["--config", "nowhere.yaml"], "no such file, nor a recipe"),
    ("knn", ["--wieghts", "runs/x"], "try:   --weights runs/x\n"),
    ("segment", ["--weights", "x", "--flop"], "try:   --flip\n"),
    ("finetune", ["--weights", "x", "--resum"], "try:   --resume\n"),
    ("finetune", ["--weights", "x", "--trust", "maybe"], "expected true or false"),
    ("export", ["--to"], "--to timm|onnx|torch-export"),
    ("knn", ["--weights", "x", "--k", "0"], "--k cannot be"),
]


@pytest.fixture(scope="module")
def answered():
    """Status, answer and whether torch was imported for each of these mistakes, made in one process."""
    code = (
        "import contextlib, io, json, sys\nfrom mim.cli import main\ntold = []\n"
        "for command, args, _ in json.loads(sys.argv[1]):\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as text:\n"
        "        status = main(command, args)\n"
        "    told.append((status, text.getvalue(), 'torch' in sys.modules))\n"
        "print(json.dumps(told))"
    )
    asked = [sys.executable, "-c", code, json.dumps(TYPED)]
    return json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize(
    "number", range(len(TYPED)), ids=lambda number: " ".join([TYPED[number][0], *TYPED[number][1]])
)
def test_a_typing_mistake_ends_in_a_suggestion_without_torch(number, answered):
    status, text, with_torch = answered[number]
    assert (status, with_torch) == (2, False)
    assert text.startswith("error: ")
    assert TYPED[number][2] in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("args", "why", "hint"),
    [
        (["benchmark", "--reduction", "tome"], "benchmark_reduction, pareto", "benchmark_reduction --help"),
        (["benchmark_reduction", "--against=plain"], "it is an option of benchmark\n", "benchmark --help"),
        (["pareto", "--json", "x.json"], "benchmark, benchmark_reduction\n", "benchmark_reduction --help"),
        (["knn", "--epochs", "3"], "pretrain, linear_probe, finetune, compare\n", "finetune --help"),
        (["pretrain", "--shares", "0.5"], "benchmark_reduction, pareto\n", "pareto --help"),
    ],
)
def test_an_option_of_other_commands_is_told_to_be_theirs(args, why, hint, capsys):
    assert main(*(args[0], args[1:])) == 2
    text = capsys.readouterr().err
    assert why in text
    assert text.endswith(f"try:   python -m mim {hint}\n")


def test_an_unknown_command_is_answered_with_the_nearest(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/x/mim/__main__.py"])
    assert main(None, ["pretrian"]) == 2
    assert "try:   python -m mim pretrain\n" in capsys.readouterr().err


def test_every_command_is_a_module_with_a_run_or_main():
    for command in COMMANDS:
        module = importlib.import_module(f"mim.commands.{command}")
        assert callable(getattr(module, "main" if command == "pretrain" else "run"))


def test_short_options_of_a_run_have_a_place_in_the_full_schema():
    assert [name for name, option in PRETRAIN.items() if not option.target] == ["method", "debug"]


def test_continue_takes_the_recipe_for_good_weights_and_the_model_that_they_are_of(tmp_path):
    recipe, model, origin = translate(["--method=ibot", "--continue", "vit_base_patch16_dinov3.lvd1689m"])
    assert recipe == "--config=ibot/continue-dinov3_vit_small"
    assert model == "--model.init_args.encoder.model=vit_base_patch16_dinov3"
    assert origin == "--continue=vit_base_patch16_dinov3.lvd1689m"
    home = tmp_path / "export" / "backbone"
    home.mkdir(parents=True)
    (home / "config.json").write_text('{"model_type": "dinov3_vit"}')
    assert len(translate(["--continue", str(home)])) == 2  # nor does a folder of Hugging Face
    (home / "config.json").write_text('{"architecture": "test_vit", "model_args": {"img_size": [32, 48]}}')
    for folder in (tmp_path, home):
        assert translate(["--continue", str(folder), "--img_size=64"])[1:] == [
            f"--model.init_args.encoder.model=local-dir:{home}",
            "--model.init_args.encoder.img_size=[32, 48]",  # its own, unless another one is given
            f"--continue={folder}",
            "--model.init_args.encoder.img_size=64",
        ]
    assert len(translate(["--continue", __file__])) == 2  # a file does not tell its model
    assert translate(["--continue=x.y", "--model=test_vit"])[1:] == [
        "--continue=x.y",
        "--model.init_args.encoder.model=test_vit",
    ]


def test_a_run_that_has_exported_nothing_cannot_be_continued_as_a_model(tmp_path, capsys):
    (tmp_path / "config.yaml").touch()
    assert main("pretrain", ["--continue", str(tmp_path)]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error == f"error: --continue {tmp_path}: this run has exported no model yet"
    assert f"export --run {tmp_path}   writes" in hint


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--continue=a", "--init=b"], "error: --continue and --init both name weights to start from"),
        (["--continue=a", "--resume=runs/001"], "error: --continue starts a new run, --resume goes on with an old one"),
        (["--continue=a", "--method=momentum_mae"], "error: --continue: momentum_mae has no recipe for it"),
    ],
)
def test_continue_is_refused_where_it_cannot_be_meant(options, line, capsys):
    assert main("pretrain", options) == 2
    assert capsys.readouterr().err.splitlines()[0] == line
