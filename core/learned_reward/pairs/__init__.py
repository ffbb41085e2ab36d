"""Pairs of image and label map with the truth beside them: made, stored, split by subject, read."""
