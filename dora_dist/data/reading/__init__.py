"""From files to checked samples."""
