"""Pretrain a Vision Transformer: from a folder of images to a timm model."""

import math
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jsonargparse import Namespace
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from timm.models import is_model_pretrained

from mim import __version__
from mim.callbacks import Checkpoints, Evaluation, NaNDump, RunLog, Signals
from mim.callbacks.run_log import duration
from mim.data.pretrain import PretrainData
from mim.distributed.devices import best_precision
from mim.distributed.processes import INTERRUPTED, process_rank
from mim.distributed.sharding import ShardedStrategy
from mim.encoder import Encoder
from mim.errors import MACHINE_ERRORS, DivergedError, MachineError, UserError
from mim.hub import SCHEMES
from mim.methods import Method, NonFiniteError, Plan
from mim.program import called
from mim.report import write_report
from mim.run.checkpoint_files import AtomicCheckpointIO, check_room, checkpoint_step, newest_good
from mim.run.config import (
    absolute,
    changes,
    instantiate,
    parse,
    parse_saved,
    run_options,
    save_config,
    with_absolute_paths,
)
from mim.run.failures import as_machine_error
from mim.run.folder import UNWRITABLE, RunFolder, git_commit, quieten, versions
from mim.run.trainer import build_trainer
from mim.run.weights import ModelCard, export_backbone, init_backbone, load_method
from mim.targets import Target
from mim.vit import compile_blocks

FREE_TO_CHANGE = ("trainer.", "data.num_workers", "data.max_bad", "log_every", "save_every", "eval_every", "pictures")
"""Settings that a resumed run may change without asking: they do not change what is computed."""


def main(args: Sequence[str]) -> int:
    """Parses dotted options, trains, exports; returns the exit status."""
    return trained(args)[0]


def trained(args: Sequence[str]) -> tuple[int, RunFolder]:
    """As :func:`main`, with the run's folder."""
    options = dict(arg.removeprefix("--").partition("=")[::2] for arg in args)
    resumed = RunFolder.find(options["resume"], options.get("out")) if "resume" in options else None
    if resumed is not None:
        args = _resumed_arguments(resumed, args)
    pretraining = Pretraining(parse(args), resumed)
    return pretraining.run(args), pretraining.folder


