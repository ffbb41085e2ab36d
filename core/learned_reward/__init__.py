"""Rewards that are learned from pairs of images and label maps, and what makes and uses such pairs."""
