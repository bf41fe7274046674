"""From files of instruction rows to token ids with a loss mask."""
