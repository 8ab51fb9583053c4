"""Which class number does the label of a sample in a shard mean?"""

from collections.abc import Iterable, Sequence

from diffusion.data.listing import in_order


def numbered_classes(labels: Iterable[str | None], num_classes: int) -> tuple[str, ...]:
    """Name the classes by the labels that occur, in their order; numbers below `num_classes` name themselves.

    Numbers are taken to be class numbers, of which some may be missing here or be wrong; names are all that there are.
    """
    names = in_order({label for label in labels if label is not None})
    if names and all(name.isdecimal() for name in names):
        return tuple(map(str, range(num_classes)))
    return names


def number_of(label: str | None, class_names: Sequence[str]) -> int:
    """Return the number of a label, which may be that number or a class's name. Raises ValueError for any other."""
    if label is None:
        raise ValueError("it has no label")
    if label.isdecimal() and int(label) < len(class_names):
        return int(label)
    if label in class_names:
        return class_names.index(label)
    last = len(class_names) - 1
    what = f"outside of 0 to {last}" if label.lstrip("-").isdecimal() else "the name of no class"
    raise ValueError(f"its label {label!r} is {what}")
