"""Finds the documents that a command names, and where the result of each belongs.

Both take time in proportion to the number of files: archives have hundreds of thousands of them.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from serving.ocr_client.file_names import name_key, safe_part, show_name

SUFFIXES = frozenset(
    (
        ".pdf",
        ".png",
        ".jpg",
        ".jpeg",
        ".webp",
        ".tif",
        ".tiff",
        ".gif",
        ".bmp",
        ".jp2",
        ".j2k",
        ".avif",
        ".heic",
        ".heif",
    )
)
"""Suffixes of files that are taken from folders. A file that is named is sent whatever its suffix."""
_MAX_PART_BYTES = 230
"""Longest part of a result's path; file systems allow 255 bytes, and suffixes come on top."""
_DIGEST_CHARS = 10
_HIDDEN, _BROKEN, _SPECIAL, _NO_SUFFIX = "hidden", "broken links", "neither file nor folder", "without a suffix"


class FileSelectionError(Exception):
    """Files that cannot be read; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Task:
    file: Path
    target: Path
    """The file that its result is written to."""
    key: str = ""
    """Identifies the file in the progress of a run: its absolute path, without symbolic links."""


@dataclass(slots=True)
class Found:
    """What the arguments of a command stand for."""

    files: dict[str, str] = field(default_factory=dict)
    """Files by their real paths, in order, each with its path as given."""
    unread: dict[str, str] = field(default_factory=dict)
    """Folders and files that cannot be read, with the reason. They count as failures."""
    left_out: Counter[str] = field(default_factory=Counter)
    """How many files were left out, by suffix or reason."""


def find_files(arguments: Sequence[str], out: Path) -> Found:
    """Expand arguments into files, without duplicates.

    Args:
        arguments: files, folders (searched recursively) and glob patterns.
        out: the folder for the results, which is not searched.

    Raises:
        FileSelectionError: a file does not exist, or a folder or pattern has no documents.
    """
    found = Found()
    results = os.path.realpath(out)
    for argument in arguments:
        num_before = len(found.files) + len(found.unread)
        if os.path.isdir(argument):
            _search(argument, results, found)
            if len(found.files) + len(found.unread) == num_before and not _is_known(argument, found):
                raise FileSelectionError(
                    f"{show_name(argument)}: no documents in this folder ({', '.join(sorted(SUFFIXES))})"
                )
        elif os.path.lexists(argument):
            _take_named(argument, found)
        else:
            matches = sorted(glob.glob(argument, recursive=True))
            found.unread |= _find_closed(argument)
            if not matches and len(found.unread) + len(found.files) == num_before:
                raise FileSelectionError(
                    f"{show_name(argument)}: no such file or folder, and no file matches it as a pattern"
                )
            for name in matches:
                if not os.path.isdir(name):
                    _take_named(name, found)
    return found


def _is_known(folder: str, found: Found) -> bool:
    """Whether files of the folder are there already, from another argument."""
    real = os.path.join(os.path.realpath(folder), "")
    return any(path.startswith(real) for path in found.files)


def _take_named(name: str, found: Found) -> None:
    """Take a file that was named, unless it is something that reading would wait for, such as a pipe."""
    try:
        if stat.S_ISREG(os.stat(name).st_mode):
            found.files.setdefault(os.path.realpath(name), name)
        else:
            found.unread[name] = "it is not a regular file"
    except OSError as error:
        found.unread[name] = _explain(error)


def _search(folder: str, results: str, found: Found) -> None:
    """Take the documents in a folder and its subfolders, in order; count what is left out."""
    waiting = [folder]
    while waiting:
        where = waiting.pop()
        real = os.path.realpath(where)
        if real == results:
            continue
        try:
            with os.scandir(where) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            found.unread[where] = _explain(error)
            continue
        folders: list[str] = []
        for entry in entries:
            try:
                kind = _judge(entry)
            except OSError as error:
                found.unread[entry.path] = _explain(error)
                continue
            if kind == "folder":
                folders.append(entry.path)
            elif kind == "document":
                path = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
                if not path.startswith(os.path.join(results, "")):
                    found.files.setdefault(path, entry.path)
            else:
                found.left_out[kind] += 1
        waiting.extend(reversed(folders))


def _judge(entry: os.DirEntry[str]) -> str:
    """`folder`, `document`, or why the entry is left out."""
    if entry.name.startswith("."):
        return _HIDDEN
    if entry.is_dir(follow_symlinks=False):
        return "folder"
    suffix = os.path.splitext(entry.name)[1].lower()
    if entry.is_file():
        return "document" if suffix in SUFFIXES else show_name(suffix) or _NO_SUFFIX
    if entry.is_symlink() and not os.path.exists(entry.path):
        return _BROKEN
    return "links to folders" if entry.is_dir() else _SPECIAL


def _explain(error: OSError) -> str:
    return error.strerror or "unreadable"


def _find_closed(pattern: str) -> dict[str, str]:
    """Folders on a pattern's way that cannot be listed; `glob` skips them silently."""
    folders = Path(pattern).parts[:-1]
    prefixes = (str(Path(*folders[:count])) for count in range(1, len(folders) + 1))
    reached = {name for prefix in prefixes for name in glob.glob(prefix, recursive=True)}
    closed = (path for path in sorted(reached) if os.path.isdir(path) and not os.access(path, os.R_OK | os.X_OK))
    return {path: os.strerror(errno.EACCES) for path in closed}


def plan_tasks(found: Found, out: Path, suffix: str, *, ignores_case: bool = False) -> list[Task]:
    """Name the results: `box1/a.pdf` becomes `OUT/box1/a.pdf.md`, whatever else is read.

    Args:
        found: the files.
        out: the folder for the results.
        suffix: of the results.
        ignores_case: whether the folder's file system takes names for equal that differ in case only.
    """
    folders: dict[str, Path] = {}
    tasks = []
    for real, given in found.files.items():
        folder, name = os.path.split(given)
        target = folders.get(folder)
        if target is None:
            target = folders[folder] = Path(out, *_place_folder(folder, ignores_case=ignores_case))
        part = _shorten(name, ignores_case=ignores_case)
        tasks.append(Task(Path(given), target / f"{part}{suffix}", name_key(real)))
    return tasks


def _place_folder(folder: str, *, ignores_case: bool) -> Iterator[str]:
    """The parts of a folder's path as given, below the folder for results."""
    normal = os.path.normpath(folder) if folder else ""
    if normal.split(os.sep, 1)[0] == os.pardir:
        normal = os.path.abspath(normal)
    for part in normal.split(os.sep):
        if part not in ("", os.curdir):
            yield _shorten(part, ignores_case=ignores_case)


def _shorten(part: str, *, ignores_case: bool) -> str:
    """A part of a path that every file system takes. Different parts stay different."""
    safe = safe_part(part)
    needs_digest = len(safe.encode()) > _MAX_PART_BYTES or (
        ignores_case and (safe != safe.lower() or not safe.isascii())
    )
    if not needs_digest:
        return safe
    digest = hashlib.sha256(os.fsencode(part)).hexdigest()[:_DIGEST_CHARS]
    kept = safe.encode()[: _MAX_PART_BYTES - _DIGEST_CHARS - 1].decode(errors="ignore")
    return f"{kept}-{digest}"


def ignores_case(folder: Path) -> bool:
    """Whether a folder's file system takes names for equal that differ in case only."""
    probe = folder / ".serving-ocr.Case"
    probe.touch()
    try:
        return (folder / ".serving-ocr.cASE").exists()
    finally:
        probe.unlink()
