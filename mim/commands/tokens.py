"""Images as tokens: ``python tools/tokens.py fit --data photos``, then ``encode``."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mim.distributed.processes import process_rank
from mim.errors import UserError
from mim.options.outputs import check_file, check_folder
from mim.options.ranges import Count, Positive, Processes, Seed
from mim.program import called

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor

    from mim.data.pretrain import PretrainData
    from mim.data.sources import Source
    from mim.tokenizers import Tokenizer


def run(
    what: Literal["fit", "encode", "convert"],
    data: str = "builtin",
    out: Path | None = None,
    tokenizer: str = "builtin",
    kind: Literal["patches", "convolutional"] = "patches",
    codes: Count = 512,
    stride: Count = 8,
    img_size: Count = 224,
    steps: Count = 2000,
    batch_size: Count = 64,
    lr: Positive = 1e-3,
    seed: Seed = 0,
    num_workers: Processes | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Fit a tokenizer to 8-bit RGB images, write images as its tokens, or take over the weights of a VQGAN.

    Args:
        what: fit writes a tokenizer, encode a folder of tokens that any --data takes, convert a tokenizer out of
            public weights.
        data: images, as for pretraining; encode keeps labels, and what the data sets apart.
        out: file of the tokenizer, or folder of the tokens; tokenizer.safetensors or tokens unless given.
        tokenizer: file that fit has written, weights of a VQGAN, or builtin, for encode and convert.
        kind: patches are k-means on pixels, convolutional an autoencoder, for fit.
        codes: size of the codebook, for fit; up to 256 a token is one byte.
        stride: pixels per token and side, for fit.
        img_size: pixels per side of an image; encode takes its middle.
        steps: of fitting.
        batch_size: images at once.
        lr: learning rate of the autoencoder.
        seed: of crops, weights and codes.
        num_workers: loader processes; one per core unless given.
        device: where to compute; auto takes a GPU if there is one.
    """
    out = out or Path("tokens" if what == "encode" else "tokenizer.safetensors")
    if what != "encode":
        check_file("--out", out)
    if what == "fit":
        _check_stride(kind, stride, img_size)
    elif what == "convert":
        _convert(tokenizer, out)
        return
    else:
        _check_empty(out)
    import torch

    from mim.data.loading import loader_processes
    from mim.data.pretrain import PretrainData
    from mim.run.folder import quieten
    from mim.tokenizers.files import build_tokenizer
    from mim.transfer.features import chosen_device

    quieten(process_rank())
    torch.manual_seed(seed)
    made = build_tokenizer(kind, codes, stride) if what == "fit" else _opened(tokenizer)
    if img_size % made.stride:
        near = max(1, round(img_size / made.stride)) * made.stride
        raise UserError(
            f"--img_size {img_size} does not divide into tokens of {made.stride} px", hint=f"--img_size {near}"
        )
    opened = PretrainData(data, batch_size=batch_size, num_workers=loader_processes(num_workers))
    opened.open((img_size, img_size), 3, seed)
    opened.check()
    if not opened.plain:
        raise UserError(f"--data {data}: tokens are made of RGB images of 8 bit", why=opened.describe_values())
    print(f"  data      {data}: {len(opened.source):,} images, {img_size} px", flush=True)
    made = made.to(chosen_device(device))
    if what == "fit":
        _fit(made, opened, steps, lr, seed)
        out.parent.mkdir(parents=True, exist_ok=True)
        from mim.tokenizers import save_tokenizer

        save_tokenizer(made, out)
        print(f"  tokenizer {out}\n  next      {called('tokens')} encode --data {data} --tokenizer {out}")
    else:
        _encode(made, opened, out)


def _check_stride(kind: str, stride: int, img_size: int) -> None:
    """Refuses what convolutions cannot reach, before anything heavy is imported."""
    if kind == "convolutional" and (stride < 2 or stride & (stride - 1)):
        near = max(2, 1 << (stride.bit_length() - 1))
        why = "each of its convolutions halves the image"
        raise UserError(f"--stride {stride} is no power of 2", why=why, hint=f"--stride {near}   or   --kind patches")
    if stride > img_size:
        raise UserError(f"--stride {stride} is more than --img_size {img_size}", hint=f"--img_size {stride}")


def _opened(name: str) -> "Tokenizer":
    """The tokenizer of a file, ours or a VQGAN's weights."""
    from mim.interop.reading import load_weights
    from mim.tokenizers import VQGANTokenizer, load_tokenizer
    from mim.tokenizers.files import is_tokenizer

    if is_tokenizer(name) or not Path(name).is_file():
        return load_tokenizer(name)
    return VQGANTokenizer.from_weights(load_weights(Path(name), option="--tokenizer"), f"--tokenizer {name}")


