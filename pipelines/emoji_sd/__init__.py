"""Parts of `train_emoji_sd.py`: data, the training loop, VAE, denoiser, export, evaluation."""
