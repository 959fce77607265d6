"""A small Stable Diffusion 3 of emoji: its parts, its training and its folder. The program: `train_emoji_mmdit.py`."""
