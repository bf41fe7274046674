"""Which rows of a source are held out, where ``data.eval`` is a share: a function of what each row says, and of nothing
else, so that a row stays where it is when others come, go or move."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b, sha256

from dora_dist.data.reading.files import Location, RawRow
from dora_dist.data.reading.samples import value_at

DIGEST_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class SplitLocation(Location):
    """One side of a source: the rows that are held out, or those that are trained on.

    A larger share holds out all that a smaller one does. Rows that cannot be read are on the side that is trained on.

    Attributes:
        share: of the rows that are held out, between 0 and 1.
        held_out: whether this is their side.
        fields: names or paths of what is read of a row: rows that are alike in these are on one side.
    """

    share: float
    held_out: bool
    fields: tuple[str, ...]

    def rows(self) -> Iterator[RawRow]:
        """The rows of this side in order, of those that :attr:`limit` allows to read."""
        return (row for row in super().rows() if self._holds_out(row) == self.held_out)

    def digest(self) -> str:
        """SHA-256 of the content of both sides, and of which one this is."""
        side = repr((super().digest(), self.share, self.held_out, self.fields))
        return sha256(side.encode()).hexdigest()

    def _holds_out(self, raw: RawRow) -> bool:
        try:
            row = None if raw.flaw else json.loads(raw.json)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            return False
        said = []
        for name in self.fields:
            try:
                value = value_at(row, name)
            except KeyError:
                value = None
            said.append(None if value == "" else value)
        content = json.dumps(said, sort_keys=True).encode()
        number = int.from_bytes(blake2b(content, digest_size=DIGEST_BYTES).digest(), "little")
        return number < self.share * float(1 << 8 * DIGEST_BYTES)
