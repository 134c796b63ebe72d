"""Token shards: a set of images as one array of ids, with the tokenizer that draws the images again.

A folder holds ``tokens.json`` (what there is), ``ids.npy`` ``(images, h, w)`` in as few bytes as the codebook needs,
``labels.npy`` if there are labels, and ``tokenizer.safetensors``. A set that sets images apart has two such folders,
``train`` and ``val``.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mim.errors import UserError
from mim.program import called, quoted
from mim.tokenizers import Tokenizer, load_tokenizer, save_tokenizer

FACTS, IDS, LABELS, TOKENIZER = "tokens.json", "ids.npy", "labels.npy", "tokenizer.safetensors"


class TokenShard(NamedTuple):
    """One folder of tokens, open.

    Attributes:
        ids: ``(images, h, w)`` on the disk, read where it is asked for.
        labels: class of each image; None without labels.
        classes: names by label.
        tokenizer: frozen.
    """

    ids: NDArray[np.unsignedinteger]
    labels: list[int] | None
    classes: list[str]
    tokenizer: Tokenizer

    def tokens(self, index: int) -> Tensor:
        """Ids ``(h, w)`` int64 of an image."""
        return torch.from_numpy(self.ids[index].astype(np.int64))

    def picture(self, index: int) -> Tensor:
        """The image ``(3, H, W)`` uint8 that its ids stand for."""
        image: Tensor = self.tokenizer.decode(self.tokens(index)[None])[0].mul(255).round().byte()
        return image


def read_shard(folder: Path) -> TokenShard:
    """Opens a folder of tokens.

    Raises:
        UserError: for a folder that does not hold what it says.
    """
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        ids = np.load(folder / IDS, mmap_mode="r", allow_pickle=False)
        labels = np.load(folder / LABELS, allow_pickle=False).tolist() if facts["classes"] else None
        whole = list(ids.shape) == [facts["images"], *facts["grid"]] and ids.dtype.kind == "u"
        classes = [str(name) for name in facts["classes"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, str(error)) from error
    try:
        tokenizer = load_tokenizer(str(folder / TOKENIZER))
    except UserError as error:
        raise _damaged(folder, f"{TOKENIZER} is not there, or no tokenizer") from error
    if not whole or (labels is not None and not _fit(labels, len(ids), len(classes))):
        raise _damaged(folder, f"{IDS} or {LABELS} is not what {FACTS} says")
    if len(ids) and int(max(part.max() for part in np.array_split(ids, -(-len(ids) // 65536)))) >= tokenizer.codes:
        raise _damaged(folder, f"an id is beyond the {tokenizer.codes} codes of its tokenizer")
    return TokenShard(ids, labels, classes, tokenizer)


def write_shard(
    folder: Path, ids: NDArray[np.int64], labels: Sequence[int] | None, classes: Sequence[str], tokenizer: Tokenizer
) -> int:
    """Writes a folder of tokens; the index comes last, so that a folder without one is unfinished.

    Args:
        folder: made if need be.
        ids: ``(images, h, w)``.
        labels: class of each image, if there are classes.
        classes: names by label.
        tokenizer: that made the ids.

    Returns:
        Bytes of an image's tokens.
    """
    if ids.size and ids.min() < 0:
        raise ValueError("tokens that are not finite have no id to be written")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FACTS).unlink(missing_ok=True)
    kept = ids.astype(np.uint8 if tokenizer.codes <= 256 else np.uint16 if tokenizer.codes <= 65536 else np.uint32)
    np.save(folder / IDS, kept)
    if labels is not None:
        np.save(folder / LABELS, np.asarray(labels, np.int32))
    save_tokenizer(tokenizer, folder / TOKENIZER)
    facts = {"images": len(kept), "grid": list(kept.shape[1:]), "classes": list(classes) if labels is not None else []}
    facts |= {"codes": tokenizer.codes, "stride": tokenizer.stride}
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return kept[0].nbytes if len(kept) else 0


def _fit(labels: list[int], images: int, classes: int) -> bool:
    return len(labels) == images and all(0 <= label < classes for label in labels)


def _damaged(folder: Path, why: str) -> UserError:
    return UserError(
        f"--data {folder} holds damaged tokens",
        why=why,
        hint=f"{called('tokens')} encode --data IMAGES --out {quoted(f'{folder}-2')}",
    )
