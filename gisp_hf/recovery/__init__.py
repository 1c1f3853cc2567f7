"""A level made better without changing its structures."""
