"""Images as sequences of patches: pure functions over tensors.

A patch is a rectangle of pixels; patches are numbered row by row, and prefix tokens are never counted.
"""

import torch
from torch import Tensor


def patch_grid(images: Tensor, patch_size: int | tuple[int, int]) -> tuple[int, int]:
    """Patches per side ``(h, w)`` of images ``(B, C, H, W)``.

    Raises:
        ValueError: if the image is not divisible into patches.
    """
    (height, width), (patch_height, patch_width) = images.shape[2:], _pair(patch_size)
    if height % patch_height or width % patch_width:
        patch = f"{patch_height} x {patch_width}"
        raise ValueError(f"{height} x {width} pixels do not divide into patches of {patch}; resize or crop first")
    return height // patch_height, width // patch_width


def patchify(images: Tensor, patch_size: int | tuple[int, int], indices: Tensor | None = None) -> Tensor:
    """Cut images into patches, or copy out only those that ``indices`` names.

    Args:
        images: ``(B, C, H, W)``.
        patch_size: patch side in pixels, or ``(height, width)``.
        indices: ``(B, K)`` patches wanted per image; all if not given.

    Returns:
        ``(B, N, p*p*C)``, or ``(B, K, p*p*C)`` in the order of ``indices``; pixels in the order (row, column, channel),
        the channel running fastest.

    Raises:
        ValueError: if the image is not divisible into patches.
    """
    (height, width), (rows, columns) = _pair(patch_size), patch_grid(images, patch_size)
    cut = images.view(*images.shape[:2], rows, height, columns, width).permute(0, 2, 4, 3, 5, 1)  # (B, h, w, p, p, C)
    if indices is None:
        return cut.flatten(3).flatten(1, 2)
    batch = torch.arange(len(images), device=images.device)[:, None]
    return cut[batch, indices // columns, indices % columns].flatten(2)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int | tuple[int, int], channels: int = 3) -> Tensor:
    """The inverse of :func:`patchify`: ``(B, N, p*p*C)`` with ``N = h*w`` to ``(B, C, H, W)``."""
    height, width = _pair(patch_size)
    cut = patches.view(-1, *grid, height, width, channels)  # (B, h, w, p, p, C)
    return cut.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def replace_patches(
    images: Tensor, patch_size: int | tuple[int, int], indices: Tensor, patches: Tensor | float
) -> Tensor:
    """A copy of ``images (B, C, H, W)`` with other pixels in some patches.

    Args:
        images: ``(B, C, H, W)``.
        patch_size: patch side in pixels, or ``(height, width)``.
        indices: ``(B, M)`` patches to replace per image.
        patches: ``(B, M, p*p*C)`` in the order of ``indices``, or one value for all their pixels.
    """
    whole = patchify(images, patch_size)  # (B, N, p*p*C)
    places = indices[..., None].expand(-1, -1, whole.shape[2])
    new = torch.as_tensor(patches, dtype=whole.dtype, device=whole.device).expand(places.shape)
    return unpatchify(whole.scatter(1, places, new), patch_grid(images, patch_size), patch_size, images.shape[1])


def patch_statistics(patches: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every patch over all its values, each ``(B, N, 1)`` for ``(B, N, p*p*C)``.

    With ``weights`` of the same shape, only over values whose weight is 1.
    """
    # Unbiased variance and eps inside the root as in the MAE reference; the biased one shifts the loss by 0.1 %.
    if weights is None:
        var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    else:
        count = weights.sum(dim=-1, keepdim=True)
        mean = (patches * weights).sum(dim=-1, keepdim=True) / count.clamp(min=1)
        var = ((patches - mean).square() * weights).sum(dim=-1, keepdim=True) / (count - 1).clamp(min=1)
    return mean, (var + 1e-6).sqrt()


def measured_patches(valid: Tensor, patch_size: int | tuple[int, int]) -> Tensor:
    """``(B, N)`` bool for ``valid (B, 1, H, W)``: False for a patch that is nodata for more than half."""
    return patchify(valid.float(), patch_size).mean(dim=-1) >= 0.5


def measured_values(
    valid: Tensor, patch_size: int | tuple[int, int], channels: int, indices: Tensor | None = None
) -> Tensor:
    """Which values of patches were measured: none of a patch that is nodata for more than half.

    Args:
        valid: ``(B, 1, H, W)`` bool, True where a pixel was measured.
        patch_size: patch side in pixels, or ``(height, width)``.
        channels: of the images.
        indices: ``(B, K)`` patches wanted per image; all if not given.

    Returns:
        ``(B, N, p*p*C)`` or ``(B, K, p*p*C)``, 1 for a measured value and 0 for another.
    """
    pixels = patchify(valid.float(), patch_size, indices)  # (B, K, p*p)
    pixels = pixels * (pixels.mean(dim=-1, keepdim=True) >= 0.5)
    return pixels.repeat_interleave(channels, dim=-1)


def pixel_targets(
    images: Tensor, patch_size: int | tuple[int, int], indices: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Standardised pixels of patches, the regression target of MAE (arXiv:2111.06377, sec. 3).

    Args:
        images: ``(B, C, H, W)``, any scale.
        patch_size: patch side in pixels, or ``(height, width)``.
        indices: ``(B, K)`` patches wanted per image; all if not given.
        weights: of the same shape as the result, see :func:`measured_values`; all values count if not given.

    Returns:
        ``(B, N, p*p*C)`` or ``(B, K, p*p*C)`` with zero mean and unit variance inside each patch.
    """
    patches = patchify(images, patch_size, indices)
    mean, std = patch_statistics(patches, weights)
    return (patches - mean) / std


def by_channel(patches: Tensor, channels: int) -> Tensor:
    """Pixels of patches sorted by channel: ``(B, N, p*p*C)`` to ``(B, N, C, p*p)``."""
    return patches.reshape(*patches.shape[:-1], -1, channels).transpose(-1, -2)


def from_channels(patches: Tensor) -> Tensor:
    """The inverse of :func:`by_channel`."""
    return patches.transpose(-1, -2).flatten(-2)


def visible_indices(mask: Tensor, count: int | None = None) -> Tensor:
    """Where the visible patches are, in raster order.

    Pass ``~mask`` for the hidden ones.

    Args:
        mask: ``(B, N)`` bool, True = hidden; every row hides equally many.
        count: visible patches per image. Without it the number is read from the mask, for which a GPU is waited for.

    Returns:
        ``(B, K)`` int64.

    Raises:
        ValueError: if rows hide different numbers of patches; looked at on the CPU only, where looking is free.
    """
    if _is_read(mask) and len(hidden := set(mask.sum(1).tolist())) > 1:
        raise ValueError(
            f"rows of the mask hide from {min(hidden)} to {max(hidden)} patches; all must hide equally many"
        )
    if count is None:
        count = mask.shape[1] - int(mask[0].sum())
    # A stable sort of False before True keeps raster order and, unlike nonzero, has a shape known in advance.
    return mask.byte().argsort(dim=1, stable=True)[:, :count]


def some_of(places: Tensor, count: int, numbers: Tensor) -> Tensor:
    """``count`` of ``places (B, M)``, those with the smallest ``numbers (B, M)``, in their order: ``(B, count)``."""
    return places.gather(1, numbers.argsort(dim=1)[:, :count].sort(dim=1).values)


def gather_tokens(tokens: Tensor, indices: Tensor) -> Tensor:
    """Chosen tokens of every image: ``(B, N, D)`` at ``(B, K)`` to ``(B, K, D)``."""
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[2]))


