"""Write features of images: ``python tools/features.py --weights runs/001-mae-photos --data photos``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mim.distributed.processes import process_rank
from mim.errors import MachineError, UserError
from mim.options.outputs import check_folder, free_bytes
from mim.options.ranges import Count, Processes, Share, SomeShare

if TYPE_CHECKING:
    from mim.data.bad_files import BadFiles
    from mim.data.sources import Source
    from mim.transfer.features import Extraction

_FACTS, _NAMES, _BAD = "features.json", "names.txt", "bad_files.txt"
_ARRAYS = [f"{kind}.{to}" for kind in ("class", "patch") for to in ("safetensors", "npy")]


def run(
    weights: str,
    data: str = "builtin",
    out: Path = Path("features"),
    to: Literal["safetensors", "npy"] = "safetensors",
    pool: Literal["cls", "mean", "both"] | None = None,
    patch: bool = True,
    layers: Count = 1,
    dtype: Literal["float32", "float16"] = "float32",
    model: str | None = None,
    img_size: Count | None = None,
    crop_pct: SomeShare = 1.0,
    max_bad: Share = 1.0,
    encode_batch: Count = 64,
    num_workers: Processes | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    trust: bool = False,
) -> None:
    """Features of every image that can be read, a row for each, in the order of names.txt.

    Args:
        weights: run folder, timm folder, checkpoint file or timm name.
        data: folder, list, tar shards, builtin or shapes; labels are not needed. Files of a folder come sorted by
            path, those of a list and of shards in their order; train/ comes before val/.
        out: folder for class and patch, names.txt, features.json and bad_files.txt.
        to: safetensors (tensors class and patch, a file for each) or npy.
        pool: class token, mean of the patch tokens, or both end to end; what the run or the model pools by unless
            given.
        patch: also write the patch tokens of the last block, [images, rows, columns, width].
        layers: last blocks whose class features are put end to end.
        dtype: float16 takes half the room.
        model: timm name of the model that a checkpoint file belongs to, if its shapes do not tell.
        img_size: pixels per side instead of the model's own; positions are resized.
        crop_pct: side of the middle that is seen as a share of the resized image's shorter side.
        max_bad: share of unreadable files that is tolerated; they are skipped, named and counted.
        encode_batch: images encoded at once.
        num_workers: loader processes; one per core unless given.
        device: where to compute; auto takes a GPU if there is one.
        trust: load a checkpoint file although it can run code.
    """
    _check_out(out)
    # torch is imported when there is something to encode: --help must not wait for it.
    from mim.data.bad_files import BadFiles
    from mim.data.loading import loader_processes
    from mim.run.folder import quieten
    from mim.run.weights import load_encoder
    from mim.transfer.features import Extraction, all_images, chosen_device

    quieten(process_rank())
    loaded = load_encoder(weights, model=model, img_size=img_size, trust=trust)
    extraction = Extraction.of(
        loaded,
        pool or loaded.pool,
        layers,
        patch,
        crop_pct=crop_pct,
        batch_size=encode_batch,
        num_workers=loader_processes(num_workers),
        device=chosen_device(device),
    )
    sources, note = all_images(data, loaded)
    bad = BadFiles(max_bad, data)
    bad.total = sum(map(len, sources))
    print(f"  weights {loaded.note}\n  data    {data}: {bad.total:,} images", flush=True)
    if note:
        print(f"          {note}", flush=True)
    _check_room(out, extraction, bad.total, dtype)
    try:
        _clear(out)
        count = _write(extraction, sources, bad, out, to, dtype)
        shapes = {kind: [count, *shape] for kind, shape in extraction.shapes.items()}
        facts = {"weights": weights, "data": data, "images": count, "unreadable": len(bad.reasons), "shapes": shapes}
        facts |= {"dtype": dtype, "order": f"as in {_NAMES}", **extraction.facts()}
        (out / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        why = f"{free_bytes(out) / 2**20:,.0f} MiB are free there"
        raise MachineError(f"--out {out} cannot be written: {error.strerror}", why=why, hint="make room") from error
    for kind, shape in shapes.items():
        print(f"  {kind:<7} {out / f'{kind}.{to}'}   {shape} {dtype}")
    print(f"  names   {out / _NAMES}   a line for each row, in the same order")
    if bad.reasons:
        print(f"  skipped {len(bad.reasons):,} unreadable files, listed in {out / _BAD}")


def _write(
    extraction: "Extraction",
    sources: "list[Source]",
    bad: "BadFiles",
    out: Path,
    to: Literal["safetensors", "npy"],
    dtype: Literal["float32", "float16"],
) -> int:
    """Writes features and names batch by batch; returns the number of rows."""
    from contextlib import ExitStack

    from mim.interop.arrays import RowWriter

    with ExitStack() as files:
        names = files.enter_context((out / _NAMES).open("w", encoding="utf-8"))
        writers = {
            kind: files.enter_context(RowWriter(out / f"{kind}.{to}", kind, shape, dtype))
            for kind, shape in extraction.shapes.items()
        }
        for rows in extraction.rows(sources, bad):
            names.writelines(f"{name}\n" for name in rows.names)
            for kind, values in (("class", rows.pooled), ("patch", rows.patches)):
                if values is not None:
                    writers[kind].write(values.cpu().numpy())
        if bad.reasons:
            (out / _BAD).write_text("".join(f"{name}\t{why}\n" for name, why in bad.reasons.items()), encoding="utf-8")
        if not writers["class"].rows:
            raise UserError(f"none of the {bad.total:,} images can be read", hint=f"the reasons are in {out / _BAD}")
    return writers["class"].rows


def _clear(out: Path) -> None:
    """Makes the folder, without what an earlier call has written there."""
    out.mkdir(parents=True, exist_ok=True)
    for old in (_FACTS, _NAMES, _BAD, *_ARRAYS):
        (out / old).unlink(missing_ok=True)


def _check_out(out: Path) -> None:
    """Refuses a folder that cannot be written, or that holds anything but earlier features."""
    check_folder("--out", out)
    foreign = sorted({file.name for file in out.iterdir()} - {_FACTS, _NAMES, _BAD, *_ARRAYS}) if out.is_dir() else []
    if foreign:
        raise UserError(
            f"--out {out} holds other files",
            why=f"it holds {foreign[0]}, which is none of the features of an earlier call",
            hint=f"--out {out}/features",
        )


def _check_room(out: Path, extraction: "Extraction", images: int, dtype: str) -> None:
    """Refuses a disk that is too small before anything is encoded."""
    from math import prod

    numbers = images * sum(prod(shape) for shape in extraction.shapes.values())
    needed, free = numbers * {"float32": 4, "float16": 2}[dtype], free_bytes(out)
    if needed > free:
        raise UserError(
            f"--out {out}: features need {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free",
            why=f"{images:,} images with {', '.join(f'{kind} {list(s)}' for kind, s in extraction.shapes.items())}",
            hint="--patch false   or   --dtype float16   or   --out another/disk",
        )
