"""Draw what a model sees, keeps, hides or rests on: ``python tools/visualize.py --weights runs/001-mae-photos``."""

from pathlib import Path
from typing import TYPE_CHECKING

from mim.errors import UserError
from mim.options.outputs import check_picture
from mim.options.ranges import Count, Names, Whole
from mim.program import called
from mim.run.folder import named_run

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from mim.encoder import Encoder
    from mim.masking import Masking
    from mim.reduction import Tokens
    from mim.run.weights import LoadedEncoder

_EXPLANATIONS = ("rollout", "tokentm", "gradcam")
"""Those of ``mim.evaluation.explanations``, which needs torch."""


def run(
    weights: str | None = None,
    model: str | None = None,
    data: str = "builtin",
    reduction: Names | None = None,
    policy: Names | None = None,
    explain: Names | None = None,
    deleted: Whole = 64,
    images: Count = 4,
    columns: Count = 5,
    img_size: Count | None = None,
    out: Path = Path("visualize.png"),
    trust: bool = False,
) -> None:
    """One picture of a few images: attention and features, what reductions leave or policies hide, or explanations.

    Args:
        weights: run folder, timm folder, checkpoint file or timm name.
        model: timm name of the model that a checkpoint file belongs to; without weights, the model to draw untrained.
        data: images, as for pretraining; those that the data sets apart if there are any.
        reduction: which tokens live, merge or leave, block by block: a name such as tome, with what its knob is set to
            as in tome:8 or evit:0.7 (half of the multiply-adds unless given), a YAML file, or a folder with a trained
            one. Several, with commas, are shown side by side at their end.
        policy: what masking policies hide of the images: random, block, high, hint, low, with commas, or 'all'. The
            last three follow the attention of the weights.
        explain: patches that the answer of a fine-tuned or probed classifier rests on: rollout, tokentm, gradcam, with
            commas, or 'all'; and the deletion test of each, as numbers.
        deleted: images of the deletion test, in which patches turn grey; 0 leaves it out.
        images: rows, spread over the data.
        columns: most blocks that are shown of one reduction.
        img_size: pixels per side instead of the model's own; positions are resized.
        out: the picture, a PNG.
        trust: load a checkpoint file although it can run code.
    """
    if weights is None and model is None:
        raise UserError(
            "there is no model to look into", hint=f"{named_run('--weights')}   or   --model vit_small_patch16_224"
        )
    check_picture("--out", out)
    others = {"reduction": reduction, "policy": policy, "explain": explain}
    if len(asked := [name for name, what in others.items() if what]) > 1:
        raise UserError(f"--{asked[0]} and --{asked[1]} are two pictures", hint=f"leave --{asked[1]} out")
    explanations = _chosen_explanations(explain) if explain else []
    loaded = _load(weights, model, img_size, trust)
    batch = _images(data, loaded, images)
    if explain:
        picture = _explanations(
            explanations, weights, loaded, batch, _images(data, loaded, deleted) if deleted else None
        )
    elif policy:
        picture = _policies(policy, loaded, batch)
    elif reduction:
        picture = _reductions(reduction, loaded, batch, columns)
    else:
        from mim.pictures.strips import strip

        picture = strip(batch, {}, loaded.encoder, loaded.mean, loaded.std, not loaded.pixels.pictures)
    from mim.pictures.strips import save_strip

    out.parent.mkdir(parents=True, exist_ok=True)
    save_strip(picture, out)
    print(f"  weights {loaded.note}\n  picture {out}")


def _load(weights: str | None, model: str | None, img_size: int | None, trust: bool) -> "LoadedEncoder":
    from mim.run.weights import LoadedEncoder, load_encoder, untrained_encoder

    if weights is not None:
        return load_encoder(weights, model=model, img_size=img_size, trust=trust)
    assert model is not None
    encoder = untrained_encoder(model, seed=0, model=model, img_size=img_size)
    return LoadedEncoder(encoder, *encoder.statistics, f"{model}, untrained", encoder.pool)


