"""What every command needs: errors and exit statuses, text, files, pictures."""
