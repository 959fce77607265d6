"""Timing, counting operations, and memory."""
