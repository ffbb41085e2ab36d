"""kspace: choose which lines of k-space to acquire so that a segmentation network sees what it needs."""
