"""Learning where an object is from labels that only tell whether it is there."""
