"""Writes trained weights for use elsewhere: a timm folder, ONNX or torch.export."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from mim.errors import UserError
from mim.options.outputs import check_file, check_folder

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
    from mim.interop.graph import write_graph
    from mim.run.weights import export_backbone

    target = Path(out) if out else Path(cast(Path, run), "export", f"backbone{_SUFFIX[to]}")
    if run:
        vit, facts, card = _from_run(Path(run), data_licence, student)
    else:
        vit, facts, card = _from_weights(cast(str, weights), model, data_licence, trust)
    if to == "timm":
        difference = export_backbone(vit, target, **facts, card=card)
        checked = f"checked: timm gives the same features, max difference {difference:g}"
    else:
        checked = f"checked: max difference {write_graph(vit, target, to):.1g}"
    print(f"wrote {target}   ({checked})")


_Parts = tuple["VisionTransformer", dict[str, Any], "ModelCard"]
"""A model, what else :func:`mim.interop.export_backbone` wants to know of it, and its card."""


def _from_run(folder: Path, data_licence: str, student: bool) -> _Parts:
    from mim.interop import ModelCard
    from mim.run.folder import RunFolder
    from mim.run.weights import load_method

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
    return vit, {**data.pixels.exported(mean, std), "model_args": kwargs, "pool": config.pool}, card


def _from_weights(weights: str, model: str | None, data_licence: str, trust: bool) -> _Parts:
    from mim.interop import ModelCard
    from mim.run.weights import load_encoder

    if model is None and Path(weights).is_file():
        raise UserError(
            f"--weights {weights} does not say which model it belongs to", hint=f"--weights {weights} --model vit_..."
        )
    loaded = load_encoder(weights, model=model, trust=trust)
    print(f"weights {loaded.note}")
    card = ModelCard(method="unknown", data="unknown", data_licence=data_licence, notes=(f"converted from {weights}",))
    return loaded.encoder.vit, {**loaded.pixels.exported(loaded.mean, loaded.std), "pool": loaded.pool}, card
