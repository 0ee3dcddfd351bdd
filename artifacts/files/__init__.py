"""The files of a bundle: its manifest, JSON read strictly into records, opened and verified, written and changed."""
