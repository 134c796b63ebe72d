"""What a trained reduction has learnt, as a file beside the weights of the model that it was trained with."""

from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from mim.errors import UserError
from mim.reduction.base import TokenReduction
from mim.reduction.recipes import Labels, named_reduction

FILE = "reduction.safetensors"


def save_reduction(reduction: TokenReduction, name: str, labels: Labels, folder: Path) -> None:
    """Writes ``reduction.safetensors``; a reduction that learns nothing needs no file.

    Args:
        reduction: trained.
        name: as :func:`mim.reduction.recipes.named_reduction` takes it.
        labels: what it learnt from.
        folder: where the model lies.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in reduction.state_dict().items()}
    if state:
        facts = {"reduction": name, "classes": str(labels.classes), "masks": str(labels.masks)}
        save_file(state, folder / FILE, metadata=facts)


def load_reduction(folder: Path, vit: Any) -> TokenReduction:  # noqa: ANN401 - a timm ViT
    """The trained reduction that lies in a folder, for the model beside it.

    Args:
        folder: with ``reduction.safetensors``, such as the ``export`` of a fine-tuning.
        vit: the timm ViT.

    Raises:
        UserError: if there is none, or it was trained with another model.
    """
    if not (folder / FILE).is_file():
        raise UserError(f"{folder} holds no trained reduction", hint="python tools/finetune.py --reduction cropr")
    with safe_open(folder / FILE, framework="pt") as file:
        facts = file.metadata()
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
    labels = Labels(int(facts["classes"]), facts["masks"] == "True")
    reduction = named_reduction(facts["reduction"], vit, labels)
    try:
        reduction.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{folder / FILE} was trained with another model", why=str(error).split("\n")[1]) from error
    return reduction.eval()
