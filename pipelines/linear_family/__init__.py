"""The parts of `compare_linear.py`."""
