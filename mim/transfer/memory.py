"""A further task for an encoder that stands still: its memory is learned, and what was there before is kept."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mim.data.labelled import Framed, framed_batches
from mim.encoder import Encoder
from mim.errors import UserError
from mim.memory import ORIGINAL, MemoryViT, Task, check_memory, holds_memory, load_memory, save_memory
from mim.options.classification import ClassificationOptions, FinetuneRecipe
from mim.options.evaluation import TrainingOptions
from mim.run.weights import ModelCard, export_backbone, restore_classifier
from mim.transfer.finetuning import Finetuning, schedule_in_words
from mim.transfer.measurement import PRETRAINED


class MemoryFinetuning(Finetuning):
    """Memory for one more task, learned beside those that the folder of the weights holds already.

    Args:
        options: weights and images.
        recipe: how to train; ``memory`` cells in each block.
        training: on what.
        eval_every: epochs between looks at the scored images.
    """

    name, title = "memory", "Fine-tuning with memory"
    not_of_the_result = tuple(name for name in Finetuning.not_of_the_result if not name.startswith("memory"))

    def __init__(
        self, options: ClassificationOptions, recipe: FinetuneRecipe, training: TrainingOptions, eval_every: float
    ) -> None:
        super().__init__(options, replace(recipe, pool="cls"), training, eval_every)
        try:
            check_memory(self.loaded.encoder.vit)
        except TypeError as error:
            raise UserError(
                f"--memory {recipe.memory}: --weights {options.weights} cannot take memory",
                why=str(error),
                hint="the weights of a plain ViT, such as vit_small_patch16_224",
            ) from error
        self.home = self._kept_home()
        self.earlier = load_memory(self.home) if self.home and holds_memory(self.home) else None
        self.task = _new_name(options.data, () if self.earlier is None else self.earlier.tasks)

    @property
    def opened_by(self) -> str:
        """A line of Python that opens the export."""
        return f'mim.load_memory("{self.export}"), task {self.task}'

    def classifier(self, encoder: Encoder, seed: int) -> MemoryViT:
        """The encoder, which stands still, with the memory that is going to be trained."""
        vit, cells = cast(VisionTransformer, encoder.vit), cast(int, self.recipe.memory)
        task = Task(vit, cells, self.classes, seed, self.recipe.memory_norm)
        return MemoryViT(vit, {self.task: task.to(self.device)})

    def in_words(self) -> str:
        """How the task was learned."""
        norm = "" if self.recipe.memory_norm else " behind the norm"
        learned = f"a class token, {self.recipe.memory} memory cells in each block{norm} and the classifier trained"
        return f"encoder frozen, {learned}, {schedule_in_words(self.recipe)}"

    def train_one(self, who: str, seed: int, folder: Path) -> list[dict[str, Any]]:
        """As of any fine-tuning; of the one that is exported also whether earlier answers are what they were."""
        history = super().train_one(who, seed, folder)
        if who == PRETRAINED and seed == 0 and self.is_main_process and (before := self._before()):
            history[-1]["kept"] = self._kept(before)
        return history

    def details(self, last: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        """Also what became of earlier answers, which is printed."""
        kept = last[PRETRAINED][0].get("kept", {})
        for task, facts in kept.items():
            print(
                f"  kept    {task}: {facts['same']:,} of {facts['images']:,} predictions as before, largest difference "
                f"{facts['difference']:.2g}"
            )
        return super().details(last) | ({"kept": kept} if kept else {})

    def write_model(self, model: nn.Module, card: ModelCard, images: dict[str, Any]) -> None:
        """Writes the encoder as it came, with its own classifier if it had one, and the memory of all tasks."""
        learned = cast(MemoryViT, model)
        restored = self.home is not None and restore_classifier(self.home, learned.vit) is not None
        names = _config(self.home).get("label_names") if self.home and restored else None
        tasks = cast(dict[str, Task], {**({} if self.earlier is None else self.earlier.tasks), **learned.tasks})
        card = replace(card, method="memory for further tasks", notes=self._notes(tasks, bool(learned.vit.num_classes)))
        pool = None if learned.vit.num_classes else self.loaded.pool
        export_backbone(learned.vit, self.export, card=card, class_names=names, pool=pool, **images)
        save_memory(MemoryViT(learned.vit, tasks).cpu(), self.export)

    def _notes(self, tasks: Mapping[str, Task], classifies: bool) -> tuple[str, str]:
        """What the model card says about the tasks."""
        listed = "; ".join(f"{name}: {', '.join(task.class_names)}" for name, task in tasks.items())
        own = " and its own classifier" if classifies else ""
        return (
            f"Tasks and their classes, in order: {listed}",
            f"timm opens the encoder{own}, which no task has changed, and leaves `memory.*` aside; "
            f'`mim.load_memory("{self.export.as_posix()}")` answers for the tasks',
        )

    def _kept_home(self) -> Path | None:
        """The timm folder whose classifier and tasks are kept; refuses images of another size than they answer for."""
        given = Path(self.options.weights.removeprefix("local-dir:"))
        home = next((path for path in (given, given / "export" / "backbone") if (path / "config.json").is_file()), None)
        if home is None:
            return None
        size = self.options.img_size
        own = _config(home)
        height, width = own["pretrained_cfg"]["input_size"][1:]
        if size and (holds_memory(home) or own.get("num_classes")) and self.loaded.encoder.img_size != (height, width):
            raise UserError(
                f"--img_size {size}: {home} answers for images of {height} x {width} pixels, and is to go on doing so",
                hint="leave --img_size out",
            )
        return home

    def _before(self) -> Callable[[Tensor], dict[str, Tensor]] | None:
        """What answered before: the tasks of the folder and its classifier; None if there are neither."""
        if self.earlier is not None:
            return self.earlier.to(self.device).eval().by_task
        if self.home is None or not _config(self.home).get("num_classes"):
            return None
        vit: Any = timm.create_model(f"local-dir:{self.home}", pretrained=True).to(self.device).eval()
        return lambda images: {ORIGINAL: vit(images)}

    @torch.no_grad()
    def _kept(self, before: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, dict[str, float]]:
        """Answers of the export beside those of ``before`` on all scored images, by task."""
        now = load_memory(self.export).to(self.device)
        facts: dict[str, dict[str, float]] = {}
        framed = Framed(self.test, self.frames, range(len(self.test)))
        for images, _, _ in framed_batches(framed, self.options.encode_batch, self.workers, self.device):
            answers = now.by_task(images)
            for task, old in before(images).items():
                _count(facts.setdefault(task, {"images": 0, "same": 0, "difference": 0.0}), old, answers[task])
        return facts


def _count(facts: dict[str, float], old: Tensor, new: Tensor) -> None:
    facts["images"] += len(old)
    facts["same"] += int((old.argmax(dim=1) == new.argmax(dim=1)).sum())
    facts["difference"] = max(facts["difference"], float((old - new).abs().max()))


def _config(home: Path) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads((home / "config.json").read_text(encoding="utf-8")))


def _new_name(data: str, taken: Any) -> str:  # noqa: ANN401 - names
    """A task's name after its images: letters, digits, ``-`` and ``_``; numbered if there is one already."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(data).name.partition(".")[0]).strip("-") or "task"
    names = [stem, *(f"{stem}-{number}" for number in range(2, len(taken) + 3))]
    return next(name for name in names if name not in taken and name != ORIGINAL)
