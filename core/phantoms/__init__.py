"""Seeded synthetic data, written as real files."""
