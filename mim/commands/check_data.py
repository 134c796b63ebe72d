"""Look at images before training on them: ``python tools/check_data.py --data photos``."""

from pathlib import Path

from mim.options.outputs import check_file, check_picture
from mim.options.ranges import Count, Side


def run(
    data: str,
    sample: Count = 2000,
    all: bool = False,
    channels: Count = 3,
    fix: Path | None = None,
    out: Path = Path("check_data.png"),
    label_column: int | str | None = None,
    bands: str | None = None,
    nodata: float | None = None,
    windows: Side | None = None,
    stride: Count | None = None,
) -> None:
    """Read images as training would, and print what they are like and which ones are bad.

    Args:
        data: a folder, a .txt or .csv list, a .tar file, or tar shards as 'train-{0000..0099}.tar'.
        sample: how many images to read, chosen evenly at random.
        all: read every image.
        channels: what training will ask for: 1, 3, or as many as the files have.
        fix: write a .csv list of the good files here, for --data to take; reads every image.
        out: the contact sheet, a PNG; a picture of the values lies beside it.
        label_column: column of a table, by name or number, or number of a folder's level, that holds the labels.
        bands: channels to read of each file, counted from 1, as 4,3,2.
        nodata: number that stands for "not measured", besides NaN and what a GeoTIFF names.
        windows: side in pixels of the windows that larger images are cut into, as for a training.
        stride: pixels from one window to the next; as many as a window has unless given.
    """
    check_picture("--out", out)
    if fix:
        check_file("--fix", fix)
    from mim.data.pixels import Pixels, parse_bands
    from mim.data.scan import scan  # torch is imported when there is something to read: --help must not wait for it
    from mim.data.windows import Windows

    chosen, column = Pixels(type="any", bands=parse_bands(bands), nodata=nodata), label_column
    label = None if column is None else str(column)
    scan(
        data,
        None if all else sample,
        len(chosen.bands) or channels,
        fix,
        out,
        label,
        chosen,
        Windows.of(windows, stride),
    )
