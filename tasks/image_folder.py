"""List folders of images and resolve the paths that annotations name, none of which may leave the folder."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from stethoscope.core.errors import DataError
from stethoscope.core.images import SUFFIXES, is_image_file
from stethoscope.core.json_rows import shown
from stethoscope.core.types import ImageRef

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


class Bounds:
    """The boundary of a folder: which paths stay inside it when links are followed.

    A folder of the Hugging Face cache holds links to the files of its repository, which count as inside.

    Attributes:
        root: the folder itself, links resolved.
    """

    def __init__(self, path: Path) -> None:
        """Resolve the folder; nothing of it is read."""
        self.root = Path(os.path.realpath(path))
        self._roots = [self.root]
        if "snapshots" in self.root.parts:
            snapshots = len(self.root.parts) - 1 - self.root.parts[::-1].index("snapshots")
            self._roots.append(Path(*self.root.parts[:snapshots], "blobs"))
        self._known: dict[str, bool] = {}

    def holds(self, name: str) -> bool:
        """Tell whether a path in the folder still lies inside when links are followed."""
        if name not in self._known:
            real = Path(os.path.realpath(self.root / name))
            self._known[name] = any(real.is_relative_to(root) for root in self._roots)
        return self._known[name]


class ImageFolder:
    """A folder of images, listed once so that missing files are found before anything runs.

    Annotations name its pictures by paths inside it. Absolute paths count if they lie inside; ``..``, links that lead
    out and addresses are refused: a data file decides neither what is read beside it nor what is fetched.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path, may_be_empty: bool = False) -> None:
        """List the folder.

        Args:
            path: of the folder.
            may_be_empty: accept a folder without images, as when it is not yet known whether images are needed.

        Raises:
            DataError: it does not exist, is no folder or holds no image.
        """
        self.path = path
        try:
            entries = list(os.scandir(path))
        except FileNotFoundError:
            raise DataError(f"image folder {path} does not exist") from None
        except OSError as error:
            raise DataError(f"image folder {path} cannot be read: {error.strerror}") from None
        self._bounds = Bounds(path)
        self._links = frozenset(entry.name for entry in entries if entry.is_symlink())
        self._folders = frozenset(entry.name for entry in entries if entry.is_dir())
        self._files = frozenset(entry.name for entry in entries) - self._folders
        if not may_be_empty and not self._folders and not any(self._is_image(name) for name in self._files):
            raise DataError(f"image folder {path} holds no image (looked for {', '.join(SUFFIXES)}, and inside files)")

    def find(self, name: str, origin: str) -> ImageRef:
        """Find the image of that name, which may be a path inside the folder.

        Args:
            name: file name as an annotation gives it.
            origin: file and line of that annotation, for messages.

        Raises:
            DataError: there is no such file, or the name leads out of the folder or is an address.
        """
        if _ADDRESS.match(name):
            raise DataError(
                f"{origin}: image {shown(name)} is an address; pictures are read inside {self.path}, nothing is fetched"
            )
        if "\\" in name and not self._holds(name):  # written on Windows
            name = name if _DRIVE.match(name) else name.replace("\\", "/")
        inside = self._relative(name)
        if inside is None:
            raise DataError(f"{origin}: image {shown(name)} leads out of {self.path}; it should be inside it")
        if inside not in self._files and not self._holds(inside):
            raise DataError(f"{origin}: image {shown(name)} is not in {self.path}")
        parent, _, file = inside.rpartition("/")
        link = file in self._links if not parent else (self.path / inside).is_symlink()
        if not self._bounds.holds(inside if link else parent):
            raise DataError(
                f"{origin}: image {shown(name)} is a link that leads out of {self.path}; copy the file, "
                "or name the folder in which it really is"
            )
        return ImageRef(inside, self.path / inside)

    def find_first(self, names: Sequence[str], origin: str) -> ImageRef:
        """Find the first of several names that there is; arguments and errors as of ``find``."""
        present = (name for name in names[:-1] if self._holds(name))
        return self.find(next(present, names[-1]), origin)

    def _relative(self, name: str) -> str | None:
        """Return a path relative to the folder, by its spelling alone; None for one that leads out."""
        path = PurePosixPath(name)
        if ".." in path.parts or _DRIVE.match(name):
            return None
        if not path.is_absolute():
            return name
        for root in (self._bounds.root, self.path.absolute()):
            if path.is_relative_to(root.as_posix()):
                return path.relative_to(root.as_posix()).as_posix()
        return None

    def _holds(self, name: str) -> bool:
        try:
            return (self.path / name).is_file()
        except (OSError, ValueError):  # a name that no file can have: too long, or with a zero byte
            return False

    def _is_image(self, name: str) -> bool:
        """Tell whether a file counts as a picture; hidden ones, as macOS leaves beside every file, do not."""
        return not PurePosixPath(name).name.startswith(".") and is_image_file(self.path / name)

    def names(self) -> list[str]:
        """Return the sorted names of the images that lie directly in the folder; hidden files do not count."""
        return sorted(filter(self._is_image, self._files))

    def walk(self) -> list[str]:
        """Return the sorted paths of all images in the folder and its folders, without hidden files and folders.

        Warns of other files, which are left out, with their number and endings.
        """
        images: list[str] = []
        left_out: Counter[str] = Counter()
        for parent, folders, files in os.walk(self.path):
            linked = {name for name in folders if os.path.islink(os.path.join(parent, name))}
            left_out["linked folders"] += len(linked)
            folders[:] = [name for name in folders if name not in linked and not name.startswith(".")]
            for name in (name for name in files if not name.startswith(".")):
                path = Path(parent, name)
                if is_image_file(path):
                    images.append(path.relative_to(self.path).as_posix())
                else:
                    left_out[path.suffix.lower() or "without ending"] += 1
        if +left_out:
            listed = ", ".join(f"{count} {kind}" for kind, count in (+left_out).most_common())
            warnings.warn(
                f"{left_out.total()} of {left_out.total() + len(images)} files in {self.path} are left out, being no "
                f"pictures that can be read: {listed}",
                stacklevel=2,
            )
        return sorted(images)