def hidden_places(mask: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Image, patch and weight of every hidden patch; weights are 1 / (hidden patches of the same image).

    Args:
        mask: ``(B, N)`` bool. On the CPU its hidden patches are counted; anywhere else that would make the CPU wait,
            and cut a compiled graph in two: every image gets ``most`` places, those not hidden with weight 0.
        most: no image hides more.

    Returns:
        ``(M,)`` each.
    """
    if _is_read(mask):
        image, patch = mask.nonzero(as_tuple=True)
        return image, patch, 1 / mask.sum(dim=1)[image]
    return padded_places(mask, most)


def measured_weights(weight: Tensor, image: Tensor, measured: Tensor, images: int) -> Tensor:
    """``weight (M,)`` of hidden places, 0 where the patch is mostly nodata; those of an image sum to 1 again, or to 0.

    Args:
        weight: as :func:`hidden_places` gives it.
        image: ``(M,)``.
        measured: ``(M,)`` bool.
        images: how many there are.
    """
    kept = weight * measured
    total = kept.new_zeros(images).index_add(0, image, kept)
    return kept / total[image].clamp(min=1e-6)


def measured_mean(patches: Tensor, measured: Tensor) -> Tensor:
    """Mean ``(D,)`` of ``(..., D)`` over the places where ``measured (...)`` is True."""
    return (patches * measured[..., None]).sum(dim=tuple(range(measured.dim()))) / measured.sum().clamp(min=1)


def feature_spread(features: Tensor) -> Tensor:
    """Deviation over all patches ``(..., D)``, mean over dimensions, a scalar: 0 where all patches are told alike."""
    return features.flatten(0, -2).std(dim=0, correction=0).mean()


def padded_places(mask: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`hidden_places`, with ``most`` places for every image, ``M = B * most``, whatever it hides."""
    places = mask.byte().argsort(dim=1, descending=True, stable=True)[:, :most]  # (B, most)
    image = torch.arange(len(mask), device=mask.device)[:, None].expand_as(places)
    weight = mask.gather(1, places) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return image.flatten(), places.flatten(), weight.flatten()


def _pair(patch_size: int | tuple[int, int]) -> tuple[int, int]:
    return (patch_size, patch_size) if isinstance(patch_size, int) else patch_size


def _is_read(mask: Tensor) -> bool:
    """Whether the values of a mask may decide what is computed: no device is waited for, and no graph ends there."""
    return mask.device.type == "cpu" and not torch.compiler.is_compiling()
