"""Text files that list images: UniMatch's split folders, other lists, and checks that the listed files exist."""

import difflib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePath

from cmim.errors import UserError


def read_lines(path: Path, key: str, content: str) -> list[str]:
    """The lines of a text file that are not blank; `key` is the setting that gives its path, `content` what it should
    hold."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")  # file names need not be UTF-8
        if "\0" in text:
            raise ValueError("a zero byte")
        lines = [line.strip() for line in text.splitlines()]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"{key}: cannot read {path} ({reason}); it lists {content}") from None
    return [line for line in lines if line]


def read_pairs(
    path: Path, key: str, root: Path, known: Callable[[], list[tuple[Path, Path]]] | None = None
) -> list[tuple[Path, Path | None]]:
    """The lines `IMAGE MASK` of a split file as pairs of paths below `root`; the mask is None if the line has no second
    word, or the word None.

    Args:
        known: function that returns the pairs that a line with a single word, an id, may refer to.
    """
    pairs, index = [], None
    for words in _read_words(path, key):
        if len(words) == 1 and known is not None:
            if index is None:
                candidates = known()
                index = index_names([image for image, _ in candidates])
            pairs.append(candidates[find_name(words[0], index, path)])
        else:
            mask = None if words[1:] in ([], ["None"]) else root / words[1]
            pairs.append((root / words[0], mask))
    return pairs


def read_images(path: Path, key: str, root: Path) -> list[Path]:
    """The images of the lines `IMAGE MASK` of a split file, without their masks."""
    return [root / words[0] for words in _read_words(path, key)]


def _read_words(path, key):
    for line in read_lines(path, key, "lines `IMAGE MASK`"):
        words = line.split()
        if len(words) > 2:
            raise UserError(f"{path}: expected `IMAGE MASK`, two paths without spaces, got {line[:80]!r}")
        yield words


def with_masks(pairs: list[tuple[Path, Path | None]], path: Path) -> list[tuple[Path, Path]]:
    """The pairs in the file `path`; a UserError if there are none or a mask is missing."""
    if not pairs:
        raise UserError(f"{path} names no image: write lines `IMAGE MASK`")
    seen = set()
    for image, mask in pairs:
        if image in seen:
            raise UserError(f"{path} names {image.name} twice: it would count twice; take one of the lines away")
        seen.add(image)
        if mask is None:
            raise UserError(f"{path} names {image.name} without a mask: write `IMAGE MASK`, or take the line away")
    return pairs


def index_names(images: Iterable[Path]) -> dict[str, list[tuple[int, Path]]]:
    """A map from file names, with and without suffix, to the numbers and paths of the images that they may refer to."""
    index = {}
    for i, image in enumerate(images):
        for key in {image.name, image.stem}:
            index.setdefault(key, []).append((i, image))
    return index


def find_name(line: str, index: dict[str, list[tuple[int, Path]]], source: str | Path) -> int:
    """The image of an `index_names` that a line refers to; its folders matter only if several images have the same name."""
    name = PurePath(line).name
    if name not in index:
        nearest = difflib.get_close_matches(name, index, 1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UserError(f"{source} names {line[:80]}, which is no image of this data set{hint}")
    found = index[name]
    if len(found) > 1:
        ends = [(i, image) for i, image in found if line in (_end(image, line), _end(image.with_suffix(""), line))]
        if len(ends) != 1:
            raise UserError(
                f"{source} names {line[:80]}, which {len(found)} images are called, such as {found[0][1]} and "
                f"{found[1][1]}: write it with its folder"
            )
        found = ends
    return found[0][0]


def _end(path, line):
    """The last parts of a path, as many as `line` has."""
    return "/".join(path.parts[-len(PurePath(line).parts) :])


def short_names(images: Sequence[Path]) -> list[str]:
    """A unique name for each image, which `find_name` finds: without folder and suffix if that is unique, else with as many
    folders as necessary."""
    names = [image.stem for image in images]
    for depth in range(2, max((len(image.parts) for image in images), default=0) + 1):
        uses = Counter(names)
        if len(uses) == len(names):
            break
        names = [
            "/".join(image.with_suffix("").parts[-depth:]) if uses[name] > 1 else name
            for image, name in zip(images, names, strict=True)
        ]
    return names


class Listing:
    """`path in listing` says whether a file exists. Each folder is listed only once, for any number of its files."""

    def __init__(self):
        self._names = {}

    def __contains__(self, path: str | Path) -> bool:
        folder, name = os.path.split(path)
        if folder not in self._names:
            try:
                self._names[folder] = set(os.listdir(folder))
            except OSError:
                self._names[folder] = set()
        return name in self._names[folder]


def require(files: Sequence[Path], listing: Listing, what: str, remedy: str) -> None:
    """Raise a UserError if any of `files` is missing; it names the first missing file and gives their number."""
    missing = [path for path in files if path not in listing]
    if missing:
        more = f", and {len(missing) - 1} more of {len(files)} {what}s" if len(missing) > 1 else ""
        raise UserError(f"the {what} {missing[0]} is missing{more}: {remedy}")
