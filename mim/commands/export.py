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
    push: str | None = None,
) -> None:
    """Export the backbone of a run, or weights of any layout that ``--init`` reads.

    A folder with a classifier, such as the export of a fine-tuning, keeps it, and the names of its classes.

    Args:
        run: run folder.
        weights: instead of ``run``: a timm folder, a timm name, or with ``model`` a checkpoint file.
        model: timm name of the model that a checkpoint file belongs to.
        out: folder or file to write; ``RUN/export/backbone`` unless given.
        to: ``timm`` writes a folder for ``timm.create_model``; the others a graph from images to tokens, or to the
            logits of a classifier.
        data_licence: licence of the images, for the model card.
        trust: load a checkpoint file although it can run code.
        student: of a run whose teacher is evaluated, export the student instead.
        push: also upload the folder to the Hugging Face Hub under this name, ``user/model``; a new repository is
            private. Nothing is ever uploaded without it.
    """
    if (run is None) == (weights is None):
        raise UserError("export wants either --run or --weights", hint="--run runs/001-mae-photos")
    if run is None and out is None:
        raise UserError("export --weights needs a place to write to", hint=f"--out checkpoints/NAME{_SUFFIX[to]}")
    if push and to != "timm":
        raise UserError(f"--push uploads a timm folder, not --to {to}", hint="--push USER/NAME without --to")
    if out:
        (check_folder if to == "timm" else check_file)("--out", Path(out))
    from mim.interop.graph import write_graph
    from mim.run.weights import export_backbone

    target = Path(out) if out else Path(cast(Path, run), "export", f"backbone{_SUFFIX[to]}")
    if run:
        vit, normalisation, model_args, card = _from_run(Path(run), data_licence, student)
    else:
        vit, normalisation, model_args, card = _from_weights(cast(str, weights), model, data_licence, trust)
    names = _class_names(vit)
    if to == "timm":
        difference = export_backbone(vit, target, **normalisation, model_args=model_args, card=card, class_names=names)
        checked = f"checked: timm gives the same features, max difference {difference:g}"
    else:
        checked = f"checked: max difference {write_graph(vit, target, to, names):.1g}"
    print(f"wrote {target}   ({checked})")
    if push:
        from mim.hub import upload

        print(f"pushed to {upload(target, push)}")


def _class_names(vit: "VisionTransformer") -> list[str]:
    """Of a classifier's outputs, in order, if its folder names them."""
    names = cast(dict[str, Any], vit.pretrained_cfg).get("label_names") or []
    return list(names) if len(names) == vit.num_classes else []


_Parts = tuple["VisionTransformer", dict[str, Any], dict[str, Any], "ModelCard"]


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
        data=facts.get("data", data.path),  # as the user named it; settings hold the whole path
        data_licence=data_licence if data_licence != "unknown" else data.licence,
        images=facts.get("images"),
        epochs=facts.get("epochs"),
        steps=facts.get("steps"),
        command=(run.path / "command.txt").read_text().strip(),
    )
    kwargs = dict(config.model.init_args.encoder.kwargs or {})
    vit = method.encoder.vit if student else method.backbone
    return vit, {"mean": mean, "std": std}, kwargs, card


def _from_weights(weights: str, model: str | None, data_licence: str, trust: bool) -> _Parts:
    import timm
    from timm.models.vision_transformer import VisionTransformer

    from mim.data.pretrain import PretrainData
    from mim.interop import ModelCard, check_timm_folder, hf_folder
    from mim.run.weights import check_published, foreign_model, init_backbone

    folder = Path(weights.removeprefix("local-dir:"))
    card = ModelCard(method="unknown", data="unknown", data_licence=data_licence, notes=(f"converted from {weights}",))
    name = model or (f"local-dir:{folder}" if folder.is_dir() else weights)
    kept: dict[str, Any] = {} if name.startswith("local-dir:") else {"num_classes": 0}  # a folder may hold a classifier
    if folder.is_file() or hf_folder(folder):  # which tell themselves of channels and tokens
        name, arguments = foreign_model(weights, model, trust=trust)
        kept = {"num_classes": 0, **arguments}
    elif (folder / "config.json").is_file():
        check_timm_folder(folder, "--weights")
    elif not folder.exists():
        check_published(weights, "--weights")
    try:
        vit = timm.create_model(name, **kept)
    except (OSError, RuntimeError, ValueError) as problem:  # no such model, no config.json, a damaged one
        raise UserError(f"{name} is no model that timm can build", why=str(problem).partition("\n")[0]) from problem
    if not isinstance(vit, VisionTransformer):
        raise UserError(f"{name} is not a plain ViT", hint="--model vit_small_patch16_224")
    print(init_backbone(vit, weights, trust=trust, option="--weights"))
    cfg, foreign = cast(dict[str, Any], vit.pretrained_cfg), hf_folder(folder)
    mean, std = (foreign and foreign.mean) or cfg["mean"], (foreign and foreign.std) or cfg["std"]
    channels = vit.patch_embed.proj.in_channels
    if len(mean) != channels:  # those of the architecture, which say nothing about these weights
        mean, std = PretrainData(weights).statistics(channels)
    return vit, {"mean": mean, "std": std}, {}, card
