"""One fine-tuning after another, pretrained and from scratch, each resumable where it was stopped."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import timm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mim.data.augment import Augmented
from mim.data.bad_files import BadFiles
from mim.data.finetune import FinetuneData
from mim.data.labelled import Framed, framed_batches
from mim.encoder import Encoder
from mim.errors import UserError
from mim.evaluation.connections import ConnectionMaskedViT
from mim.evaluation.finetune import Finetune, classifier
from mim.interop import check_timm_folder
from mim.memory import MemoryViT
from mim.options.classification import ClassificationOptions, FinetuneRecipe
from mim.options.evaluation import Scores, TrainingOptions
from mim.program import called, origin, quoted
from mim.reduction import TokenReducedViT
from mim.reduction.files import save_reduction, save_settings
from mim.report.confusion import save_confusion
from mim.run.weights import ModelCard, export_backbone
from mim.transfer.classification import Classification
from mim.transfer.measurement import PRETRAINED, UNTRAINED, finish_section, section_name
from mim.transfer.training import fit, open_trainer, train_all
from mim.vit import ViT, distilled

_NOT_OF_THE_RESULT = ("num_workers", "device", "threads", "out", "trust", "max_bad", "encode_batch", "cache")


class Finetuning(Classification):
    """A classifier and its encoder, trained together.

    Args:
        options: weights and images.
        recipe: how to train.
        training: on what.
        eval_every: epochs between looks at the scored images.
    """

    name, title = "finetune", "Fine-tuning"
    not_of_the_result: tuple[str, ...] = (*_NOT_OF_THE_RESULT, "memory", "memory_norm")

    def __init__(
        self, options: ClassificationOptions, recipe: FinetuneRecipe, training: TrainingOptions, eval_every: float
    ) -> None:
        super().__init__(options, learning=True)
        if recipe.tlm and not isinstance(vit := self.loaded.encoder.vit, VisionTransformer):
            raise UserError(
                f"--tlm {recipe.tlm:g}: --weights {options.weights} is no plain ViT, whose connections are masked",
                why=f"it is timm's {type(vit).__name__}",
                hint="--tlm 0",
            )
        if distilled(self.loaded.encoder.vit):
            raise UserError(
                f"--weights {options.weights}: a distilled model has two classifiers, and fine-tuning trains one",
                hint=f"{called('linear_probe')} --weights {quoted(options.weights)} --data {quoted(options.data)}",
            )
        self.recipe = replace(recipe, pool=recipe.pool or self.loaded.pool)
        self.training, self.eval_every = training, eval_every
        self.root = self.folder(self.name)
        self.export = self.root / "export"

    def measure(self, seeds: int, from_scratch: bool) -> Scores:
        """Trains every encoder with every seed, and writes what came of it.

        Args:
            seeds: repetitions, each with another order, crops and classifier.
            from_scratch: also train untrained encoders.

        Raises:
            StoppedError: after a signal.
        """
        encoders = (PRETRAINED, UNTRAINED)[: 2 if from_scratch else 1]
        settings = self.settings(asdict(self.options), asdict(self.recipe), without=self.not_of_the_result)
        histories = train_all(
            self.root, settings, encoders, seeds, "history.json", self.train_one, self.training.resume
        )
        scores: Scores = {
            f"top-{top}": {who: [history[-1][f"top{top}"] for history in histories[who]] for who in encoders}
            for top in (1, 5)
        }
        last = {who: [history[-1] for history in histories[who]] for who in encoders}
        if self.uneven and all("balanced" in scored for own in last.values() for scored in own):  # older ones lack it
            scores["balanced accuracy"] = {who: [scored["balanced"] for scored in last[who]] for who in encoders}
        if self.is_main_process:
            protocol = f"{self.in_words()}; {self.protocol()}; after the last epoch."
            self.write(self.root, self.title, protocol, scores, str(self.recipe.pool), self.details(last))
            finish_section(self.root)
            print(f"  model   {self.export}   ({self.opened_by})")
        return scores

    @property
    def opened_by(self) -> str:
        """A line of Python that opens the export."""
        return f'timm.create_model("local-dir:{self.export}", pretrained=True)'

    def train_one(self, who: str, seed: int, folder: Path) -> list[dict[str, Any]]:
        """Scores over one training, in the end with right answers by class; the first pretrained one is exported."""
        module = self._trained(who, seed, folder)
        if who == PRETRAINED and seed == 0 and self.is_main_process:
            save_confusion(module.taken_for.numpy(), self.classes, folder / "confusion.png")
            self._export(module)
        return [*module.history[:-1], {**module.history[-1], "right": module.taken_for.diagonal().tolist()}]

    def _trained(self, who: str, seed: int, folder: Path) -> Finetune:
        recipe, options, classes = self.recipe, self.options, len(self.classes)
        encoder = self.reduce(self.fresh(who, seed), seed)
        frames = Augmented(options.crop_pct, recipe.scale, recipe.auto_augment, recipe.erase)
        frames.configure(encoder.img_size, self.loaded.mean, self.loaded.std, self.loaded.pixels)
        bad_files = BadFiles(options.max_bad, options.data, go_on="--resume true")
        data = FinetuneData(self.train, self.test, frames, recipe.batch_size, self.workers, seed, bad_files)
        reduction, vit = encoder.reduction, self.classifier(encoder, seed)
        teacher = None if recipe.teacher is None else self._teacher(recipe.teacher, cast(ViT, vit))
        module = Finetune(vit, recipe, classes, len(self.train), seed, reduction, teacher)
        every = max(1, round(self.eval_every * module.steps_per_epoch))
        trainer = open_trainer(
            folder,
            module.max_steps,
            every,
            self.training,
            self.device,
            validate_every=every,
            bad_files=data.bad_files,
        )
        hint = f"--blr {self.recipe.blr / 10:g}   or   --warmup_epochs 20"
        fit(trainer, module, data, folder, self.training.resume, hint)
        trainer.validate(module, data, verbose=False)
        return module

    def classifier(self, encoder: Encoder, seed: int) -> ViT | MemoryViT:
        """What is going to be trained: the encoder, taken apart, with something that answers."""
        return classifier(encoder, len(self.classes), self.recipe, seed)

    def in_words(self) -> str:
        """How the encoder was trained."""
        return _in_words(self.recipe)

    def details(self, last: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        """Further facts for ``metrics.json``, from the last scores of each encoder, one per seed."""
        right = last[PRETRAINED][0].get("right")  # results of earlier versions lack it
        return self.class_sizes({"seed 0": dict(zip(self.classes, right, strict=True))} if right else {})

    def _teacher(self, folder: str, vit: ViT) -> ViT:
        """The classifier that ``--teacher`` names, on the device; it must be what is trained, but for its weights."""
        if self.loaded.encoder.reduction is None:
            raise UserError(
                "--teacher: nothing is reduced, so there is nothing to learn from the whole",
                hint="leave --teacher out   or   --reduction evit",
            )
        home = Path(folder.removeprefix("local-dir:"))
        if not (home / "config.json").is_file():
            raise UserError(f"--teacher {folder} is no exported model", hint=self._whole())
        check_timm_folder(home, "--teacher")
        teacher: Any = timm.create_model(f"local-dir:{home}", pretrained=True)
        own, other = ({name: part.shape for name, part in model.state_dict().items()} for model in (vit, teacher))
        if own != other or list(teacher.pretrained_cfg["mean"]) != list(self.loaded.mean):
            raise UserError(
                f"--teacher {folder} is another kind of model, or saw images in another way",
                hint=self._whole(),
            )
        return cast(ViT, teacher.eval().to(self.device))

    def _whole(self) -> str:
        """The command that trains a teacher."""
        return f"{called('finetune')} --weights {self.options.weights} --data {self.options.data}   and its export"

    def _export(self, module: Finetune) -> None:
        """Writes what was trained, with where it comes from."""
        card = ModelCard(
            method="fine-tuning",
            data=self.options.data,
            data_licence="unknown",
            images=len(self.train),
            epochs=module.recipe.epochs,
            steps=module.max_steps,
            command=origin("finetune"),
            notes=(f"Classes, in order: {', '.join(self.classes)}",),
        )
        scale = self.loaded.pixels.exported(self.loaded.mean, self.loaded.std)
        self.write_model(module.evaluated.cpu().eval(), card, {**scale, "img_size": self.loaded.encoder.img_size})

    def write_model(self, model: nn.Module, card: ModelCard, images: dict[str, Any]) -> None:
        """Writes the trained classifier as a timm folder, its reduction beside it.

        Args:
            model: on the CPU.
            card: where it comes from.
            images: their normalisation, scale and size.
        """
        vit = cast(ViT, model.vit if isinstance(model, TokenReducedViT | ConnectionMaskedViT) else model)
        export_backbone(vit, self.export, card=card, class_names=self.classes, **images)
        if isinstance(model, TokenReducedViT):
            save_reduction(model.reduction, self.export)
            static = model.static(self._some_images())
            if static is not model.reduction:
                save_settings(static, self.export / f"{section_name('static', self.options.reduction)}.yaml")

    def _some_images(self, count: int = 64) -> Tensor:
        """Normalised images to learn from, ``(B, C, H, W)``, spread over all of them."""
        step = max(1, len(self.train) // count)
        framed = Framed(self.train, self.frames, range(0, len(self.train), step)[:count])
        images, _, _ = next(framed_batches(framed, count, num_workers=0))
        return images


def schedule_in_words(recipe: FinetuneRecipe) -> str:
    """How long and how fast something learned, and from what kind of images."""
    average = f", average of the weights {recipe.ema:g}" if recipe.ema else ""
    layers = f"layer decay {recipe.layer_decay:g}, drop path {recipe.drop_path:g}, " if recipe.memory is None else ""
    return (
        f"{recipe.epochs:g} epochs of batch {recipe.batch_size}, blr {recipe.blr:g}, {layers}{recipe.auto_augment}, "
        f"mixup {recipe.mixup:g}, CutMix {recipe.cutmix:g}, smoothing {recipe.label_smoothing:g}, "
        f"erasing {recipe.erase:g}{average}"
    )


def _in_words(recipe: FinetuneRecipe) -> str:
    """How the encoder was trained."""
    pool = "mean of patch tokens" if recipe.pool == "mean" else "class token"
    annealed = (
        f", reduction annealed over {recipe.anneal[0]:g} to {recipe.anneal[1]:g} of it" if any(recipe.anneal) else ""
    )
    masked = f", connections of {recipe.tlm:g} of the tokens masked" if recipe.tlm else ""
    taught = ", agreeing with a teacher without reduction" if recipe.teacher else ""
    return f"all weights trained, {pool}, {schedule_in_words(recipe)}{masked}{annealed}{taught}"
