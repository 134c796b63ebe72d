"""Which numbers of a mask mean which class, and what numbers tell of masks that are none."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mim.errors import UserError

Colour = tuple[int, int, int]

IGNORE = -1
"""Class of the pixels that are neither learnt nor scored."""

_RGB = r"(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})"
_COLOURED = re.compile(rf"{_RGB}[\s,]+(\S.*)|(\S.*?)[\s,]+{_RGB}")
_CVAT = re.compile(r"(.*?):(\d+),(\d+),(\d+):.*")


def read_classes(file: Path | None) -> tuple[dict[int, str], list[Colour] | None]:
    """Class names by number in the mask and, if the file has them, the classes' colours, the first for 0.

    Args:
        file: a name in each line, the first for 0; lines of a number and a name; ADE20K's ``objectInfo150.txt``; CVAT's
            ``labelmap.txt``; or lines with a colour before or behind the name, as ``128 64 128 road`` or
            ``road,128,64,128``.
    """
    if file is None:
        return {}, None
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--classes {file} cannot be read", why=str(error), hint="a text file, a name per line"
        ) from error
    lines = [_CVAT.sub(r"\1,\2,\3,\4", line) for line in lines if not line.startswith("# ")]
    coloured = [match for line in lines if (match := _COLOURED.fullmatch(line))]
    if coloured and len(coloured) >= len(lines) - 1:  # a table may have a heading
        return _names_and_colours(coloured, file)
    numbered = [re.match(r"(\d+)\s+(?:.*\t)?(.+)", line) for line in lines]
    if any(numbered):  # a heading has no number
        return {int(match[1]): match[2].strip() for match in numbered if match}, None
    return dict(enumerate(lines)), None


def _names_and_colours(lines: Sequence[re.Match[str]], file: Path) -> tuple[dict[int, str], list[Colour]]:
    names, colours = {}, []
    for number, line in enumerate(lines):
        *before, first, last, r, g, b = line.groups()
        red, green, blue = (int(value) for value in (before if first else (r, g, b)))
        names[number] = first or last
        colours.append((red, green, blue))
        if max(colours[-1]) > 255 or colours.index(colours[-1]) < number:
            raise UserError(
                f"--classes {file}: {names[number]} has the colour {red} {green} {blue}",
                why="values go from 0 to 255, and each class has a colour of its own",
                hint="lines such as  128 64 128 road   or   road,128,64,128",
            )
    return names, colours


@dataclass(frozen=True)
class ClassNumbers:
    """What the numbers of a mask mean.

    Args:
        count: classes that are learnt and scored.
        ignore: numbers of pixels that are not.
        zero_is_other: 0 is not scored and classes begin at 1 (``reduce_zero_label``).
        values: number of each class in the mask; consecutive ones unless given.
    """

    count: int
    ignore: tuple[int, ...] = (255,)
    zero_is_other: bool = False
    values: tuple[int, ...] | None = None

    @property
    def scored(self) -> tuple[int, ...]:
        """The number of each class in the mask, in the classes' order."""
        first = int(self.zero_is_other)
        return self.values or tuple(range(first, self.count + first))

    @property
    def unscored(self) -> set[int]:
        """The numbers of pixels that are left out, also if a class has them, unless that class is given by number."""
        return {*self.ignore, *range(int(self.zero_is_other))} - set(self.values or ())

    def __call__(self, mask: Tensor, name: str) -> Tensor:
        """Classes ``(H, W)`` int16 from 0, :data:`IGNORE` where nothing is scored.

        Args:
            mask: ``(H, W)`` whole numbers.
            name: of the mask, for messages.

        Raises:
            UserError: if the mask holds a number that is neither a class nor ignored.
        """
        numbers = mask.long()
        known, order = torch.tensor(self.scored).sort()
        place = torch.searchsorted(known, numbers).clamp(max=len(known) - 1)
        ignored = torch.isin(numbers, torch.tensor(sorted(self.unscored), dtype=torch.int64))
        scored = (known[place] == numbers) & ~ignored
        if not (scored | ignored).all():
            self.check(set(torch.unique(numbers).tolist()), name)
        return torch.where(scored, order[place], IGNORE).to(torch.int16)

    def check(self, numbers: set[int], name: str) -> None:
        """Refuses a mask that holds a number that is neither a class nor ignored."""
        wrong = numbers - set(self.scored) - self.unscored
        if wrong:
            raise self._mistake(numbers, max(wrong), name)

    def _mistake(self, numbers: set[int], wrong: int, name: str) -> UserError:
        found, others = sorted(numbers), comma(sorted({*self.ignore, wrong}))
        if self.values:
            allowed = f"--mask_values names {ranges(sorted(self.values))}"
            more = f"--mask_values {comma((*self.values, wrong))}    or    "
        else:
            allowed = f"--num_classes {self.count} allows {self.scored[0]}..{self.scored[-1]}"
            first = int(self.zero_is_other)
            more = f"--num_classes {wrong + 1 - first}    or    " if 0 < wrong < 255 else ""
        return UserError(
            f"segment: {name} holds value {wrong}, but {allowed}",
            why=f"values found: {ranges(found, sorted(self.unscored))}",
            hint=f"{more}--ignore {others}",
        )


