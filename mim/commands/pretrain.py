"""Pretrain a Vision Transformer: from a folder of images to a timm model."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jsonargparse import Namespace
from lightning import Trainer

from mim.callbacks import FIRST, Checkpoints, Evaluation, NaNDump, Profile, RunLog, Signals
from mim.data.levels import levels
from mim.data.pixels import EIGHT_BIT
from mim.data.pretrain import PretrainData
from mim.data.remote import keep_index, restore_index
from mim.distributed.devices import best_precision
from mim.distributed.processes import INTERRUPTED, process_rank
from mim.distributed.sharding import ShardedStrategy
from mim.encoder import Encoder
from mim.errors import MACHINE_ERRORS, UserError
from mim.lora import set_aside
from mim.methods import Method, NonFiniteError, Plan
from mim.options.pretraining import check_same_method, no_weights_for_lora
from mim.options.yaml_files import settings_in
from mim.program import called
from mim.report import write_report
from mim.run.checkpoint_files import AtomicCheckpointIO, check_room, checkpoint_step, newest_good
from mim.run.config import (
    changes,
    flatten,
    instantiate,
    parse,
    run_options,
    save_config,
    with_absolute_paths,
)
from mim.run.failures import diverged, failure_of_a_step, lost_process
from mim.run.folder import UNWRITABLE, RunFolder, git_commit, quieten, versions
from mim.run.names import check_trackers
from mim.run.resuming import check_number_of_images, remember_moved_data, resumed_arguments
from mim.run.trackers import build_trackers, track_report
from mim.run.trainer import build_trainer
from mim.run.weights import ModelCard, check_published, export_backbone, init_backbone, load_method, pixels_of
from mim.run.words import architecture, conclusion, device_name, introduction, parameters, random_start, shape
from mim.targets import Target
from mim.vit import compile_blocks


def main(args: Sequence[str]) -> int:
    """Parses dotted options, trains, exports; returns the exit status."""
    return trained(args)[0]


def trained(args: Sequence[str]) -> tuple[int, RunFolder]:
    """As :func:`main`, with the run's folder."""
    options = dict(arg.removeprefix("--").partition("=")[::2] for arg in args)
    resumed = RunFolder.find(options["resume"], options.get("out")) if "resume" in options else None
    args = [arg for arg in args if not arg.startswith("--method=")]
    if resumed is not None:
        if method := options.get("method"):  # beside auto, which may have found anything
            check_same_method(method, str(resumed.config), settings_in(resumed.config).get("model"))
        args = resumed_arguments(resumed, args)
    config = parse(args)
    pretraining = Pretraining(config, resumed, changes(args, config))
    return pretraining.run(args), pretraining.folder


