"""spars: find lesions from image-level labels by scores of windows, scans and self-play."""