def _convert(name: str, out: Path) -> None:
    """Writes what ``name`` holds in the form that methods take."""
    from mim.tokenizers import save_tokenizer

    made = _opened(name)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_tokenizer(made, out)
    print(f"  tokenizer {out}: {made.codes:,} codes, {made.stride} px per token and side")


def _check_empty(out: Path) -> None:
    check_folder("--out", out)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out}: the folder is not empty", hint=f"--out {out}-2   or delete it first")


def _fit(tokenizer: "Tokenizer", data: "PretrainData", steps: int, lr: float, seed: int) -> None:
    """Fits, and tells how good it is on images that it has not seen, if there are any."""
    import torch

    from mim.tokenizers.fitting import fit, reconstruction

    device, started, every = tokenizer.codebook.codes.device, time.monotonic(), max(1, steps // 10)
    for step, loss in fit(tokenizer, _crops(data, steps, device), steps, lr, seed):
        if step % every == 0:
            print(
                f"  step {step:>6,} of {steps:,}  loss {float(loss):.4f}  {time.monotonic() - started:.0f} s",
                flush=True,
            )
    held = data.evaluation or data.source
    chosen = [place * len(held) // 256 for place in range(min(256, len(held)))]
    images = torch.cat([_unscaled(batch, data, device) for batch, _ in data.center_batches(held, chosen)])
    ratio, used = reconstruction(tokenizer.eval(), images)
    of = "held-out images" if data.evaluation else "images"
    print(f"  quality   {ratio:.1f} dB on {len(images)} {of}, {used} of {tokenizer.codes} codes in use there")


def _crops(data: "PretrainData", steps: int, device: "torch.device") -> "Iterator[Tensor]":
    """Random crops ``(B, 3, H, W)`` in 0..1."""
    from mim.data.crops import Crops, collate
    from mim.data.loading import EndlessLoader

    loader = EndlessLoader(
        Crops(data.source, data.views, data.seed),
        batch_sampler=data.sampler(range(steps)),
        num_workers=data.num_workers,
        collate_fn=collate,
    )
    for views, *_ in loader:
        yield views[0].to(device).float() / 255


def _encode(tokenizer: "Tokenizer", data: "PretrainData", out: Path) -> None:
    """Writes one folder, or one for each part, and prints what an image costs."""
    parts: dict[str, Source] = (
        {"": data.source} if data.evaluation is None else {"train": data.source, "val": data.evaluation}
    )
    for part, source in parts.items():
        written, size = _encode_part(tokenizer, data, source, out / part)
        skipped = f", {len(source) - written:,} unreadable ones skipped" if written < len(source) else ""
        print(f"  {part or 'tokens':<9} {written:,} images, {size:,} bytes each{_files(source)}{skipped}", flush=True)
    print(f"  tokens    {out}\n  next      {called('pretrain')} --data {out}")


def _encode_part(tokenizer: "Tokenizer", data: "PretrainData", source: "Source", folder: Path) -> tuple[int, int]:
    """Number of images, and bytes of one of them."""
    import numpy as np

    from mim.data.tokens import write_shard

    device, found = tokenizer.codebook.codes.device, []
    for images, labels in data.center_batches(source, range(len(source))):
        found.append((tokenizer.encode(_unscaled(images, data, device)).cpu().numpy(), labels.numpy()))
    if not found:
        raise UserError(f"--data {data.path}: none of {len(source):,} images can be read")
    ids, classes = (np.concatenate(parts) for parts in zip(*found, strict=True))
    size = write_shard(folder, ids, classes.tolist() if source.labels else None, source.classes, tokenizer)
    return len(ids), size


def _files(source: "Source") -> str:
    """What the files take, where there are any, measured on 256 of them."""
    from mim.data.sources import FileSource

    if not isinstance(source, FileSource):
        return ""
    count = min(256, len(source))
    files = [source.encoded(place * len(source) // count) for place in range(count)]
    sizes = [len(file) if isinstance(file, bytes) else file.stat().st_size for file in files]
    return f", their files {sum(sizes) / count:,.0f}"


def _unscaled(images: "Tensor", data: "PretrainData", device: "torch.device") -> "Tensor":
    """Normalised ``(B, 3, H, W)`` back to 0..1."""
    views = data.views
    return (images * views.std[:, None, None] + views.mean[:, None, None]).clamp(0, 1).to(device)
