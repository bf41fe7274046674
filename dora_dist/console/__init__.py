"""Shared parts of all commands: errors and exit statuses, text, files, pictures."""
