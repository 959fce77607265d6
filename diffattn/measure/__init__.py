"""How things are timed and counted."""
