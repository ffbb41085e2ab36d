"""Networks of spars that tell whether a window holds the object."""
