"""Read the pictures of the page's own folder, and write examples into it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stethoscope import testbed
from stethoscope.app.sessions import NO_PICTURE
from stethoscope.core.errors import ConfigError, DataError
from stethoscope.core.images import file_format
from stethoscope.core.types import ImageRef

if TYPE_CHECKING:
    from PIL.Image import Image

BROWSER_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


def read_picture(path: str | Path | None) -> Image:
    """Read an uploaded picture, upright as a viewer would show it.

    Raises:
        ConfigError: no picture was uploaded.
        DataError: the file is no picture, is too large, or has been deleted.
    """
    if path is None:
        raise ConfigError("there is no picture yet: upload one, or choose an example")
    file = Path(path)
    if not file.is_file():
        raise DataError(NO_PICTURE)
    try:
        return ImageRef(file.name, file).load()
    except DataError as error:  # without the server's path of the file
        raise DataError(str(error).replace(str(file), repr(file.name))) from None


def displayable(file: Path) -> Path:
    """Return a file of the picture that every browser shows.

    That is the file itself, or a PNG of the same pixels beside it.

    Raises:
        DataError: the file is no picture, is too large, or has been deleted.
    """
    picture = read_picture(file)
    if file_format(file) in BROWSER_FORMATS:
        return file
    copy = file.with_suffix(".png") if file.suffix.lower() != ".png" else file.with_name(f"{file.stem}-shown.png")
    picture.save(copy)
    return copy


@dataclass(frozen=True)
class ExamplePicture:
    """A rendered scene to choose from.

    Attributes:
        file: its picture, in the app's own folder.
        name: to be read out where the picture is not seen.
        objects: names of what it shows.
    """

    file: Path
    name: str
    objects: tuple[str, ...]


def write_examples(folder: Path, seed: int, count: int = 6) -> list[ExamplePicture]:
    """Write rendered scenes of the testbed as image files.

    Args:
        folder: to write to.
        seed: index of the first scene.
        count: number of scenes.

    Returns:
        One example for every scene.
    """
    examples = []
    for scene in testbed.scenes(int(seed) + count)[int(seed) :]:
        file = folder / f"{scene.id}.png"
        ImageRef(scene.id, scene.image).load().save(file)
        examples.append(ExamplePicture(file, f"rendered scene {scene.id}, {scene.setting}", scene.visible))
    return examples
