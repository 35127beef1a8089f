"""Data sets of edited traits, such as opinions that show a personality."""
