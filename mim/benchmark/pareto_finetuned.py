"""Fine-tunings of one encoder as points of one page: what each has reached, over how fast what it exported runs."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import timm
import torch
from torch import Tensor, nn

from mim.benchmark.inference import Inference, measure
from mim.benchmark.pareto_page import Point, timing_in_words
from mim.errors import UserError
from mim.interop import check_timm_folder
from mim.program import called
from mim.reduction import KeepRate, TokenReducedViT, TokenReduction
from mim.reduction.files import SETTINGS, load_reduction
from mim.reduction.macs import count_macs

TOP1, MIOU = "top-1", "mIoU"
_OWN = {"reduction", "anneal"}  # settings that fine-tunings to be compared may differ in


@dataclass(frozen=True)
class _Finetuning:
    """A finished one, as ``finetune`` and ``segment --finetune true`` leave it."""

    folder: Path
    content: dict[str, Any]
    settings: dict[str, Any]

    @property
    def what(self) -> str:
        """What it was scored by."""
        return TOP1 if TOP1 in self.content["metrics"] else MIOU

    @property
    def name(self) -> str:
        """Of the reduction, without its knob."""
        name: str = self.content.get("reduction", {"name": "none"})["name"]
        return Path(name).stem if name.endswith((".yaml", ".yml")) else Path(name).name.partition(":")[0]


class _Dense(nn.Module):
    """Features of every patch: what a segmentation head reads."""

    def __init__(self, vit: nn.Module, reduction: TokenReduction | None) -> None:
        super().__init__()
        self.wrapper = TokenReducedViT(vit, reduction or TokenReduction(KeepRate(1.0)))

    def forward(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, D, h, w)``."""
        return self.wrapper.forward_dense(images)


def collect(home: Path, device: torch.device, batch_size: int, rounds: int) -> tuple[list[Point], str]:
    """A point for each fine-tuning in a folder, and in words how its numbers came about.

    Args:
        home: folder of their results, or a run in which they lie.
        device: where to time.
        batch_size: of the timed forward passes, on noise.
        rounds: of turns.

    Raises:
        UserError: if there is none, none without reduction, or they were not trained in the same way.
    """
    found = _found(home)
    points = []
    for what in (TOP1, MIOU):
        points += _timed([each for each in found if each.what == what], device, batch_size, rounds)
    ways = {each.what: f"{each.what}: {each.content['protocol']}" for each in found if each.name == "none"}
    return points, f"Fine-tuned. {' '.join(ways.values())} {timing_in_words(points, batch_size, rounds)}"


def _found(home: Path) -> list[_Finetuning]:
    """All that can be compared, those without reduction first."""
    found = []
    for file in sorted([*home.glob("*/metrics.json"), *home.glob("evaluation/*/metrics.json")]):
        if (file.parent / "export" / "config.json").is_file() and (file.parent / "settings.json").is_file():
            settings = json.loads((file.parent / "settings.json").read_text())
            found.append(_Finetuning(file.parent, json.loads(file.read_text()), settings))
    if not found:
        weights = shlex.quote(str(home)) if (home / "config.yaml").is_file() else "WEIGHTS"
        hint = f"{called('finetune')} --weights {weights} --reduction tome   and the same without --reduction"
        raise UserError(f"--finetuned {home}: no fine-tuning lies there", hint=hint)
    for what in dict.fromkeys(each.what for each in found):
        _check([each for each in found if each.what == what], home)
    return sorted(found, key=lambda each: each.name != "none")


def _check(found: Sequence[_Finetuning], home: Path) -> None:
    whole = next((each for each in found if each.name == "none"), None)
    if whole is None:
        raise UserError(
            f"--finetuned {home}: {found[0].what} is there with reductions only",
            hint="the same fine-tuning without --reduction, to compare with",
        )
    for other in found:
        names = (whole.settings.keys() | other.settings.keys()) - _OWN
        changed = sorted(name for name in names if whole.settings.get(name) != other.settings.get(name))
        if changed:
            name = changed[0]
            why = f"{name} is {whole.settings.get(name)} in one, {other.settings.get(name)} in the other"
            raise UserError(f"{other.folder} was not trained like {whole.folder}", why=why, hint="the same options")


def _timed(found: Sequence[_Finetuning], device: torch.device, batch_size: int, rounds: int) -> list[Point]:
    if not found:
        return []
    points, models = [], []
    for each in found:
        export = each.folder / "export"
        check_timm_folder(export, "--finetuned")
        vit: Any = timm.create_model(f"local-dir:{export}", pretrained=True)
        reduction = load_reduction(export, vit) if (export / SETTINGS).is_file() else None
        model = vit if reduction is None else TokenReducedViT(vit, reduction)
        model = _Dense(vit, reduction) if each.what == MIOU else model
        point = Point(each.name, reduction, {}, {each.what: mean(each.content["metrics"][each.what])})
        shape = batch_size, vit.patch_embed.proj.in_channels, *vit.patch_embed.img_size
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        macs = count_macs(vit, reduction).total
        models.append(Inference(point.name, point.setting, model.eval().to(device), images, macs))
        points.append(point)
    for point, row in zip(points, measure(models, rounds), strict=True):
        point.speed = row | {"device": device.type}
    return points