class Pretraining:
    """One call of the command: what a run is made of, put together from its settings.

    Args:
        config: parsed settings.
        resumed: the run to continue; a new one if not given.
    """

    def __init__(self, config: Namespace, resumed: RunFolder | None) -> None:
        self.rank = process_rank()
        quieten(self.rank)
        self.config, self.resumed, self.options = config, resumed, run_options(config)
        self.folder = resumed or RunFolder(Path(config.out or "runs"))
        if self.options.threads:
            torch.set_num_threads(self.options.threads)
        objects = self._instantiate(self.options.seed)
        self.method: Method = objects.model
        self.data: PretrainData = objects.data
        self.method.check()
        encoder = self.method.evaluated
        self.origin: str | None = config["continue"] or config.init
        if config["continue"]:
            self._check_continued(encoder)
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

    def _check_continued(self, encoder: Encoder) -> None:
        """Images are normalised as the weights expect them, unless they are told otherwise."""
        if self.config.init:
            raise UserError("--continue and --init both name weights to start from", hint="one of them")
        mean, std = encoder.statistics
        given = self.config.data
        if given.mean is None and given.std is None and len(mean) == encoder.in_chans:
            given.mean, given.std = mean, std  # to be saved with all other settings
            self.data.normalise_by(mean, std)

    def _open_data(self) -> None:
        """Finds the images; those of a resumed run may have moved."""
        encoder = self.method.evaluated
        try:
            self.data.open(encoder.img_size, encoder.in_chans, self.options.seed)
        except UserError as error:
            if self.resumed is None or Path(self.data.path).exists():
                raise
            hint = f"--resume {self.resumed.path} --data NEW --allow_change data.path   if they have moved"
            raise UserError(error.error, why="the run was started with these images", hint=hint) from error

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
        if self.rank == 0:
            self._introduce(trainer, evaluation, checked, args)
            note = initialised or (_random_start(self.config) if checkpoint is None else None)
            if note:
                self._say(note)
        if self.options.compile:
            compile_blocks(self.method)
        started = time.monotonic()
        try:
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
        """Trains; what data, settings or the machine can do to that ends in a :class:`UserError`."""
        try:
            trainer.fit(self.method, self.data, ckpt_path=checkpoint and str(checkpoint), weights_only=True)
        except NonFiniteError as error:
            raise self._diverged(error, trainer) from error
        except MACHINE_ERRORS as error:
            if (failure := self._failure(error, trainer) or self._lost_process(trainer)) is None:
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
                _remember_moved_data(folder, self.config)
        elif self.rank != 0:
            return RunFolder(Path(self.config.out or "runs"))
        else:
            name = f"{self.method.name}-{self.data.short_name}"
            folder = RunFolder.create(self.config.out, name, self.config.overwrite)
            plugins = [f"--plugin={','.join(self.config.plugin)}"] if self.config.plugin else []
            folder.write_origin([*args, *plugins])
            save_config(with_absolute_paths(self.config), folder.config)
        if self.rank == 0:
            self.data.bad_files.write_to(folder.bad_files)
        return folder

    def _attend(self, trainer: Trainer) -> tuple[Evaluation, Checkpoints]:
        """Adds everything that writes into the run's folder."""
        options, plan = self.options, self.plan
        log = RunLog(self.folder, options.log_every)
        every = options.eval_every * plan.steps_per_epoch if options.eval_every else plan.max_steps / 10
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
        if self.rank == 0:
            trainer.logger = TensorBoardLogger(self.folder.path, name="tensorboard", version="")
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

    def _introduce(
        self, trainer: Trainer, evaluation: Evaluation, checked: tuple[int, tuple[int, int]], args: Sequence[str]
    ) -> None:
        """Says what is going to happen before it happens, and keeps it in ``summary.json``."""
        method, data, plan, source = self.method, self.data, self.plan, self.data.source
        encoder = method.evaluated
        count, (width, height) = checked
        trainable = sum(p.numel() for p in method.parameters() if p.requires_grad)
        backbone = sum(p.numel() for p in method.backbone.parameters())
        grid, patches = encoder.grid, math.prod(encoder.grid)
        name, model = method.name, self.config.model.init_args.encoder.model
        labels = f"{len(source.classes):,} labels" if source.labels else "no labels"
        if source.labels:
            labels += " -> k-NN and linear probe" if evaluation.labelled else ", too few images of each for probes"
        others = getattr(source, "ignored", {}).items()
        ignored = ", ".join(f"{number} {kind}" for kind, number in others if not kind.startswith("masks"))
        device = "cpu" if trainer.strategy.root_device.type == "cpu" else torch.cuda.get_device_name()
        size, patch = "x".join(map(str, encoder.img_size)), "x".join(map(str, encoder.patch_size))
        accumulate = trainer.accumulate_grad_batches
        per_device = plan.batch_size // trainer.world_size // accumulate
        damaged = getattr(source, "damaged", [])
        lines = [
            f"mim {__version__}  {name} on {model}   run {self.folder.path}",
            f"  data    {data.path}: {len(source):,} images, {labels}" + (f"; ignored: {ignored}" if ignored else ""),
            f"          checked {count:,}: {len(data.bad_files.reasons)} unreadable, smallest {width}x{height}",
            f"  model   {backbone / 1e6:.1f} M parameters, {trainable / 1e6:.1f} M trained with its heads; "
            f"{size} px / {patch} = {grid[0]}x{grid[1]} = {patches} patches",
            f"  mask    {method.mask_words()}",
            f"  optim   blr {method.optim.blr:.2e} x {plan.batch_size} / 256 -> lr {method.peak_lr:.2e}, "
            f"warm-up {method.warmup_steps:,} steps, AdamW, weight decay {method.optim.weight_decay}",
            f"  batch   {plan.batch_size} = {trainer.world_size} device x {per_device} x {accumulate} accumulate; "
            f"{plan.steps_per_epoch:,.1f} steps per epoch, {plan.max_steps:,} steps in {plan.epochs:.4g} epochs",
            *_few_images(len(source), plan),
            *self._gently(),
            f"  device  {device}, {trainer.precision}, {data.num_workers} workers, {torch.get_num_threads()} threads",
            f"  resume  {called('pretrain')} --resume {self.folder.path}",
        ]
        lines[3:3] = [f"  values  {self.data.describe_values()}"] if not self.data.plain else []
        lines[2:2] = [f"          {finding}" for finding in getattr(source, "findings", list)()]
        lines += [f"  damaged {error}" for error in damaged[:5]]
        if data.first_step:
            lines.append(f"  from    step {data.first_step:,} of {plan.max_steps:,}")
        self._say("\n".join(lines) + "\n")
        self.folder.write_summary(
            status="running",
            method=name,
            model=model,
            data=data.path,
            images=len(source),
            classes=len(source.classes) if source.labels else 0,
            epochs=round(plan.epochs, 4),
            steps=plan.max_steps,
            batch_size=plan.batch_size,
            lr=method.peak_lr,
            seed=plan.seed,
            start=self.origin,
            pool=self.options.pool,
            parameters=backbone,
            device=device,
            changed=changes(args),
            versions=versions(),
            git=git_commit(),
        )

    def _gently(self) -> list[str]:
        """How good weights are treated, if they are."""
        optim, held = self.method.optim, self.method.held_steps
        if not held and optim.layer_decay == 1 and not optim.anchor.holds:
            return []
        anchors = [f"{name} {weight:g}" for name, weight in vars(optim.anchor).items() if weight]
        anchored = f", anchored by {' and '.join(anchors)}" if anchors else ""
        return [f"  start   encoder stands still for {held:,} steps, layer decay {optim.layer_decay:g}{anchored}"]

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
        self._conclude(facts, probe, report, difference)
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
            **self.data.pixels.exported(self.data.mean, self.data.std),
        )

    def _load_start(self, method: Method) -> str:
        """Gives a method's encoder the weights that the run starts from; says what matched."""
        assert self.origin is not None
        option = "--continue" if self.config["continue"] else "--init"
        return init_backbone(method.encoder.vit, self.origin, trust=self.config.trust, option=option)

    def _started(self) -> Encoder:
        """The encoder as it was before its first step, with the weights that the run started from."""
        method: Method = self._instantiate(self.options.seed).model
        self._load_start(method)
        return method.encoder

    def _untrained(self, seed: int) -> Encoder:
        """The encoder before its first step, as another seed would draw it."""
        method: Method = self._instantiate(seed).model
        return method.evaluated

    def _conclude(self, facts: dict[str, Any], probe: dict[str, Any], report: Path, difference: float) -> None:
        def mean(kind: str, who: str) -> float:
            return float(sum(probe[kind][who]) / len(probe[kind][who]))

        def compared(kind: str) -> str:
            beside = [f"{who} {mean(kind, who):.1%}" for who in ("untrained", "start") if who in probe[kind]]
            return f"{kind} {mean(kind, 'trained'):.1%} ({', '.join(beside)})"

        known = [kind for kind in ("knn", "linear") if "start" in probe.get(kind, {})]
        better = [kind for kind in known if mean(kind, "start") > mean(kind, "trained")]

        numbers = [f"loss {facts['loss']:.4f}", *(compared(kind) for kind in ("knn", "linear") if kind in probe)]
        bad = facts["bad_files"]
        self._say(
            f"\ndone in {duration(facts['wall_seconds'])}   {'   '.join(numbers)}\n"
            + (f"  start    was better by {' and '.join(better)}: {self.origin}\n" if better else "")
            + (f"  skipped  {bad} unreadable files, listed in {self.folder.bad_files}\n" if bad else "")
            + f"  report   {report}\n"
            f"  backbone {self.folder.backbone}   "
            f"(checked: timm gives the same features, max difference {difference:.0f})\n\n"
            "    import timm\n"
            f'    model = timm.create_model("local-dir:{self.folder.backbone}", pretrained=True)\n'
            "    features = model.forward_features(images)\n"
        )

    def _diverged(self, error: NonFiniteError, trainer: Trainer) -> DivergedError:
        last, _ = newest_good(self.folder.checkpoints)
        dump = self.folder.nan_dump(error.step)
        kept = f"are in {dump}" if dump.exists() else f"could not be written to {dump}"
        return DivergedError(
            f"{error}; the optimizer skipped the step",
            why=f"batch ({', '.join(error.names[:3])}, ...), seed and weights {kept}; "
            f"last good checkpoint: {last or 'none yet'}",
            hint=("" if trainer.precision == "32-true" else "--precision 32-true   or   ")
            + "a lower --blr   or   --trainer.gradient_clip_val 1.0",
        )

    def _lost_process(self, trainer: Trainer) -> MachineError | None:
        """Names a rank that this process started and that died: the backend itself reports a closed connection only."""
        for rank, process in enumerate(getattr(trainer.strategy.launcher, "procs", []), start=1):
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout=2)  # it may still be writing its own error
                if status == 0:
                    continue
                how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"
                return MachineError(
                    f"process {rank} of {trainer.world_size} died ({how}), so all others were stopped",
                    why="look above for its own error; if there is none, it was probably killed for lack of memory",
                    hint=f"{called('pretrain')} --resume {self.folder.path}",
                )
        return None

    def _failure(self, error: Exception, trainer: Trainer) -> MachineError | None:
        """Memory or a loader process, if it was one of them."""
        per_device = self.plan.batch_size // trainer.world_size // trainer.accumulate_grad_batches
        accumulate = trainer.accumulate_grad_batches * 4
        return as_machine_error(
            error,
            at=f" at batch {per_device} per device",
            memory_hint=f"--accumulate {accumulate}   (same global batch and learning rate), --precision bf16-mixed, "
            "--model.init_args.encoder.grad_checkpointing true",
            loader_hint=f"{called('pretrain')} --resume {self.folder.path}   "
            f"(with --num_workers {self.data.num_workers // 2} if memory was short)",
        )


