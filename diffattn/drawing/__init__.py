"""Loads pipelines by name and draws the pictures of a request."""