def count_classes(numbers: set[int], ignore: Sequence[int], zero_is_other: bool, data: str) -> int:
    """Classes that the numbers found in all masks stand for; refuses what cannot be class numbers, or has gaps."""
    first = int(zero_is_other)
    scored = sorted(number for number in numbers if number not in ignore and number >= first)
    if black_and_white(numbers, ignore):
        raise _black_and_white(f"--data {data}: the masks hold fewer than two classes")
    if len(scored) < 2:
        raise UserError(
            f"--data {data}: the masks hold fewer than two classes",
            why=f"values found: {ranges(sorted(numbers), ignore)}",
            hint="number the classes 0, 1, 2, ...; 255 is kept for pixels without a class (--ignore)",
        )
    if scored[-1] > 4 * len(scored) + 100:
        raise UserError(
            f"--data {data}: the masks do not hold class numbers",
            why=f"values found: {ranges(sorted(numbers), ignore)}",
            hint=_as_values(scored),
        )
    missing = sorted(set(range(first, scored[-1])) - set(scored))
    if missing:
        raise UserError(
            f"--data {data}: no mask holds value {ranges(missing)}, others go up to {scored[-1]}",
            why=f"values found: {ranges(sorted(numbers), ignore)}",
            hint=_as_values(scored),
        )
    return scored[-1] + 1 - first


def refuse_absent(numbers: ClassNumbers, found: set[int], names: Sequence[str], data: str, masks: int) -> None:
    """Refuses classes that no mask holds: they would be scored as if they could be learnt.

    Args:
        numbers: what the masks should hold.
        found: what all of them hold.
        names: of the classes.
        data: for the message.
        masks: how many there are.
    """
    absent = [place for place, value in enumerate(numbers.scored) if value not in found | numbers.unscored]
    if not absent:
        return
    place = absent[0]
    more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
    what = f"the class {numbers.scored[place]} ({names[place]})"
    error = f"--data {data}: {what} occurs in none of the {masks:,} masks{more}"
    if black_and_white(found, numbers.ignore):
        raise _black_and_white(error)
    present = [value for value in numbers.scored if value in found]
    raise UserError(
        error, why=f"values found: {ranges(sorted(found), sorted(numbers.unscored))}", hint=_as_values(present)
    )


def refuse_smoothed(mask: Tensor, ignore: Sequence[int], name: str) -> None:
    """Refuses a mask whose borders were smoothed: values between two neighbours are classes that nobody drew.

    Values are taken for smoothed if three or more of them occur, all but entirely, on single pixels between a smaller
    and a larger neighbour, and make up less than a fifth of the mask. Smoothing between 0, 1 and 2 is not seen.

    Args:
        mask: ``(H, W)`` whole numbers.
        ignore: numbers that do not count.
        name: of the mask, for messages.
    """
    values = mask.numpy()
    between = np.zeros(values.shape, dtype=bool)
    for before, middle, after, inner in (
        (values[:, :-2], values[:, 1:-1], values[:, 2:], between[:, 1:-1]),
        (values[:-2], values[1:-1], values[2:], between[1:-1]),
    ):
        inner |= ((before < middle) & (middle < after)) | ((before > middle) & (middle > after))
    candidates, counts = np.unique(values[between], return_counts=True)
    everywhere = dict(zip(*(part.tolist() for part in np.unique(values, return_counts=True)), strict=True))
    smoothed = [
        value
        for value, count in zip(candidates.tolist(), counts.tolist(), strict=True)
        if value not in ignore and count >= 0.8 * everywhere[value]
    ]
    share = sum(everywhere[value] for value in smoothed) / max(1, values.size)
    if len(smoothed) >= 3 and share < 0.2:
        raise UserError(
            f"{name} has smoothed borders: {len(smoothed)} values lie between those of their neighbours",
            why=f"{ranges(smoothed)} on {share:.1%} of the pixels, only along borders: no class numbers",
            hint="draw masks without antialiasing, and resize them without interpolation (nearest)",
        )


def black_and_white(numbers: set[int], ignore: Sequence[int]) -> bool:
    """Whether masks hold nothing but 0 and 255, of which 255 would be ignored."""
    return numbers == {0, 255} and 255 in ignore


def _black_and_white(error: str) -> UserError:
    why = "0 and 255 look like background and object, but 255 is ignored"
    return UserError(error, why=why, hint="--num_classes 2 --mask_values 0,255")


def _as_values(scored: Sequence[int]) -> str:
    if not 2 <= len(scored) <= 64:
        return "number the classes 0, 1, 2, ...; 255 is kept for pixels without a class (--ignore)"
    return f"--mask_values {comma(scored)} --num_classes {len(scored)}   if each of them is a class"


def comma(numbers: Sequence[int]) -> str:
    """``0,128,255``, as options take it."""
    return ",".join(map(str, numbers))


def ranges(numbers: Sequence[int], ignored: Sequence[int] = ()) -> str:
    """``0-12, 255 (ignored)``."""
    texts: list[str] = []
    kept = [number for number in numbers if number not in ignored]
    start = 0
    for place, number in enumerate(kept):
        if place + 1 == len(kept) or kept[place + 1] != number + 1:
            texts.append(str(number) if kept[start] == number else f"{kept[start]}-{number}")
            start = place + 1
    if len(texts) > 8:
        texts = [*texts[:7], "...", texts[-1]]
    return ", ".join([*texts, *(f"{number} (ignored)" for number in numbers if number in ignored)])
