"""What a day with a GPU measures: attention alone, whole steps, thresholds and the middle step of landmarks."""
