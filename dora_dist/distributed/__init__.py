"""The processes of a run: how they meet, agree, notice each other's end, and share an engine."""
