"""Pages in a browser: one file each, which needs neither network nor server."""
