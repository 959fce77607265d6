"""Scores of pictures: FID, KID, paired scores, and the networks whose features they use."""
