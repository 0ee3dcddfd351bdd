"""Everything between two products of a segment as one kernel a row: stages read off TVM's loops, grouped, emitted."""
