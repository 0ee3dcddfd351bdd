"""The processors that a program can run on; what each must do is in ``protocol.py``."""
