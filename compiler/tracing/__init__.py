"""Parts of ``compiler.trace``: marker ops, transformers' interfaces, the patch table, expert bodies."""
