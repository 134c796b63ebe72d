"""Writes the generated shapes to disk, as an example of what a data folder may look like."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from PIL import Image

from mim.errors import UserError
from mim.options.outputs import check_folder
from mim.options.ranges import Count, Whole

if TYPE_CHECKING:  # torch is imported when there is something to draw: --help must not wait for it
    from torch import Tensor

    from mim.data.shapes import ShapeSource

Split = Literal["train", "val"]


def run(out: Path, train: Whole = 1024, val: Whole = 256, size: Count = 64) -> None:
    """Write the built-in shapes as PNG files: class folders of images beside class folders of masks.

    The layout is ``OUT/{train,val}/{images,masks}/<class>/<number>.png``, and ``OUT/mask_classes.txt`` says what the
    mask values mean. ``OUT/train/images`` is an ordinary folder of images by class, ready for ``--data``. The mask of
    an image has the same path below ``masks``, one byte per pixel as in ADE20K: 0 is background, label + 1 the shape.

    Args:
        out: folder to write to; it must be new or empty.
        train: number of training images.
        val: number of validation images.
        size: side of an image in pixels.
    """
    from mim.data.shapes import ShapeSource

    out = Path(out)
    check_folder("--out", out)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out}: the folder is not empty", hint=f"--out {out}-2   or delete it first")
    for split, count in zip(get_args(Split), (train, val), strict=True):
        _write_split(out / split, ShapeSource(split, count, size))
    names = ShapeSource("train", 0, size).mask_classes
    (out / "mask_classes.txt").write_text("".join(f"{value} {name}\n" for value, name in enumerate(names)))
    print(f"wrote {train} training and {val} validation images with masks; try --data {out / 'train' / 'images'}")


def _write_split(folder: Path, source: "ShapeSource") -> None:
    for kind in ("images", "masks"):
        for name in source.classes:
            (folder / kind / name).mkdir(parents=True)
    for index in range(len(source)):
        image, mask = source.read_pair(index)
        file = Path(source.classes[index % len(source.classes)], f"{index:05d}.png")
        _write_png(image.permute(1, 2, 0), folder / "images" / file)
        _write_png(mask, folder / "masks" / file)


def _write_png(pixels: "Tensor", path: Path) -> None:
    Image.fromarray(pixels.numpy()).save(path)
