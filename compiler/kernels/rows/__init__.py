"""Everything between two products of a segment as one kernel a row: what the kernel is asked to compute."""
