"""Parts of `train_classifiers.py`: data, augmentation, the training loop, measuring, export."""
