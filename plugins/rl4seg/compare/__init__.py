"""The method beside everything it must beat, on the same data, with the same seeds and steps."""
