"""Which samples had to be left out, and when are they too many to go on?

Wherever one is found, in an index, by a worker or in a stream, it is counted here by its name.
"""

from collections.abc import Iterable, Mapping

from diffusion.data.listing import some


class BrokenSamples:
    """The names of samples that cannot be used, with the reasons; more than `limit` (None: any number) are fatal."""

    def __init__(self, limit: int | None = None) -> None:
        if limit is not None and limit < 0:
            raise ValueError(f"data.max_broken is {limit}; give the number of samples that may be left out, 0 or more")
        self.limit = limit
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def note(self, found: Iterable[tuple[str, str]] | Mapping[str, str]) -> list[str]:
        """Count these, and return "name (reason)" of those that are new. Raises ValueError beyond the limit."""
        pairs = found.items() if isinstance(found, Mapping) else found
        new = {name: reason for name, reason in pairs if name not in self.reasons}
        self.reasons |= new
        if self.limit is not None and len(self) > self.limit:
            raise ValueError(
                f"{len(self)} samples cannot be used, and data.max_broken={self.limit}: {some(self.told())}; mend "
                "them, leave their shards out, or raise data.max_broken to train without them"
            )
        return [f"{name} ({reason})" for name, reason in new.items()]

    def told(self) -> list[str]:
        """Return "name (reason)" of all."""
        return [f"{name} ({reason})" for name, reason in self.reasons.items()]
