"""A job on two nodes that a network joins."""