def _images(data: str, loaded: "LoadedEncoder", count: int) -> "Tensor":
    """The middles of ``count`` readable images, normalised, ``(B, C, H, W)``."""
    import torch

    from mim.data.pretrain import PretrainData

    opened = PretrainData(data, num_workers=0, mean=loaded.mean, std=loaded.std)
    opened.pixels, opened.resolved = loaded.pixels, True
    opened.open(loaded.encoder.img_size, loaded.encoder.in_chans, seed=0)
    source = opened.evaluation or opened.source
    chosen = [place * len(source) // count for place in range(min(count, len(source)))]
    batches = [pixels for pixels, _ in opened.center_batches(source, chosen)]
    if not batches:
        raise UserError(f"--data {data}: none of the {len(chosen)} images that were tried can be read")
    return torch.cat(batches)


def _reductions(names: str, loaded: "LoadedEncoder", batch: "Tensor", columns: int) -> "Image.Image":
    from mim.pictures.tokens import reduction_strip, states_of
    from mim.reduction.files import build_reduction

    encoder, chosen = loaded.encoder, [name.strip() for name in names.split(",")]
    states: dict[str, Tokens] = {}
    for name in chosen:
        encoder.reduction = build_reduction(name, encoder.vit).eval()
        print(f"  {name:<7} {encoder.reduction.describe()}")
        shown = states_of(encoder, batch, columns if len(chosen) == 1 else 1)
        states |= shown if len(chosen) == 1 else {f"{name}, {title}": tokens for title, tokens in shown.items()}
    measured = not loaded.pixels.pictures
    return reduction_strip(batch, states, encoder.patch_size, loaded.mean, loaded.std, measured)


def _policies(names: str, loaded: "LoadedEncoder", batch: "Tensor") -> "Image.Image":
    from mim.pictures.strips import masking_strip

    known = _known_policies()
    can_guide = loaded.encoder.has_class_attention
    possible = [name for name, policy in known.items() if can_guide or not policy.guided]
    chosen = possible if names == "all" else [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in possible:
            why = "the model has no class token whose attention it could follow" if name in known else None
            hint = f"--policy {','.join(possible)}"
            raise UserError(f"--policy {name}: there is no such policy here", why=why, hint=hint)
    policies = {name: known[name] for name in chosen}
    measured = not loaded.pixels.pictures
    return masking_strip(batch, loaded.encoder, policies, loaded.mean, loaded.std, measured)


def _explanations(
    chosen: list[str], weights: str | None, loaded: "LoadedEncoder", batch: "Tensor", tested: "Tensor | None"
) -> "Image.Image":
    from mim.evaluation.explanations import EXPLANATIONS, classify
    from mim.pictures.strips import columns_of_maps
    from mim.run.weights import restore_classifier
    from mim.vit import distilled

    encoder, names = loaded.encoder, ",".join(chosen)
    if distilled(encoder.vit):
        raise UserError(
            f"--explain {names}: a distilled model has two classifiers, and the answer of one is explained",
            hint="leave --explain out",
        )
    classes = restore_classifier(weights, encoder.vit) if weights else None
    if classes is None:
        raise UserError(
            f"--explain {names}: {weights or 'an untrained model'} has no classifier whose answers could be explained",
            why="rollout, tokentm and gradcam are tested by what it still answers",
            hint=f"{called('linear_probe')} --weights {weights or 'runs/001-mae-builtin'} --export true",
        )
    answers = classify(encoder, batch).softmax(dim=1).max(dim=1)
    for number, (share, answer) in enumerate(zip(*answers, strict=True), start=1):
        print(f"  image {number}  {classes[int(answer)]}, {share:.0%}")
    try:
        maps = {name: EXPLANATIONS[name](encoder, batch, answers.indices) for name in chosen}
    except (TypeError, ValueError) as error:
        raise UserError(
            f"--explain {names} does not work with this model", why=str(error), hint="--explain gradcam"
        ) from error
    if tested is not None:
        print(_deletion_test(chosen, encoder, tested))
    return columns_of_maps(batch, maps, loaded.mean, loaded.std, not loaded.pixels.pictures)


def _deletion_test(names: list[str], encoder: "Encoder", images: "Tensor") -> str:
    """The curves of some explanations and of chance, as a table."""
    from mim.evaluation.deletion import SHARES, area, deletion_curve, random_importance
    from mim.evaluation.explanations import EXPLANATIONS, classify
    from mim.report.tables import text_table

    answers = classify(encoder, images).argmax(dim=1)
    maps = {name: EXPLANATIONS[name](encoder, images, answers) for name in names}
    maps["chance"] = random_importance(len(images), encoder.grid)
    rows = []
    for name, importance in maps.items():
        for first, title in ((True, "most important first"), (False, "least important first")):
            curve = deletion_curve(lambda view: classify(encoder, view), images, importance, first)
            rows.append([name, title, *(f"{100 * kept:.0f}" for kept in curve), f"{area(curve):.3f}"])
    head = ["grey patches, %", "", *(f"{100 * share:.0f}" for share in SHARES), "area"]
    return f"  deletion test: % of {len(images)} images that keep their answer\n\n{text_table(head, rows)}\n"


def _chosen_explanations(names: str) -> list[str]:
    chosen = list(_EXPLANATIONS) if names == "all" else [name.strip() for name in names.split(",")]
    if unknown := [name for name in chosen if name not in _EXPLANATIONS]:
        hint = f"--explain {','.join(_EXPLANATIONS)}"
        raise UserError(f"--explain {unknown[0]}: there is no such explanation", hint=hint)
    return chosen


def _known_policies() -> "dict[str, Masking]":
    """With the papers' largest ratios, in every image: what is never hidden says little."""
    from mim.masking import AttentionMasking, BlockMasking, RandomMasking, RectangleMasking

    return {
        "random": RandomMasking(0.75),
        "block": BlockMasking(low=0.5, high=0.5, unmasked_share=0.0),
        "inverse": RectangleMasking(0.65),
        "high": AttentionMasking("high", low=0.5, high=0.5, unmasked_share=0.0),
        "hint": AttentionMasking("hint", low=0.5, high=0.5, unmasked_share=0.0),
        "low": AttentionMasking("low", low=0.5, high=0.5, unmasked_share=0.0),
    }
