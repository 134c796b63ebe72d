"""What a command is going to write, looked at before it works for minutes: a place without room for it is a mistake."""

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from PIL import Image

from mim.errors import UserError


def check_folder(option: str, folder: Path) -> None:
    """Refuses a folder that cannot be made or written; nothing is left behind."""
    missing: list[Path] = []
    try:
        missing += [home for home in (folder, *folder.parents) if not home.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{option} {folder} cannot be written", why=error.strerror, hint=f"{option} another/{folder.name}"
        ) from error
    finally:
        for made in missing:
            with suppress(OSError):  # it was never made
                made.rmdir()


def free_bytes(path: Path) -> int:
    """Room for a file or folder, there already or not."""
    return shutil.disk_usage(next(place for place in (path, *path.absolute().parents) if place.is_dir())).free


def check_file(option: str, file: Path) -> None:
    """Refuses a file that cannot be written; nothing is left behind."""
    if file.is_dir():
        raise UserError(f"{option} {file} is a folder", why="a file goes there", hint=f"{option} {file / file.name}")
    try:
        check_folder(option, file.parent)
    except UserError as error:
        hint = f"{option} another/{file.name}"
        raise UserError(f"{option} {file} cannot be written", why=error.why, hint=hint) from error


def check_picture(option: str, file: Path) -> None:
    """As :func:`check_file`, and its name must end in that of a format for pictures."""
    if Image.registered_extensions().get(file.suffix.lower()) not in Image.SAVE:
        why = f"no picture's name ends in {file.suffix or 'nothing'}"
        raise UserError(f"{option} {file} is no picture", why=why, hint=f"{option} {file.with_suffix('.png')}")
    check_file(option, file)
