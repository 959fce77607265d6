"""The web page and the jobs behind it."""
