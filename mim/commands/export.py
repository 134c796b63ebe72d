"""Writes trained weights for use elsewhere: a timm folder, ONNX or torch.export."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from mim.errors import UserError
from mim.options.outputs import check_file, check_folder
from mim.run.folder import named_run

if TYPE_CHECKING:  # torch is imported when there is something to export: --help must not wait for it
    from mim.interop import ModelCard
    from mim.vit import ViT

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
    if run is not None and weights is not None:
        raise UserError("export wants either --run or --weights", hint="leave --weights out")
    if run is None and weights is None:
        raise UserError("export wants either --run or --weights", hint=named_run("--run"))
    if weights is not None and out is None:
        name = Path(weights.removeprefix("local-dir:")).resolve().stem
        hint = f"--out {shlex.quote(f'checkpoints/{name}{_SUFFIX[to]}')}"
        raise UserError("export --weights needs a place to write to", hint=hint)
    if push and to != "timm":
        raise UserError(f"--push uploads a timm folder, not --to {to}", hint="leave --to out")
    if out:
        (check_folder if to == "timm" else check_file)("--out", Path(out))
    from mim.interop.graph import of_any_size, write_graph
    from mim.run.weights import export_backbone

    target = Path(out) if out else Path(cast(Path, run), "export", f"backbone{_SUFFIX[to]}")
    if run:
        vit, facts, card = _from_run(Path(run), data_licence, student)
    else:
        vit, facts, card = _from_weights(cast(str, weights), model, data_licence, trust)
    names = _class_names(vit)
    if to == "timm":
        difference = export_backbone(vit, target, **facts, card=card, class_names=names)
        checked = f"checked: timm gives the same features, max difference {difference:g}"
    else:
        checked = f"checked: max difference {write_graph(vit, target, to, names):.1g}"
        if vit.dynamic_img_size and not of_any_size(vit, to):
            height, width = vit.patch_embed.img_size
            checked += f"; for images of {height} x {width} px only, --to torch-export takes any size"
    print(f"wrote {target}   ({checked})")
    if push:
        print(f"pushed to {_pushed(target, push)}")


def _pushed(folder: Path, name: str) -> str:
    """Address on the Hugging Face Hub of a folder that has been uploaded there."""
    from mim.hub import upload

    try:
        return upload(folder, name)
    except ConnectionError as problem:
        hint = f"hf auth login, then   hf upload {name} {folder}"
        raise UserError(
            f"--push {name}: the Hugging Face Hub did not take it", why=str(problem), hint=hint
        ) from problem


def _class_names(vit: "ViT") -> list[str]:
    """Of a classifier's outputs, in order, if its folder names them."""
    names = cast(dict[str, Any], vit.pretrained_cfg).get("label_names") or []
    return list(names) if len(names) == vit.num_classes else []


_Parts = tuple["ViT", dict[str, Any], "ModelCard"]
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
        data=facts.get("data", data.path),  # as the user named it; settings hold the whole path
        data_licence=data_licence if data_licence != "unknown" else data.licence,
        images=facts.get("images"),
        epochs=facts.get("epochs"),
        steps=facts.get("steps"),
        command=(run.path / "command.txt").read_text().strip(),
    )
    kwargs = dict(config.model.init_args.encoder.kwargs or {})
    vit = method.encoder.vit if student else method.backbone
    size = method.evaluated.img_size
    return vit, {**data.pixels.exported(mean, std), "model_args": kwargs, "pool": config.pool, "img_size": size}, card


def _from_weights(weights: str, model: str | None, data_licence: str, trust: bool) -> _Parts:
    from mim.interop import ModelCard
    from mim.run.weights import load_encoder

    loaded = load_encoder(weights, model=model, trust=trust)
    print(f"weights {loaded.note}")
    card = ModelCard(method="unknown", data="unknown", data_licence=data_licence, notes=(f"converted from {weights}",))
    facts: dict[str, Any] = loaded.pixels.exported(loaded.mean, loaded.std)
    if (classifier := _classifier(weights)) is not None:
        return classifier, {**facts, "img_size": loaded.encoder.img_size}, card
    return loaded.encoder.vit, {**facts, "pool": loaded.pool, "img_size": loaded.encoder.img_size}, card


def _classifier(weights: str) -> "ViT | None":
    """The whole model of a timm folder that holds a classifier; the folder has been checked."""
    import timm

    folder = Path(weights.removeprefix("local-dir:"))
    if not (folder / "config.json").is_file() or json.loads((folder / "config.json").read_text()).get("model_type"):
        return None
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return model if model.num_classes else None
