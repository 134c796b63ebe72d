"""A folder of odd image files: legal ones with the pixels they must give, and bad ones.

Pictures are smooth ramps, so that lossy formats stay close, and differ in every corner, so that turns show.
"""

import gzip
import io
import json
import pickle
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import tifffile
from PIL import Image

HEIGHT, WIDTH = 24, 32


class Case(NamedTuple):
    name: str
    data: bytes
    truth: np.ndarray | None = None  # (H, W, 3) uint8, None for a bad file
    tolerance: int = 1


def colour() -> np.ndarray:
    """(H, W, 3) uint8."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.stack([60 + 5 * x, 40 + 7 * y, 200 - 2 * x - 3 * y], -1).astype(np.uint8)


def grey() -> np.ndarray:
    """(H, W) float64 in 0..1."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return (x * 2 + y * 5 + 10) / 200


def encode(image: Image.Image, fmt: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def tiff(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, kind: int, rows: bytes, extra: bytes = b"", interlaced: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlaced)
    parts = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def rows_of(pixels: np.ndarray) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in pixels)


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def three(values: np.ndarray) -> np.ndarray:
    return np.repeat(values.astype(np.uint8)[..., None], 3, -1)


# How a camera that was held in a given way stores an upright picture.
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


def legal() -> Iterator[Case]:
    rgb, level = colour(), grey()
    image, eight = Image.fromarray(rgb), three(np.round(level * 255))
    luma = Image.fromarray(eight[..., 0])
    sixteen = np.round(level * 65535).astype(np.uint16)

    lossless = {"png": "PNG", "bmp": "BMP", "tif": "TIFF", "ppm": "PPM", "jp2": "JPEG2000", "dib.bmp": "BMP"}
    for suffix, fmt in lossless.items():
        yield Case(f"format.{suffix}", encode(image, fmt), rgb)
    yield Case("format.webp", encode(image, "WEBP", lossless=True), rgb)
    for suffix, fmt in {"jpg": "JPEG", "webp": "WEBP", "avif": "AVIF"}.items():
        yield Case(f"lossy.{suffix}", encode(image, fmt, quality=98), rgb, 10)
    yield Case("progressive.jpg", encode(image, "JPEG", quality=98, progressive=True), rgb, 6)
    yield Case("wrong-suffix.png", encode(image, "JPEG", quality=98), rgb, 6)
    yield Case("UPPER CASE name ü.JPG", encode(image, "JPEG", quality=98), rgb, 6)
    yield Case("mpo.jpg", encode(image, "MPO", save_all=True, append_images=[luma.convert("RGB")], quality=98), rgb, 6)
    yield Case("trailing.jpg", encode(image, "JPEG", quality=98) + b"junk" * 99, rgb, 6)
    yield Case("gif.gif", encode(luma, "GIF"), eight)
    yield Case("animated.gif", encode(luma, "GIF", save_all=True, append_images=[luma.rotate(180)]), eight)
    yield Case("animated.webp", encode(image, "WEBP", save_all=True, append_images=[image], lossless=True), rgb)
    yield Case("animated.png", encode(image, "PNG", save_all=True, append_images=[image.rotate(180)]), rgb)
    yield Case("stack.tif", encode(image, "TIFF", save_all=True, append_images=[image.rotate(180)]), rgb)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        yield Case(f"{compression}.tif", encode(image, "TIFF", compression=compression), rgb)

    for fmt, suffix in (("PNG", "png"), ("TIFF", "tif"), ("JPEG", "jpg"), ("WEBP", "webp")):
        options = {"JPEG": {"quality": 98}, "WEBP": {"lossless": True}}.get(fmt, {})
        for turn, stored in STORED.items():
            turned = Image.fromarray(np.ascontiguousarray(stored(rgb)))
            yield Case(f"exif-{turn}.{suffix}", encode(turned, fmt, exif=exif(turn), **options), rgb, 6)
    yield Case("exif-broken.jpg", encode(image, "JPEG", quality=98, exif=b"Exif\0\0MM\0*" + b"\xff" * 40), rgb, 6)
    yield Case("exif-9.png", encode(image, "PNG", exif=exif(9)), rgb)

    for suffix, fmt in {"png": "PNG", "jpg": "JPEG", "bmp": "BMP", "pgm": "PPM"}.items():
        yield Case(f"grey.{suffix}", encode(luma, fmt), eight, 6 if fmt == "JPEG" else 0)
    bits = Image.fromarray(level > 0.5)
    for suffix, fmt in {"png": "PNG", "tif": "TIFF", "pbm": "PPM", "bmp": "BMP"}.items():
        yield Case(f"bits.{suffix}", encode(bits, fmt), three((level > 0.5) * 255))
    yield Case("16.png", encode(Image.fromarray(sixteen), "PNG"), eight)
    yield Case("16.tif", encode(Image.fromarray(sixteen), "TIFF"), eight)
    yield Case("16.pgm", encode(Image.fromarray(sixteen), "PPM"), eight)
    yield Case("16.jp2", encode(Image.fromarray(sixteen), "JPEG2000"), eight)
    yield Case("16-white-is-zero.tif", tiff(65535 - sixteen, photometric="miniswhite"), eight)
    yield Case("16-big.tif", tiff(sixteen, byteorder=">"), eight)
    rgb16 = rgb.astype(np.uint16) * 257
    yield Case("16-colour.png", png(WIDTH, HEIGHT, 16, 2, rows_of(rgb16.astype(">u2"))), rgb)
    yield Case("16-colour.tif", tiff(rgb16, photometric="rgb"), rgb)
    yield Case("32-of-16.tif", encode(Image.fromarray(sixteen.astype(np.int32)), "TIFF"), eight)
    yield Case("32-signed.tif", tiff(np.round(level * (2**31 - 1)).astype(np.int32)), eight)
    yield Case("32-unsigned.tif", tiff(np.round(level * (2**32 - 1)).astype(np.uint32)), eight)
    yield Case("32-big.tif", tiff(np.round(level * (2**32 - 1)).astype(np.uint32), byteorder=">"), eight)
    for top, kind in ((1, "unit"), (255, "bytes"), (65535, "words")):
        yield Case(f"float-{kind}.tif", encode(Image.fromarray((level * top).astype(np.float32)), "TIFF"), eight)
        yield Case(f"float-{kind}.npy", npy(level * top), eight)
    yield Case("float-colour.tif", tiff((rgb / 255).astype(np.float32), photometric="rgb"), rgb)
    yield Case("half.npy", npy(level.astype(np.float16)), eight)
    yield Case("8.npy", npy(rgb), rgb)
    yield Case("8-first.npy", npy(rgb.transpose(2, 0, 1)), rgb)
    yield Case("fortran.npy", npy(np.asfortranarray(rgb)), rgb)
    yield Case("16.npy", npy(sixteen), eight)
    yield Case("bool.npy", npy(level > 0.5), three((level > 0.5) * 255))
    yield Case("big-endian.npy", npy(sixteen.astype(">u2")), eight)

    alpha = np.round(grey() * 255).astype(np.uint8)
    weight = alpha[..., None] / 255
    over_white = np.round(rgb * weight + 255 * (1 - weight)).astype(np.uint8)
    rgba = Image.fromarray(np.dstack([rgb, alpha]))
    yield Case("alpha.png", encode(rgba, "PNG"), over_white)
    yield Case("alpha.tif", encode(rgba, "TIFF"), over_white)
    yield Case("alpha.webp", encode(rgba, "WEBP", lossless=True, exact=True), over_white)
    yield Case("alpha.jp2", encode(rgba, "JPEG2000"), over_white)
    grey_alpha = Image.merge("LA", [luma, Image.fromarray(alpha)])
    flat = np.round(eight * weight + 255 * (1 - weight)).astype(np.uint8)
    yield Case("grey-alpha.png", encode(grey_alpha, "PNG"), flat)
    clear = Image.fromarray(np.dstack([rgb, np.zeros_like(alpha)]))
    yield Case("invisible.png", encode(clear, "PNG"), np.full_like(rgb, 255))
    key = chunk(b"tRNS", struct.pack(">HHH", *rgb[0, 0]))
    keyed = rgb.copy()
    keyed[(rgb == rgb[0, 0]).all(-1)] = 255
    yield Case("colour-key.png", png(WIDTH, HEIGHT, 8, 2, rows_of(rgb), key), keyed)

    cmyk = image.convert("CMYK")
    yield Case("cmyk.tif", encode(cmyk, "TIFF"), rgb)
    yield Case("cmyk.jpg", encode(cmyk, "JPEG", quality=98), rgb, 8)
    yield Case("ycbcr.tif", encode(image.convert("YCbCr"), "TIFF"), rgb, 3)
    lab = Image.merge("LAB", [luma, *[Image.new("L", luma.size, 128)] * 2])
    yield Case("lab.tif", encode(lab, "TIFF"), three(np.round(_lightness_to_srgb(eight[..., 0] / 255) * 255)), 3)

    palette = Image.fromarray(np.tile(np.arange(WIDTH, dtype=np.uint8) % 4, (HEIGHT, 1)), "P")
    entries = np.array([[0, 0, 0], [255, 0, 0], [0, 200, 0], [0, 0, 90]], np.uint8)
    palette.putpalette(entries.tobytes())
    shown = np.tile(entries[np.arange(WIDTH) % 4], (HEIGHT, 1, 1))
    for suffix, fmt in {"png": "PNG", "gif": "GIF", "bmp": "BMP", "tif": "TIFF"}.items():
        yield Case(f"palette.{suffix}", encode(palette, fmt), shown)
    shown = shown.copy()
    shown[:, 1::4] = 255
    for suffix, fmt in {"png": "PNG", "gif": "GIF"}.items():
        yield Case(f"palette-clear.{suffix}", encode(palette, fmt, transparency=1), shown)

    for height, width in ((1, 1), (1, 150), (150, 1), (3, 2), (7, 5)):
        for interlaced in (0, 1):
            black = np.zeros((height, width, 3), np.uint8)
            rows = rows_of(black) if not interlaced else _adam7_black(width, height)
            yield Case(
                f"black-{height}x{width}-{interlaced}.png", png(width, height, 8, 2, rows, b"", interlaced), black
            )


