"""Measure what token reductions save at inference: ``python tools/benchmark_reduction.py --reduction tome,evit``."""

from pathlib import Path
from typing import Any, Literal

from mim.errors import UserError
from mim.options.outputs import check_file
from mim.options.ranges import Count, Names, Threads
from mim.options.shares import parse_shares


def run(
    reduction: Names = "all",
    shares: Names = "0.75,0.5",
    model: str = "vit_base_patch16_224",
    img_size: Count | None = None,
    batch_size: Count = 8,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto",
    threads: Threads | None = None,
    rounds: Count = 10,
    json: Path | None = None,
) -> None:
    """Measure speed, arithmetic and memory of token reductions beside the whole model and timm's patch drop.

    Args:
        reduction: names with commas, or 'all'.
        shares: of the model's multiply-adds that each reduction is set to, with commas.
        model: any timm Vision Transformer; its weights do not matter.
        img_size: pixels per side instead of the model's own.
        batch_size: images of a forward pass, which are noise.
        device: where to compute; auto takes a GPU if there is one.
        precision: of the forward pass; auto is bf16-mixed on a GPU that has it.
        threads: processor threads; all unless given.
        rounds: turns of each, after two that are not counted.
        json: write every number to this file.
    """
    parts = parse_shares(shares)
    if json:
        check_file("--json", json)
    import timm
    import torch

    from mim.benchmark.inference import contenders, measure, table
    from mim.benchmark.results import prepare, write_json
    from mim.distributed.devices import best_precision
    from mim.reduction.recipes import RECIPES
    from mim.reduction.wrapper import check_reducible

    place = prepare(device, threads)
    kind = best_precision(place.type == "cuda") if precision == "auto" else precision
    wanted = (
        [name for name, recipe in RECIPES.items() if recipe.shortens] if reduction == "all" else reduction.split(",")
    )
    torch.manual_seed(0)
    sized: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    vit: Any = timm.create_model(model, **sized)
    try:
        check_reducible(vit)
        size = vit.patch_embed.img_size
        images = torch.randn(batch_size, vit.patch_embed.proj.in_channels, *size, device=place)
        models = contenders(vit, wanted, parts, images, kind)
    except TypeError as error:
        raise UserError(f"--model {model}: {error}", hint="--model vit_base_patch16_224") from error
    rows = measure(models, rounds)
    where = f"{place.type}, {torch.get_num_threads()} threads, {kind}"
    print(f"{model}, batch {batch_size} at {size[0]}x{size[1]}, {where}; {rounds} rounds\n")
    print(table(rows))
    print("\n  GMAC     multiply-adds per image by formula; counted: by torch while the model runs")
    print("  speed    over the whole model in the same round: median; fastest steps; processor time")
    print("  of MACs  speed over what the saved multiply-adds promise")
    write_json(json, {"model": model, "batch_size": batch_size, "threads": torch.get_num_threads(), "rows": rows})