class Pretraining:
    """One call of the command: what a run is made of, put together from its settings.

    Args:
        config: parsed settings.
        resumed: the run to continue; a new one if not given.
        changed: settings whose value is not that of the config files, as in :func:`mim.run.config.changes`.
    """

    def __init__(
        self, config: Namespace, resumed: RunFolder | None, changed: Mapping[str, tuple[Any, Any]] | None = None
    ) -> None:
        self.rank = process_rank()
        quieten(self.rank)
        self.config, self.resumed, self.options = config, resumed, run_options(config)
        self.changed = changed or {}
        self.folder = resumed or RunFolder(Path(config.out or "runs"))
        if self.options.threads:
            torch.set_num_threads(self.options.threads)
        check_trackers(self.options.log)
        self.origin: str | None = config["continue"] or config.init
        if self.origin and resumed is None:
            check_published(self.origin, self.origin_option)
        if config["continue"]:
            self._read_as_the_weights_do()
        try:
            objects = self._instantiate(self.options.seed)
        except UserError as error:
            unnamed = str(config["continue"]).partition(".")[0]  # a model that was meant by its weights alone
            known = error.error.startswith(f"--model {unnamed} ")
            raise (error.about("--continue", instead_of="--model") if known else error) from error
        self.method: Method = objects.model
        self.data: PretrainData = objects.data
        self.method.check()
        encoder = self.method.evaluated
        if config["continue"]:
            self._check_continued(encoder)
        settings = config.model.init_args.encoder
        if settings.get("lora") and not (self.origin or settings.pretrained or resumed):
            raise no_weights_for_lora(settings.lora)
        if self.options.pool == "cls" and not encoder.has_class_token:
            raise UserError("--pool cls: this model has no class token", hint="--pool mean")
        self._open_data()
        self.data.views.check(encoder.patch_size)
        batch_size, images = self.data.batch_size, len(self.data.source)
        self.plan = self.method.plan = Plan(
            max_steps=max(1, round(self.options.epochs * images / batch_size)),
            steps_per_epoch=images / batch_size,
            batch_size=batch_size,
            seed=self.options.seed,
            asked=self.options.epochs,
        )
        self._check_profile()

    def _check_profile(self) -> None:
        """Refuses a trace of more steps than there are."""
        steps, there = self.options.profile, self.plan.max_steps - FIRST
        if steps is not None and steps > there:
            few = f"{self.plan.max_steps} steps, of which the first {FIRST} are not recorded"
            hint = f"--profile {there}" if there > 0 else f"--epochs {(FIRST + steps) / self.plan.steps_per_epoch:.3g}"
            raise UserError(f"--profile {steps}: the run is too short", why=few, hint=hint)

    @property
    def origin_option(self) -> str:
        """What names the weights that the run starts from."""
        return "--continue" if self.config["continue"] else "--init"

    def _read_as_the_weights_do(self) -> None:
        """Takes over the scale of the numbers that the weights of a folder were trained on, unless one is given."""
        pixels, data = pixels_of(Path(self.config["continue"].removeprefix("local-dir:"))), self.config.data
        if pixels != EIGHT_BIT and data.value_range == "auto":
            data.value_range = None
            for name, value in pixels.options().items():
                data[name] = data[name] or value

    def _check_continued(self, encoder: Encoder) -> None:
        """Images are normalised as the weights expect them, unless they are told otherwise."""
        if self.config.init:
            raise UserError("--continue and --init both name weights to start from", hint="leave --continue out")
        mean, std = encoder.statistics
        given = self.config.data
        if given.mean is None and given.std is None and len(mean) == encoder.in_chans:
            given.mean, given.std = mean, std  # to be saved with all other settings
            self.data.normalise_by(mean, std)

    def _open_data(self) -> None:
        """Finds the images; those of a resumed run may have moved."""
        encoder = self.method.evaluated
        if self.resumed is not None:
            restore_index(self.data.path, self.resumed.path)
        try:
            self.data.open(encoder.img_size, encoder.in_chans, self.options.seed)
        except UserError as error:
            if self.resumed is None or Path(self.data.path).exists():
                raise
            hint = f"--resume {self.resumed.path} --data NEW --allow_change data.path   if they have moved"
            raise UserError(error.error, why=error.why or "the run was started with these images", hint=hint) from error
        if self.resumed is not None and "data.path" not in self.config.allow_change.split(","):
            check_number_of_images(self.resumed, len(self.data.source))

    def run(self, args: Sequence[str]) -> int:
        """Trains to the end, to a signal or to a failure; a disk that takes no more is a mistake of the user."""
        try:
            return self._train(args)
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            raise self.folder.unwritable(error) from error

    def _train(self, args: Sequence[str]) -> int:
        trainer = self._trainer()
        if self.resumed is None:
            check_room(self.folder.path, self.method)
        checkpoint = self._checkpoint()
        initialised = None
        if checkpoint is None and self.origin:  # before there is a folder: what does not fit leaves none
            initialised = self._load_start(self.method)
        checked = self.data.check(first=self.rank == 0)
        for name, value in self.data.settings().items():
            self.config.data[name] = value
        if self.resumed is None and self.rank == 0:  # what runs already has been looked at
            for part in self.method.modules():
                if isinstance(part, Target):
                    part.check(self.data.mean, self.data.std)
        self.folder = self._folder(args)
        evaluation, checkpoints = self._attend(trainer)
        try:
            with self._failures_in_words(trainer):
                if self.rank == 0:
                    self._introduce(trainer, evaluation, checked)
                    note = initialised or (random_start(self.config) if checkpoint is None else None)
                    if note:
                        self._say(note)
                if self.options.compile:
                    compile_blocks(self.method)
                started = time.monotonic()
                self._fit(trainer, checkpoint)
        except UserError:
            if self.rank == 0:
                with suppress(OSError):  # if a full disk was it
                    self.folder.write_summary(status="failed")
            raise
        if trainer.is_global_zero:
            return self._finish(trainer, evaluation, checkpoints, time.monotonic() - started)
        return INTERRUPTED if checkpoints.stopped else 0

    def _fit(self, trainer: Trainer, checkpoint: Path | None) -> None:
        trainer.fit(self.method, self.data, ckpt_path=checkpoint and str(checkpoint), weights_only=True)

    @contextmanager
    def _failures_in_words(self, trainer: Trainer) -> Iterator[None]:
        """What data, settings or the machine can do to a run that has its folder ends in a :class:`UserError`."""
        try:
            yield
        except NonFiniteError as error:
            raise diverged(error, self.folder, trainer.precision) from error
        except MACHINE_ERRORS as error:
            sizes = self.plan.batch_size, self.data.num_workers
            failure = failure_of_a_step(error, trainer, self.folder, *sizes) or lost_process(trainer, self.folder)
            if failure is None:
                raise
            raise failure from error

    def _instantiate(self, seed: int) -> Namespace:
        """Builds method and data; the same seed gives the same weights."""
        torch.manual_seed(seed)
        return instantiate(self.config)

    def _checkpoint(self) -> Path | None:
        """The newest good checkpoint of the resumed run; the loader then starts at its step."""
        if self.resumed is None:
            return None
        path, refused = newest_good(self.resumed.checkpoints)
        for line in refused:
            print(f"warning: {line}", flush=True)
        if path is None and refused:
            raise UserError(f"{self.resumed.path} has no checkpoint that can be trusted", why=refused[0])
        self.data.first_step = checkpoint_step(path) if path else 0
        return path

    def _folder(self, args: Sequence[str]) -> RunFolder:
        """The run's folder; only the first process makes and writes it."""
        if self.resumed is not None:
            folder = self.resumed
            if self.rank == 0:
                remember_moved_data(folder, self.config)
        elif self.rank != 0:
            return RunFolder(Path(self.config.out or "runs"))
        else:
            name = f"{self.method.name}-{self.data.short_name}"
            folder = RunFolder.create(self.config.out, name, self.config.overwrite)
            plugins = [f"--plugin={','.join(self.config.plugin)}"] if self.config.plugin else []
            folder.write_origin([*args, *plugins])
            save_config(with_absolute_paths(self.config), folder.config)
            keep_index(self.data.path, folder.path)
        if self.rank == 0:
            self.data.bad_files.write_to(folder.bad_files)
        return folder

    def _attend(self, trainer: Trainer) -> tuple[Evaluation, Checkpoints]:
        """Adds everything that writes into the run's folder."""
        options, plan = self.options, self.plan
        log = RunLog(self.folder, options.log_every)
        every = options.eval_every * plan.steps_per_epoch if options.eval_every else max(plan.max_steps / 10, 50)
        evaluation = Evaluation(
            run_log=log,
            data=self.data,
            steps=sorted({max(1, round(i * every)) for i in range(1, math.ceil(plan.max_steps / every) + 1)}),
            pool=options.pool,
            probe_images=options.probe_images,
            pictures=options.pictures,
        )
        saves = options.save_every * plan.steps_per_epoch if options.save_every else plan.max_steps / 20
        signals = Signals()
        checkpoints = Checkpoints(self.folder.checkpoints, max(1, round(saves)), signals, self.data.bad_files)
        dump = NaNDump(self.folder, self.data)
        trainer.callbacks += [signals, log, evaluation, dump, checkpoints]  # type: ignore[attr-defined]  # set by Lightning
        if options.profile and self.rank == 0:
            Profile(self.folder, options.profile).attach(trainer)
        if self.rank == 0:
            trainer.loggers = build_trackers(options.log, self.folder, flatten(self.config))
        return evaluation, checkpoints

    def _trainer(self) -> Trainer:
        plan, settings = self.plan, dict(vars(self.config.trainer))
        if settings.get("strategy") == "fsdp":  # Lightning's own of that name is the first version
            settings["strategy"] = ShardedStrategy()
        settings["precision"] = settings.get("precision") or best_precision(
            settings.get("accelerator", "auto") in ("auto", "gpu", "cuda")
        )
        trainer = build_trainer(
            settings, "--trainer.{}", max_steps=plan.max_steps, plugins=[AtomicCheckpointIO(self.method)]
        )
        parts = trainer.world_size * trainer.accumulate_grad_batches
        if plan.batch_size % parts:
            near = max(1, round(plan.batch_size / parts)) * parts
            raise UserError(
                f"--batch_size {plan.batch_size} does not divide by {trainer.world_size} devices x "
                f"{trainer.accumulate_grad_batches} micro-batches",
                hint=f"--batch_size {near}",
            )
        return trainer

    def _say(self, text: str) -> None:
        if self.rank == 0:
            self.folder.say(text)

    def _introduce(self, trainer: Trainer, evaluation: Evaluation, checked: tuple[int, tuple[int, int]]) -> None:
        """Says what is going to happen before it happens, and keeps it in ``summary.json``."""
        method, data, plan = self.method, self.data, self.plan
        model = self.config.model.init_args.encoder.model
        self._say(introduction(self.folder, trainer, method, data, model, evaluation.labelled, checked))
        self.folder.write_summary(
            status="running",
            method=method.name,
            model=model,
            shape=shape(method.evaluated),
            data=data.path,
            images=len(data.source),
            classes=len(data.source.classes) if data.source.labels else 0,
            epochs=round(plan.epochs, 4),
            steps=plan.max_steps,
            batch_size=plan.batch_size,
            lr=method.peak_lr,
            seed=plan.seed,
            start=self.origin,
            pool=self.options.pool,
            parameters=parameters(method.backbone),
            architecture=architecture(method),
            values=data.describe_values(),
            levels=found.facts() if (found := levels(data.source, data.pixels)) else None,
            device=device_name(trainer),
            changed=self.changed,
            versions=versions(),
            git=git_commit(),
        )

    def _finish(self, trainer: Trainer, evaluation: Evaluation, checkpoints: Checkpoints, seconds: float) -> int:
        folder, table = self.folder, evaluation.run_log.metrics
        wall = folder.read_summary().get("wall_seconds", 0.0) + seconds
        facts: dict[str, Any] = {"wall_seconds": round(wall, 1), "loss": table.last("train/loss")}
        facts |= {"images_per_second": evaluation.run_log.timing.last("images_per_second")}
        facts |= {"bad_files": len(self.data.bad_files.reasons)}
        if torch.cuda.is_available():
            facts["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        if checkpoints.stopped:
            folder.write_summary(status="interrupted", **facts)
            self._say(
                f"stopped by a signal after step {trainer.global_step:,}, saved\n"
                f"  resume  {called('pretrain')} --resume {folder.path}"
            )
            return INTERRUPTED
        if isinstance(trainer.strategy, ShardedStrategy):  # the last checkpoint holds whole what is in parts here
            self.method, *_ = load_method(folder.path)
        difference = self.export(folder.backbone)
        untrained = [self._untrained(seed) for seed in range(3)] if evaluation.labelled else []
        start = self._started() if self.origin and evaluation.labelled else None
        probe = evaluation.final(self.method.evaluated, untrained, start)
        for kind in ("knn", "linear"):  # one number wherever it is shown: the final probe's, over all of its seeds
            facts[kind] = fmean(probe[kind]["trained"]) if kind in probe else None
        folder.write_summary(
            status="done", rankme=table.last("val/rankme"), probe=probe, export=str(folder.backbone), **facts
        )
        report = write_report(folder.path)
        track_report(trainer.loggers, report)
        self._say(conclusion(folder, facts, probe, report, difference, self.origin))
        return 0

    def export(self, backbone: Path) -> float:
        """Writes the backbone as a timm folder; returns the difference that timm's copy shows, which is 0."""
        encoder_settings = self.config.model.init_args.encoder
        card = ModelCard(
            method=self.method.kind,
            data=self.data.path,
            data_licence=self.data.licence,
            images=len(self.data.source),
            epochs=round(self.plan.epochs, 2),
            steps=self.plan.max_steps,
            command=(self.folder.path / "command.txt").read_text().strip(),
        )
        kwargs = dict(vars(encoder_settings).get("kwargs") or {})
        return export_backbone(
            self.method.backbone,
            backbone,
            card=card,
            model_args=kwargs,
            pool=self.options.pool,
            img_size=self.method.evaluated.img_size,
            **self.data.pixels.exported(self.data.mean, self.data.std),
        )

    def _load_start(self, method: Method) -> str:
        """Gives a method's encoder the weights that the run starts from; says what matched."""
        assert self.origin is not None
        with set_aside(method.encoder.vit):
            return init_backbone(method.encoder.vit, self.origin, trust=self.config.trust, option=self.origin_option)

    def _started(self) -> Encoder | None:
        """The encoder as it was before its first step, with the weights that the run started from; None if lost."""
        method: Method = self._instantiate(self.options.seed).model
        try:
            self._load_start(method)
        except UserError as error:  # nobody promised to keep the file until now
            self._say(f"note: the start cannot be measured beside the result: {error.error}")
            return None
        return method.encoder

    def _untrained(self, seed: int) -> Encoder:
        """The encoder before its first step, as another seed would draw it."""
        method: Method = self._instantiate(seed).model
        return method.evaluated
