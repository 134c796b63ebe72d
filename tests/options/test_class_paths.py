"""Class paths lead to our own building blocks, and to packages that the user has named; nowhere else."""

import sys

import pytest
import yaml
from jsonargparse import ArgumentParser
from jsonargparse._common import parsing_settings

from mim.errors import UserError
from mim.masking import Masking, RandomMasking
from mim.options.class_paths import PluginError, check_plugins, known_class_paths, plugins, plugins_in_use

PACKAGE = '''
"""Somebody else's parts."""

from mim.masking import RandomMasking


class Mine(RandomMasking):
    """Mine."""
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The name of a package in the working folder, which nobody has imported."""
    (tmp_path / "their_parts.py").write_text(PACKAGE)
    monkeypatch.chdir(tmp_path)
    yield "their_parts"
    sys.modules.pop("their_parts", None)


def policy(class_path):
    with known_class_paths():
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(Masking, "masking")
        return parser.instantiate(parser.parse_args([f"--masking={class_path}"])).masking


def test_a_class_of_ours_needs_no_plugin():
    assert type(policy("mim.masking.RandomMasking")) is RandomMasking


def test_a_class_of_a_plugin_is_used_while_the_plugin_is_named(package):
    with plugins([package]):
        assert type(policy("their_parts.Mine")).__name__ == "Mine"
        assert plugins_in_use() == ["their_parts"]
    assert plugins_in_use() == []


@pytest.mark.parametrize("imported", [False, True])
def test_it_is_refused_otherwise_even_if_somebody_has_imported_it(imported, package):
    if imported:
        with plugins([package]):
            pass
    with pytest.raises(Exception, match=r"Importing 'their_parts\.Mine' is not allowed"):
        policy("their_parts.Mine")
    assert ("their_parts" in sys.modules) == imported


def test_a_plugin_opens_no_door_to_other_packages(package):
    with plugins([package]), pytest.raises(Exception, match="is not allowed"):
        policy("torch.nn.Linear")


def test_importing_says_that_code_runs(package, capsys):
    with plugins([package]):
        pass
    assert capsys.readouterr().out == "  plugin  their_parts imported, its code runs: their_parts.py\n"


def test_the_programs_own_parsers_keep_their_settings():
    before = dict(parsing_settings)
    with known_class_paths():
        assert parsing_settings != before
    assert parsing_settings == before


def test_the_working_folder_is_searched_last_and_only_inside(package, tmp_path):
    before = list(sys.path)
    with plugins([package]):
        assert sys.path == [*before, str(tmp_path)]
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "content", "why", "hint"),
    [
        (
            "absent_parts",
            None,
            "No module named 'absent_parts'",
            "start in the folder that holds it, or pip install it",
        ),
        ("broken_parts", "x = 1 / 0", "ZeroDivisionError: division by zero (", "python -c 'import broken_parts'"),
        (
            "needing_parts",
            "import absent_parts",
            "No module named 'absent_parts' (",
            "python -c 'import needing_parts'",
        ),
        ("parts/mine.py", None, "it is what import takes", "--plugin mine   in the folder that holds it"),
        ("--x", None, "it is what import takes", "--plugin my_package"),
    ],
)
def test_a_package_that_cannot_be_imported_is_refused_by_name(name, content, why, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content:
        (tmp_path / f"{name}.py").write_text(content)
    with pytest.raises(PluginError) as error, plugins([name]):
        pass
    assert f"--plugin {name}" in error.value.error
    assert why in error.value.why
    assert error.value.hint == hint
    assert plugins_in_use() == []


@pytest.mark.parametrize("recorded", ["their_parts", ["their_parts"]])
def test_a_file_that_records_a_plugin_is_refused_until_it_is_named(recorded, package, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"plugin": recorded}))
    with pytest.raises(UserError) as error:
        check_plugins(file, "--config")
    assert str(file) in error.value.error
    assert error.value.hint.startswith("--plugin their_parts ")
    assert package not in sys.modules
    with plugins([package]):
        check_plugins(file, "--config")


@pytest.mark.parametrize("text", ["", "plugin:", "plugin: []", "- plugin", "a: 1"])
def test_a_file_without_plugins_needs_none(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    check_plugins(tmp_path / "config.yaml", "--config")
