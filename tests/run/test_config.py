"""A config file is data: it sets what the signatures know, and names no class but ours."""

import copy
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from jsonargparse import Namespace

import mim.masking
from mim.cli import PRETRAIN
from mim.encoder import Encoder
from mim.errors import UserError
from mim.methods import MAE, OptimConfig
from mim.run.config import RunOptions, changes, flatten, parse, run_options, save_config, schema

TINY = f"--config={Path(__file__).parents[1] / 'tiny.yaml'}"
METHODS = ["MAE", "mim.methods.MAE"]
CLASS_KEYS = ["model", "model.init_args.masking", "model.init_args.encoder", "model.init_args.optim", "data.views"]
SETTINGS_OF_A_CALL = {"method", "debug", "print_config"}
"""Short options that the front or the parser itself answers."""


def changed_tiny(key, value):
    """The content of ``tiny.yaml`` with one dotted key set."""
    settings = yaml.safe_load(Path(TINY.partition("=")[2]).read_text())
    *folders, name = key.split(".")
    parent = settings
    for folder in folders:
        parent = parent.setdefault(folder, {})
    parent[name] = value
    return settings


@pytest.fixture(scope="module")
def known():
    return set(flatten(parse([TINY]))) | {action.dest for action in schema()._actions}


@pytest.mark.parametrize("name", sorted(PRETRAIN.keys() - SETTINGS_OF_A_CALL))
def test_every_short_option_exists_in_the_full_schema(name, known):
    assert PRETRAIN[name].target in known


@pytest.mark.parametrize("name", sorted(PRETRAIN))
def test_a_short_option_is_explained_in_words_of_its_own(name):
    text = PRETRAIN[name].text
    assert len(text.split()) > 1
    assert [option.text for option in PRETRAIN.values()].count(text) == 1


@pytest.mark.parametrize("name", ["seed", "log_every", "pictures", "pool", "probe_images", "max_bad", "data"])
def test_the_default_that_the_help_shows_is_that_of_the_schema(name):
    assert PRETRAIN[name].default == str(schema().get_defaults()[PRETRAIN[name].target])


def kinds_of(kind):
    """Names of the types, and words, that a kind is made of."""
    if get_origin(kind) is Literal:
        return {str(word) for word in get_args(kind)}
    return set().union(*map(kinds_of, get_args(kind))) or {kind.__name__}


# Lightning's options are what Lightning says; a part of a class is in that class's own signature.
KINDS = {
    name: option
    for name, option in PRETRAIN.items()
    if option.kind and not option.target.startswith(("trainer.", "model."))
}
PARTS = {"encoder": get_type_hints(Encoder.__init__), "optim": get_type_hints(OptimConfig)}


@pytest.mark.parametrize("name", sorted(KINDS))
def test_the_kind_of_a_short_option_is_that_of_the_full_schema(name):
    actions = {action.dest: getattr(action, "_typehint", None) for action in schema()._actions}
    assert kinds_of(KINDS[name].kind) <= kinds_of(actions[KINDS[name].target])


@pytest.mark.parametrize("name", [name for name in PRETRAIN if PRETRAIN[name].target.startswith("model.")])
def test_the_kind_of_an_option_of_a_part_is_that_of_its_signature(name):
    *_, part, setting = PRETRAIN[name].target.split(".")
    if PRETRAIN[name].kind is not None:
        assert kinds_of(PRETRAIN[name].kind) - {"list"} <= kinds_of(PARTS[part][setting])


WITHOUT_RATIO = ["MultiBlockMasking", "CosineMasking"]
"""Areas of blocks, and every ratio by turns."""
RATIOS = [name for name in mim.masking.__all__ if name not in ("Masking", *WITHOUT_RATIO)]


@pytest.mark.parametrize("policy", RATIOS)
def test_the_mask_ratio_reaches_every_policy(policy):
    needed = {"BoxMasking": ["--model.init_args.masking.init_args.boxes=[[0, 0, 1, 1]]"]}
    arguments = [TINY, f"--model.init_args.masking={policy}", *needed.get(policy, []), "--mask_ratio=0.6"]
    settings = getattr(mim.masking, policy).ratio_settings
    chosen = parse(arguments).model.init_args.masking.init_args
    assert settings
    assert [chosen[name] for name in settings] == [0.6] * len(settings)


