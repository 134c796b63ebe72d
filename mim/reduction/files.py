"""Reductions in and out: what ``--reduction`` names, and what fine-tuning leaves beside the model that it trained."""

import re
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from safetensors.torch import load_file, save_file

from mim.errors import UserError
from mim.options.class_paths import known_class_paths, plugin_hint, refused_class
from mim.options.config_file import check_config_file
from mim.program import called, quoted
from mim.reduction import Labels, TokenReduction
from mim.reduction.recipes import named_reduction
from mim.reduction.schedule import config_of

SETTINGS, WEIGHTS = "reduction.yaml", "reduction.safetensors"
_ENDINGS = (".yaml", ".yml")


def build_reduction(
    text: str,
    vit: Any,  # noqa: ANN401 - a timm ViT
    labels: Labels | None = None,
    weights: str = "WEIGHTS",
) -> TokenReduction:
    """What ``--reduction`` means for a model.

    Args:
        text: as :func:`mim.reduction.recipes.named_reduction` takes it; a folder into which fine-tuning has exported
            one; or a YAML file with ``reduction:`` in it, a class path with its arguments as in the configs of a run.
        vit: a timm ViT.
        labels: what a trained reduction will learn from; None if nothing is going to be trained.
        weights: where the model comes from, for messages.

    Raises:
        UserError: if this cannot be done.
    """
    if not hasattr(vit, "blocks"):
        why = f"timm's {type(vit).__name__} has no sequence of tokens that could be shortened"
        raise UserError(f"--reduction {text} is for ViTs", why=why, hint="leave --reduction out")
    if Path(text).is_dir():
        return load_reduction(Path(text), vit, weights)
    return _read(Path(text), vit) if text.endswith(_ENDINGS) else named_reduction(text, vit, labels, weights)


def save_reduction(reduction: TokenReduction, folder: Path) -> None:
    """Writes ``reduction.yaml`` and, if it has learnt something, ``reduction.safetensors``.

    Args:
        reduction: of any kind.
        folder: where the model lies.
    """
    save_settings(reduction, folder / SETTINGS)
    state = {key: value.detach().cpu().contiguous() for key, value in reduction.state_dict().items()}
    if state:
        save_file(state, folder / WEIGHTS)


def save_settings(reduction: TokenReduction, path: Path) -> None:
    """Writes all that builds the reduction again, as a file that ``--reduction`` takes."""
    path.write_text(yaml.safe_dump({"reduction": config_of(reduction)}, sort_keys=False), encoding="utf-8")


def load_reduction(folder: Path, vit: Any, weights: str = "WEIGHTS") -> TokenReduction:  # noqa: ANN401 - a timm ViT
    """The reduction that lies in a folder, for the model beside it, in evaluation mode.

    Args:
        folder: such as the ``export`` of a fine-tuning.
        vit: the timm ViT.
        weights: where the model comes from, for messages.

    Raises:
        UserError: if there is none, or it was trained with another model.
    """
    if not (folder / SETTINGS).is_file():
        hint = f"{called('finetune')} --weights {quoted(weights)} --reduction cropr"
        raise UserError(f"{folder} holds no reduction", hint=hint)
    reduction = _read(folder / SETTINGS, vit)
    state = load_file(folder / WEIGHTS) if (folder / WEIGHTS).is_file() else {}
    try:
        reduction.load_state_dict(state)
    except RuntimeError as error:
        why = str(error).split("\n")[1].strip()
        raise UserError(f"{folder / WEIGHTS} does not belong to {folder / SETTINGS}", why=why) from error
    return reduction.eval()


def _read(path: Path, vit: Any) -> TokenReduction:  # noqa: ANN401 - a timm ViT
    try:
        check_config_file(path, "--reduction")
        with known_class_paths():
            parser = ArgumentParser(exit_on_error=False, add_help=False)
            parser.add_subclass_arguments(TokenReduction, "reduction", required=True)
            reduction: TokenReduction = parser.instantiate(parser.parse_path(str(path))).reduction
        reduction.check(vit)
    except (ArgumentError, ValueError, TypeError, OSError) as error:
        reason = re.sub(r"\s+", " ", str(error))[:400]
        foreign = refused_class(str(error))
        hint = plugin_hint(foreign) if foreign else "docs/reduction.md shows such a file"
        raise UserError(f"--reduction {path}: {reason}", hint=hint) from error
    return reduction
