"""Which members of tar files are images, and which belong to them: masks, labels, duplicates and waste."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from mim.data.folders import file_type, is_image, mask_folders_of, suffix_of, without_masks
from mim.data.layouts import is_junk
from mim.data.shards import Member, read_label

_LOSSY = ("jpg", "jpeg", "jpe", "jfif", "webp")  # of two plain images with one key, the photo: the other is a mask


class Samples(NamedTuple):
    """What tar files hold.

    Args:
        images: one plain image per key, in their order.
        labels: class of an image by its path.
        ignored: other members counted by type.
        several: a member that holds several labels, for which there are none; empty if there is no such.
    """

    images: list[Member]
    labels: dict[str, str]
    ignored: Counter[str]
    several: str


def sort_members(members: Iterable[Member], content: Callable[[Member], bytes]) -> Samples:
    """Tells images from what belongs to them.

    Args:
        members: of all shards, in order.
        content: reads a small one.
    """
    ignored: Counter[str] = Counter()
    images: dict[str, Member] = {}
    labels: dict[str, str] = {}
    several = ""
    for member in members:
        folders, _, name = member.name.rpartition("/")
        if not member.ordinary:
            ignored["link or device"] += 1
        elif any(map(is_junk, folders.split("/"))) and folders.strip("./"):
            ignored["hidden or waste folder"] += 1
        elif is_image(name):
            ignored["older member of the same name"] += member.path in images
            images.pop(member.path, None)  # tar keeps the last
            images[member.path] = member
        elif suffix_of(name) in ("cls", "json") and not name.startswith("._"):
            label = read_label(member, content)
            several = several or ("" if isinstance(label, str) else member.path)
            if isinstance(label, str) and label:
                labels[member.stem] = label
        else:
            ignored[file_type(name)] += 1
    plain = _plain(list(images.values()), ignored)
    kept = without_masks([image.name for image in plain], ignored, mask_folders_of([image.name for image in plain]))
    plain = [image for image in plain if image.name in set(kept)] if len(kept) < len(plain) else plain
    found = {} if several else _labelled(plain, labels)
    return Samples(plain, found, +ignored, several)


def _plain(images: list[Member], ignored: Counter[str]) -> list[Member]:
    """One image per key: ``k.jpg`` and not ``k.seg.png`` or ``k.png`` beside it; ``k.2.jpg`` is a key of its own."""
    stems: dict[str, Member] = {}
    for image in images:
        if image.stem not in stems or suffix_of(image.name) in _LOSSY:
            stems[image.stem] = image
    kept = [image for image in images if stems[image.stem] is image and not _belongs(image, stems)]
    if len(kept) < len(images):
        ignored["more images of the same key, such as masks"] += len(images) - len(kept)
    return kept


def _belongs(image: Member, stems: dict[str, Member]) -> bool:
    """Whether an image is called after another one with a word behind it: ``k.seg`` beside ``k``."""
    owner, dot, word = image.stem.rpartition(".")
    return bool(dot) and "/" not in word and not word.isdecimal() and owner in stems


def _labelled(images: list[Member], labels: dict[str, str]) -> dict[str, str]:
    """The label of each image by path: of the same whole stem, or of the same key if only one image has it."""
    keys = Counter(image.key for image in images)
    found = {}
    for image in images:
        label = labels.get(image.stem) or (labels.get(image.key) if keys[image.key] == 1 else None)
        if label:
            found[image.path] = label
    return found
