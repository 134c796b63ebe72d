"""Writes trained weights for use elsewhere: a timm folder, ONNX or torch.export."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from mim.errors import UserError
from mim.outputs import check_file, check_folder

if TYPE_CHECKING:  # torch is imported when there is something to export: --help must not wait for it
    from timm.models.vision_transformer import VisionTransformer

    from mim.interop import ModelCard

_SUFFIX = {"timm": "", "onnx": ".onnx", "torch-export": ".pt2"}


def run(
    run: Path | None = None,
    weights: str | None = None,
    model: str | None = None,
    out: Path | None = None,
    to: Literal["timm", "onnx", "torch-export"] = "timm",
    data_licence: str = "unknown",
    trust: bool = False,
    student: bool = False,
) -> None:
    """Export the backbone of a run, or weights of any layout that ``--init`` reads.

    Args:
        run: run folder.
        weights: instead of ``run``: a timm folder, a timm name, or with ``model`` a checkpoint file.
        model: timm name of the model that a checkpoint file belongs to.
        out: folder or file to write; ``RUN/export/backbone`` unless given.
        to: ``timm`` writes a folder for ``timm.create_model``; the others a graph from images to tokens.
        data_licence: licence of the images, for the model card.
        trust: load a checkpoint file although it can run code.
        student: of a run whose teacher is evaluated, export the student instead.
    """
    if (run is None) == (weights is None):
        raise UserError("export wants either --run or --weights", hint="--run runs/001-mae-photos")
    if run is None and out is None:
        raise UserError("export --weights needs a place to write to", hint=f"--out checkpoints/NAME{_SUFFIX[to]}")
    if out:
        (check_folder if to == "timm" else check_file)("--out", Path(out))
    from mim.checkpoint import export_backbone
    from mim.interop.graph import write_graph

    target = Path(out) if out else Path(cast(Path, run), "export", f"backbone{_SUFFIX[to]}")
    if run:
        vit, normalisation, model_args, card = _from_run(Path(run), data_licence, student)
    else:
        vit, normalisation, model_args, card = _from_weights(cast(str, weights), model, data_licence, trust)
    if to == "timm":
        difference = export_backbone(vit, target, **normalisation, model_args=model_args, card=card)
        checked = f"checked: timm gives the same features, max difference {difference:g}"
    else:
        checked = f"checked: max difference {write_graph(vit, target, to):.1g}"
    print(f"wrote {target}   ({checked})")


_Parts = tuple["VisionTransformer", dict[str, Any], dict[str, Any], "ModelCard"]


def _from_run(folder: Path, data_licence: str, student: bool) -> _Parts:
    from mim.checkpoint import load_method
    from mim.interop import ModelCard
    from mim.run import RunFolder

    try:
        run = RunFolder.find(str(folder))
    except UserError as error:
        raise error.about("--run", instead_of="--resume") from error
    assert run is not None
    method, data, config = load_method(run.path)
    facts = run.read_summary()
    mean, std = data.statistics(method.evaluated.in_chans)
    card = ModelCard(
        method=type(method).__name__,
        data=data.path,
        data_licence=data_licence if data_licence != "unknown" else data.licence,
        images=facts.get("images"),
        epochs=facts.get("epochs"),
        steps=facts.get("steps"),
        command=(run.path / "command.txt").read_text().strip(),
    )
    kwargs = dict(config.model.init_args.encoder.kwargs or {})
    vit = method.encoder.vit if student else method.backbone
    return vit, data.pixels.exported(mean, std), kwargs, card


def _from_weights(weights: str, model: str | None, data_licence: str, trust: bool) -> _Parts:
    import timm
    from timm.models.vision_transformer import VisionTransformer

    from mim.checkpoint import check_published, init_backbone
    from mim.interop import ModelCard, check_timm_folder, scale_of

    if model is None and Path(weights).is_file():
        raise UserError(
            f"--weights {weights} does not say which model it belongs to", hint=f"--weights {weights} --model vit_..."
        )
    folder = Path(weights.removeprefix("local-dir:"))
    name = model or (f"local-dir:{folder}" if folder.is_dir() else weights)
    if (folder / "config.json").is_file():
        check_timm_folder(folder, "--weights")
    elif not folder.exists():
        check_published(weights, "--weights")
    try:
        vit = timm.create_model(name, num_classes=0)
    except (OSError, RuntimeError, ValueError) as problem:  # no such model, no config.json, a damaged one
        raise UserError(f"{name} is no model that timm can build", why=str(problem).partition("\n")[0]) from problem
    if not isinstance(vit, VisionTransformer):
        raise UserError(f"{name} is not a plain ViT", hint="--model vit_small_patch16_224")
    print(init_backbone(vit, weights, trust=trust, option="--weights"))
    cfg = cast(dict[str, Any], vit.pretrained_cfg)
    card = ModelCard(method="unknown", data="unknown", data_licence=data_licence, notes=(f"converted from {weights}",))
    facts = scale_of(folder)
    return vit, {"mean": cfg["mean"], "std": cfg["std"], "pixels": facts}, {}, card
