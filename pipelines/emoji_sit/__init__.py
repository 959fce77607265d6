"""Parts of `pipelines/train_emoji_sit.py`."""
