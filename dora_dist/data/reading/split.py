"""Which rows of a source are held out, where ``data.eval`` is a share: a function of what each row says, and of nothing
else, so that a row stays where it is when others come, go or move."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b, sha256
from typing import Any

from dora_dist.data.reading.files import Location, RawRow
from dora_dist.data.reading.row_json import parse_json
from dora_dist.data.reading.samples import RowFlaw

DIGEST_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class SplitLocation(Location):
    """One side of a source: the rows that are held out, or those that are trained on.

    A larger share holds out all that a smaller one does. Rows that cannot be read are on the side that is trained on.

    Attributes:
        share: share of the rows that is held out, between 0 and 1.
        held_out: whether this is the side of the rows that are held out.
        said: makes of a row and :attr:`RawRow.filled` what the row says, as JSON has it: rows that say the same are on
            one side. It raises :class:`RowFlaw` for a row that cannot be read.
    """

    share: float
    held_out: bool
    said: Callable[[dict[str, Any], bool], Any]

    def rows(self) -> Iterator[RawRow]:
        """The rows of this side in order, of those that :attr:`limit` allows to read."""
        return (row for row in self.rows_of_all_sides() if self._holds_out(row) == self.held_out)

    def digest(self) -> str:
        """SHA-256 of the content of both sides, and of which one this is. What a row says follows from the rules, which
        the folder of prepared data is named after too."""
        side = repr((super().digest(), self.share, self.held_out))
        return sha256(side.encode()).hexdigest()

    def _holds_out(self, raw: RawRow) -> bool:
        try:
            row = None if raw.flaw else parse_json(raw.json)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            return False
        try:
            said = self.said(row, raw.filled)
        except RowFlaw:
            return False
        content = json.dumps(said, sort_keys=True).encode()
        number = int.from_bytes(blake2b(content, digest_size=DIGEST_BYTES).digest(), "little")
        return number < self.share * float(1 << 8 * DIGEST_BYTES)
