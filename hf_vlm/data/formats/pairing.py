"""Which files the names in annotations mean, on whatever machine and system they were written."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from hf_vlm.data.io.files import can_list, exists
from hf_vlm.data.io.messages import summarise
from hf_vlm.data.io.trust import check_inside, is_inside, outside_is_allowed

__all__ = ["find_files", "locate_names", "path_parts", "plain_name"]

NUM_TRIED = 200  # names by which the folder is chosen
NUM_ASKED = 3  # of these, for which a web server is asked


def find_files(paths: Iterable[Path]) -> dict[Path, Path]:
    """The file that each path means: itself, or the only one in its folder whose name differs in the case of its
    letters or in Unicode's normal form alone, as systems write it.

    Each folder is listed once; on web servers, which cannot list, every path is taken to be there.
    """
    wanted = defaultdict(list)
    for path in dict.fromkeys(paths):
        wanted[path.parent].append(path)
    found: dict[Path, Path] = {}
    for folder, members in wanted.items():
        if not can_list(folder):
            found.update(zip(members, members))
        elif folder.is_dir():
            there = {path.name: path for path in folder.iterdir()}
            found.update({path: path for path in members if path.name in there})
            missing = [path for path in members if path.name not in there]
            alike = defaultdict(list)
            for name in there if missing else ():
                alike[plain_name(name)].append(there[name])
            found.update(
                {path: alike[plain_name(path.name)][0] for path in missing if len(alike[plain_name(path.name)]) == 1}
            )
    return found


def plain_name(name: str) -> str:
    """A name in small letters and one normal form of Unicode, for comparing."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def locate_names(
    names: Sequence[str], folders: Sequence[Path], root: Path, source: object
) -> tuple[list[Path], list[int]] | None:
    """Paths of the files that an annotation names, in the folder that has most of them, and the missing names.

    Names may be paths of another machine, also of Windows: then leading folders are left out, of all names equally
    many and no more than necessary.

    Args:
        names: File names or paths as an annotation has them.
        folders: Where the files may be, the likeliest first.
        root: Folder of the source, out of which names are followed only where that is allowed.
        source: Name of the source, for messages.

    Returns:
        The paths, and the indices of those that are missing there; None where no name is found at all.

    Raises:
        OutsideError: Names are of files outside of the source, and of none in it.
        ValueError: Two names mean one file.
    """
    tried = names[:: -(-len(names) // NUM_TRIED)]
    most, best = 0, None
    for num_left_out in (None, *range(max(len(path_parts(name)) for name in tried))):
        for folder in folders:
            count = _count([_join(folder, name, num_left_out) for name in tried], root)
            if count > most:
                most, best = count, (folder, num_left_out)
        if most:  # to leave out more could only find other files of the same name
            break
    if best is None:
        check_inside(find_files(_join(folder, name, None) for folder in folders for name in tried), root, source)
        return None
    folder, num_left_out = best
    paths = [_join(folder, name, num_left_out) for name in names]
    check_inside(paths, root, source)
    if num_left_out is not None:
        meanings: dict[Path, set[str]] = defaultdict(set)
        for path, name in zip(paths, names):
            meanings[path].add(name)
        ambiguous = [" and ".join(sorted(found)) for found in meanings.values() if len(found) > 1]
        if ambiguous:
            raise ValueError(
                f"{source}: without folders of another machine, {len(ambiguous)} names mean several images of "
                f"{folder}: {summarise(ambiguous)}; give paths relative to it"
            )
    found_paths = find_files(paths)
    missing = [index for index, path in enumerate(paths) if path not in found_paths]
    return [found_paths.get(path, path) for path in paths], missing


def _count(paths: Sequence[Path], root: Path) -> int:
    """How many of some files are there; all where folders cannot be listed and one of the first files is."""
    if not outside_is_allowed():
        paths = [path for path in paths if is_inside(str(path), str(root))]
    if not paths:
        return 0
    if can_list(paths[0]):
        return len(find_files(paths))
    same_server = not outside_is_allowed()
    return len(paths) if any(exists(path, same_server=same_server) for path in paths[:NUM_ASKED]) else 0


def path_parts(name: str) -> list[str]:
    """Folders and file name of a path of any system, without its drive and steps upwards."""
    return [
        part for part in re.split(r"[\\/]+", re.sub(r"^[A-Za-z]:(?=[\\/])", "", name)) if part not in ("", ".", "..")
    ]


def _join(folder: Path, name: str, num_left_out: int | None) -> Path:
    """A name in a folder, as it is or without its first folders."""
    if num_left_out is None:
        return folder / name
    parts = path_parts(name)
    return folder.joinpath(*parts[min(num_left_out, len(parts) - 1) :]) if parts else folder / name
