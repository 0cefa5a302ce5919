"""The targets, one family a file."""
