"""Our passes, one a file; ``compiler/lowering/pipeline.py`` says in which order they run."""
