"""A method without arithmetic, for tests of the command line."""