@pytest.mark.parametrize("policy", WITHOUT_RATIO)
def test_a_policy_of_no_single_ratio_says_so(policy):
    with pytest.raises(UserError, match=rf"--mask_ratio 0.6: {policy} has no such setting"):
        parse([TINY, f"--model.init_args.masking={policy}", "--mask_ratio=0.6"])


def test_a_policy_without_a_ratio_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(mim.masking.RandomMasking, "ratio_settings", ())
    with pytest.raises(UserError, match=r"--mask_ratio 0.6: RandomMasking"):
        parse([TINY, "--mask_ratio=0.6"])


def test_the_mask_ratio_beside_its_dotted_name_is_refused():
    with pytest.raises(UserError, match="two words for one setting"):
        parse([TINY, "--mask_ratio=0.6", "--model.init_args.masking.init_args.ratio=0.7"])


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_named_with_or_without_its_module(name):
    assert parse([TINY, f"--model={name}"]).model.class_path == "mim.methods.MAE"


def test_settings_become_objects():
    method = schema().instantiate(parse([TINY, "--model.init_args.encoder.img_size=64"])).model
    assert isinstance(method, MAE)
    assert method.encoder.grid == (8, 8)


def test_later_options_win():
    config = parse([TINY, "--epochs=3", "--epochs=5", "--data.batch_size=32"])
    assert (config.epochs, config.data.batch_size) == (5, 32)


@pytest.mark.parametrize("behind", range(1, 4))
def test_an_option_wins_over_files_wherever_it_stands(tmp_path, behind):
    (tmp_path / "over.yaml").write_text("epochs: 7\nseed: 7\ndata: {batch_size: 7}\n")
    args = [TINY, "--epochs=3", "--data.batch_size=32"]
    config = parse([*args[:behind], f"--config={tmp_path / 'over.yaml'}", *args[behind:]])
    assert (config.epochs, config.data.batch_size, config.seed) == (3, 32, 7)


def test_run_options_are_the_runs_part_of_the_settings():
    assert run_options(parse([TINY, "--seed=4"])) == RunOptions(
        epochs=0.375, seed=4, save_every=0.0625, eval_every=0.2, log_every=1, pictures=2, probe_images=60, threads=1
    )


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [
        "--epochs=many",
        "--data.batch_size=1.5",
        "--data.num_workers=some",
        "--pool=max",
        "--model=Nonsense",
        "--model.init_args.encoder.positions=fourier",
        "--model.init_args.masking.init_args.ratio=[1]",
        "--nonsense.key=1",
        "--trainer.max_steps=3",  # the run's own business
        "--trainer.callbacks=[]",
        "--trainer.logger=true",
    ],
)
def test_a_value_that_does_not_fit_is_a_mistake_of_the_user(option):
    with pytest.raises(UserError):
        parse([TINY, option])


@pytest.mark.parametrize(
    ("key", "near"),
    [("data.batchsize", "data.batch_size"), ("trainer.presicion", "trainer.precision"), ("epocs", "epochs")],
)
def test_a_misspelt_key_is_answered_with_the_nearest(tmp_path, key, near):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(changed_tiny(key, 3)))
    for args in ([f"--config={tmp_path / 'config.yaml'}"], [TINY, f"--{key}=3"]):
        with pytest.raises(UserError) as mistake:
            parse(args)
        assert mistake.value.hint == f"did you mean --{near}?"


@pytest.mark.parametrize(
    "key",
    [
        "nonsense",
        "model.nonsense",
        "model.init_args.nonsense",
        "model.init_args.encoder.nonsense",
        "model.init_args.masking.init_args.nonsense",
        "model.init_args.optim.nonsense",
        "data.nonsense",
        "trainer.nonsense",
    ],
)
@pytest.mark.parametrize("value", [3, None, {"class_path": "RandomMasking"}])
def test_a_key_that_nothing_reads_is_refused_in_a_file(tmp_path, key, value):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(changed_tiny(key, value)))
    with pytest.raises(UserError):
        parse([f"--config={tmp_path / 'config.yaml'}"])


@pytest.mark.parametrize("text", ["model: [", "just text", "- 1\n- 2", "\x00", "model: !!python/object:os.system {}"])
def test_a_file_that_is_no_config_is_a_mistake_of_the_user(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError):
        parse([f"--config={tmp_path / 'config.yaml'}"])


@pytest.mark.parametrize("name", ["nowhere.yaml", "."])
def test_a_config_that_is_not_there_is_a_mistake_of_the_user(name):
    with pytest.raises(UserError):
        parse([f"--config={name}"])


