"""Reports of runs as web pages: a single file that needs neither network nor server."""
