"""Dense segments and hand-written kernels to one module a target: see ``lower.py`` for the stage itself."""
