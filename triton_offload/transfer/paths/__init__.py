"""How a segment crosses, by each path: a file for each."""
