"""Volumes of spars: reading, labels of images, masks for evaluation, and the way back to the file's grid."""
