"""Training a DiT/SiT from a folder of images, on one CPU or many GPUs."""