def bad() -> Iterator[Case]:
    image = Image.fromarray(colour())
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8))
    encoded = {
        "png": encode(noise, "PNG"),
        "jpg": encode(noise, "JPEG"),
        "webp": encode(noise, "WEBP"),
        "bmp": encode(noise, "BMP"),
        "tif": encode(noise, "TIFF", compression="tiff_lzw"),
        "raw.tif": encode(noise, "TIFF"),
        "gif": encode(noise.convert("P"), "GIF"),
        "ppm": encode(noise, "PPM"),
        "jp2": encode(noise, "JPEG2000"),
        "avif": encode(noise, "AVIF"),
        "npy": npy(np.asarray(noise)),
    }
    for suffix, data in encoded.items():
        yield Case(f"half.{suffix}", data[: len(data) // 2])
        yield Case(f"start.{suffix}", data[:40])
        yield Case(f"rot-in-header.{suffix}", b"\0" * 8 + data[8:])
        yield Case(f"empty.{suffix}", b"")
    whole = encoded["png"]
    place = whole.index(b"IDAT") + 20
    yield Case("wrong-checksum.png", whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    yield Case("no-end.png", whole[:-12])
    yield Case("no-data.png", whole[: whole.index(b"IDAT") - 4] + chunk(b"IEND", b""))
    quarter = rows_of(colour()[: HEIGHT // 4])
    yield Case("missing-rows.png", png(WIDTH, HEIGHT, 8, 2, quarter))
    yield Case("missing-last-rows.png", png(WIDTH, HEIGHT, 8, 2, rows_of(colour()[:-2])))
    yield Case("missing-passes.png", png(WIDTH, HEIGHT, 8, 2, quarter, b"", 1))
    yield Case("no-data.jpg", encoded["jpg"][: encoded["jpg"].index(b"\xff\xda")] + b"\xff\xd9")

    jpeg = encode(image, "JPEG")
    frame = jpeg.index(b"\xff\xc0") + 5
    yield Case("bomb-header.jpg", jpeg[:frame] + struct.pack(">HH", 65500, 65500) + jpeg[frame + 4 :])
    yield Case("bomb-header.png", png(1 << 30, 1 << 30, 8, 2, b"\0" * 99))
    yield Case("bomb-true.png", png(13038, 13038, 1, 0, b"\0" * (13038 * (1 + 1630))))
    yield Case("bomb-text.png", png(4, 4, 8, 2, b"\0" * 52, chunk(b"zTXt", b"a\0\0" + zlib.compress(b"a" * (1 << 27)))))
    yield Case(
        "bomb-profile.png", png(4, 4, 8, 2, b"\0" * 52, chunk(b"iCCP", b"a\0\0" + zlib.compress(b"a" * (1 << 27))))
    )
    yield Case("bomb-aspect.png", encode(Image.new("L", (4096, 1)), "PNG"))
    yield Case("bomb-header.bmp", encoded["bmp"][:18] + struct.pack("<ii", 1 << 30, 1 << 30) + encoded["bmp"][26:])
    yield Case("bomb-header.gif", b"GIF89a" + struct.pack("<HH", 65535, 65535) + encoded["gif"][10:])
    yield Case("bomb-header.ppm", b"P6 99999 99999 255 " + b"\0" * 99)
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999, 99999, 3), }"
    header += b" " * (117 - len(header)) + b"\n"
    yield Case("bomb-header.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + b"\0" * 99)

    level = grey().astype(np.float32)
    level[3, 3] = np.nan
    yield Case("nan.tif", encode(Image.fromarray(level), "TIFF"))
    yield Case("nan.npy", npy(level))
    level[3, 3] = np.inf
    yield Case("infinite.npy", npy(level))
    yield Case("huge-values.npy", npy(grey() * 1e9))
    yield Case("complex.npy", npy(grey() * 1j))
    yield Case("two-channels.npy", npy(np.zeros((8, 9, 2), np.uint8)))
    yield Case("vector.npy", npy(np.zeros(9, np.uint8)))
    yield Case("objects.npy", _object_array())

    impostors = {
        "html": b"<!DOCTYPE html><html>not found</html>",
        "json": json.dumps({"a": 1}).encode(),
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "gzip": gzip.compress(jpeg),
        "tar": b"x.jpg".ljust(257, b"\0") + b"ustar\x0000".ljust(767, b"\0"),
        "pickle": pickle.dumps({"a": 1}),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "pdf": b"%PDF-1.7\n",
        "script": b"#!/bin/sh\nexit 1\n",
        "zeros": b"\0" * 4096,
        "noise": np.random.default_rng(1).bytes(4096),
    }
    for kind, data in impostors.items():
        yield Case(f"impostor-{kind}.jpg", data)


def _object_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}, {}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def _adam7_black(width: int, height: int) -> bytes:
    rows = b""
    for x, y, dx, dy in (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ):
        columns = len(range(x, width, dx))
        rows += len(range(y, height, dy)) * b"\0" * (1 + 3 * columns) if columns else b""
    return rows


def _lightness_to_srgb(level: np.ndarray) -> np.ndarray:
    """CIE L* in 0..1 of a neutral colour as an sRGB value in 0..1."""
    f = (level * 100 + 16) / 116
    linear = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
