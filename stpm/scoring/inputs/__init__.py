"""From sources of images (folders, globs, archives, tables, lists) to the manifest of a run, and its blocks."""
