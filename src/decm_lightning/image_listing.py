"""Find the image files in a folder and count its other files."""

import os
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath

NAMED = 3
"""The number of broken images that an error names; the rest are only counted."""

HIDDEN = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "lost+found", "$recycle.bin", "system volume information"}
"""Files and folders that operating systems create under names without a leading dot, in lower case."""
Parts = tuple[str, ...]


@dataclass
class Listing:
    """The files in a folder and its subfolders that have one of the suffixes, and the number of the others by kind.

    Files are the parts of their paths relative to the folder; folders are the names of the first-level subfolders. Both
    are sorted.
    """

    files: list[Parts] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def list_files(folder: str | Path, suffixes: Collection[str]) -> Listing:
    """List the files in a folder and its subfolders that have one of the suffixes, ignoring case.

    Links are followed, except links to a folder that contains them. Hidden files and folders are left out.

    Raises:
        OSError: if a folder cannot be read.
    """
    listing = Listing()
    _walk(os.fspath(folder), (), (_identity(os.fspath(folder)),), suffixes, listing)
    listing.files.sort()
    listing.folders.sort()
    return listing


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden: its name starts with a dot or is in HIDDEN."""
    return name.startswith(".") or name.lower() in HIDDEN


def kind(name: str) -> str:
    """Return the kind of a file that is left out, which is its suffix in lower case.

    Example:
        >>> kind("photos.tar.GZ"), kind("README")
        ('.tar.gz', 'no suffix')
    """
    ends = PurePath(name).suffixes[-2:]
    ends = ends if ends[:1] == [".tar"] else ends[-1:]
    return "".join(ends).lower() or "no suffix"


def counted(left_out: Counter[str]) -> str:
    """Return the counts in one line, the largest first.

    Example:
        >>> counted(Counter({"hidden": 1, ".txt": 3}))
        '.txt (3), hidden (1)'
    """
    return ", ".join(f"{kind} ({count})" for kind, count in left_out.most_common())


def _walk(
    folder: str, parts: Parts, above: tuple[tuple[int, int], ...], suffixes: Collection[str], listing: Listing
) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            name, is_link = entry.name, entry.is_symlink()
            # The methods of an entry need no disk access, but raise OSError for a link that points to itself.
            if is_hidden(name):
                listing.left_out["hidden"] += 1
            elif os.path.isdir(entry.path) if is_link else entry.is_dir():
                if (identity := _identity(entry.path)) in above:
                    listing.left_out["links to a folder above"] += 1
                    continue
                if not parts:
                    listing.folders.append(name)
                _walk(entry.path, (*parts, name), (*above, identity), suffixes, listing)
            elif not (os.path.isfile(entry.path) if is_link else entry.is_file()):
                listing.left_out["broken links" if is_link else "special files"] += 1
            elif os.path.splitext(name)[1].lower() in suffixes:
                listing.files.append((*parts, name))
            else:
                listing.left_out[kind(name)] += 1


def _identity(folder: str) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def broken(errors: Mapping[str, str]) -> str:
    """Return one line with the number of broken images, and the names and errors of the first three."""
    named = "; ".join(f"{name} {error}" for name, error in list(errors.items())[:NAMED])
    more = f"; and {len(errors) - NAMED} more" if len(errors) > NAMED else ""
    return f"{len(errors)} broken image{'s' if len(errors) > 1 else ''}: {named}{more}"


def printable(name: str | Path) -> str:
    r"""Return a file name with escapes such as \xef for control characters and bytes that are not UTF-8."""
    text = os.fspath(name)
    # There may be a million names, and almost all are printable.
    if text.isprintable():
        return text
    escaped = os.fsencode(text).decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in escaped)