def _few_images(images: int, plan: Plan) -> list[str]:
    """A line if the images do not fill a batch: the default batch then makes a run of very few steps."""
    if images >= plan.batch_size:
        return []
    fitting = 1 << max(0, (images // 3).bit_length() - 1)
    return [
        f"          {images:,} images at batch {plan.batch_size:,}: {plan.max_steps:,} steps in all; "
        f"--batch_size {fitting}   makes {round(plan.epochs * images / fitting):,} of them"
    ]


def _resumed_arguments(run: RunFolder, args: Sequence[str]) -> list[str]:
    """The saved settings with this call's options on top; refuses what would change the function computed."""
    saved = f"--config={run.config}"
    settled = ("--config=", "--out=", "--data.value_range=auto")  # the last was settled by the first start
    merged = [saved, *(arg for arg in args if not arg.startswith(settled))]
    try:
        allowed = (*FREE_TO_CHANGE, *filter(None, parse(merged).allow_change.split(",")))
    except UserError:
        parse_saved(run.config)  # if they are to blame, not what was added to them
        raise
    changed = changes(merged)
    if "data.path" in changed and len(set(map(absolute, changed["data.path"]))) == 1:
        changed.pop("data.path")  # the same folder, named from another place
    differing = {
        name: values
        for name, values in changed.items()
        if not name.startswith(allowed) and not (name == "epochs" and values[1] > values[0])
    }
    if differing:
        rows = [f"         {name:<40} {old} -> {new}" for name, (old, new) in differing.items()]
        raise UserError(
            "\n".join([f"--resume {run.path}: {_counted(rows)} from the saved run", *rows]),
            why="resuming continues the same schedule and optimizer",
            hint=f"drop them,  or  --allow_change {','.join(differing)},  or start fresh:  --init {run.path}",
        )
    if "epochs" in changed:
        print(f"note: epochs {changed['epochs'][0]} -> {changed['epochs'][1]}: schedules are stretched", flush=True)
    return merged


def _counted(rows: Sequence[str]) -> str:
    return "1 setting differs" if len(rows) == 1 else f"{len(rows)} settings differ"


def _remember_moved_data(run: RunFolder, config: Namespace) -> None:
    """Writes into the run's settings where its images are now, if the user has allowed that to change."""
    saved, path = parse_saved(run.config), absolute(config.data.path)
    if absolute(saved.data.path) != path:
        saved.data.path = path
        save_config(saved, run.config)


def _random_start(config: Namespace) -> str | None:
    """A line for those who name published weights as the model, which is built from random ones."""
    encoder = config.model.init_args.encoder
    name = str(encoder.model)
    if config.init or encoder.pretrained or not (":" in name or (is_model_pretrained(name) and "." in name)):
        return None
    if name.startswith(SCHEMES):
        hint = "--model.init_args.encoder.pretrained true"
    else:
        hint = f"--init {name.removeprefix('local-dir:')}"
    return f"note: --model {name} trains from random weights; {hint} starts from its own"