# Hostile class paths -------------------------------------------------------------------------------------------------


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A module on the path that leaves a file behind when it is imported."""
    (tmp_path / "hostile_canary.py").write_text(
        f"open({str(tmp_path / 'imported')!r}, 'w').close()\nfrom mim.methods import *\nfrom mim.masking import *\n"
        "class Thing(MAE): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "imported"


@pytest.mark.parametrize("key", CLASS_KEYS)
@pytest.mark.parametrize("form", ["--{key}={path}", "--{key}.class_path={path}", "--{key}={{class_path: {path}}}"])
def test_a_foreign_class_is_neither_imported_nor_taken(canary, key, form):
    with pytest.raises(UserError):
        parse([TINY, form.format(key=key, path="hostile_canary.Thing")])
    assert not canary.exists()


@pytest.mark.parametrize("key", [*CLASS_KEYS, "trainer.strategy", "trainer.accelerator", "data.path"])
def test_a_foreign_class_in_a_file_is_neither_imported_nor_made(canary, key):
    settings = changed_tiny(key, {"class_path": "hostile_canary.Thing", "init_args": {}})
    (canary.parent / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError):
        parse([f"--config={canary.parent / 'config.yaml'}"])
    assert not canary.exists()


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "subprocess.Popen",
        "builtins.eval",
        "torch.nn.Linear",
        "torch.load",
        "lightning.pytorch.callbacks.ModelCheckpoint",
        "lightning.pytorch.demos.boring_classes.BoringModel",
        "mim.run.weights.export_backbone",
        "mim.methods.base.torch.nn.Linear",
        "mim.methodsx.MAE",
    ],
)
@pytest.mark.parametrize("key", ["model", "model.init_args.masking", "data.views"])
def test_code_that_is_installed_is_no_building_block(path, key):
    with pytest.raises(UserError):
        parse([TINY, f"--{key}={path}"])


@pytest.mark.parametrize("option", ["strategy", "accelerator"])
def test_names_for_the_trainer_stay_names(canary, option):
    assert parse([TINY, f"--trainer.{option}=hostile_canary.Thing"]).trainer[option] == "hostile_canary.Thing"
    assert not canary.exists()


# Writing down --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--seed=3", "--data.mean=[0.5,0.4,0.3]", "--model.init_args.encoder.kwargs={reg_tokens: 2}"],
        ["--model.init_args.masking=BlockMasking", "--trainer.precision=bf16-mixed", "--data.num_workers=auto"],
        ["--data.views=SingleView", "--data.views.init_args.flip=0", "--model.init_args.encoder.img_size=[32,64]"],
        ["--data.path=1234", "--data.licence=CC BY: 4.0 #1", "--epochs=1e-3"],
    ],
)
def test_a_saved_config_gives_the_same_settings(tmp_path, options):
    config = parse([TINY, *options])
    save_config(config, tmp_path / "config.yaml")
    assert flatten(parse([f"--config={tmp_path / 'config.yaml'}"])) == flatten(config)


def test_a_saved_config_holds_every_setting_of_the_run_and_none_of_the_call(tmp_path):
    config = parse([TINY, "--out=somewhere", "--overwrite=true"])
    save_config(config, tmp_path / "config.yaml")
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert set(saved) == {name.split(".")[0] for name in flatten(config)}
    assert not {"out", "overwrite", "resume", "config"} & set(saved)


def test_what_is_done_to_the_settings_of_one_call_is_unknown_to_the_next():
    def lists(part):
        """Every list of the settings, however deep."""
        for value in vars(part).values() if isinstance(part, Namespace) else part:
            if isinstance(value, list | Namespace):
                yield from lists(value)
        if isinstance(part, list):
            yield part

    before = copy.deepcopy(parse([TINY]))
    for found in lists(parse([TINY, "--epochs=3", "--model.init_args.masking=BlockMasking"])):
        found.append("more")
    assert parse([TINY]) == before


def test_changes_are_what_the_options_changed():
    given = [TINY, "--epochs=2", "--log_every=1"]
    assert changes(given, parse(given)) == {"epochs": (0.375, 2.0)}


def test_another_class_changes_its_settings_too():
    masking = "model.init_args.masking"
    given = [TINY, f"--{masking}=BlockMasking"]
    found = changes(given, parse(given))
    assert found[f"{masking}.class_path"] == ("mim.masking.RandomMasking", "mim.masking.BlockMasking")
    assert found[f"{masking}.init_args.ratio"] == (0.75, None)
