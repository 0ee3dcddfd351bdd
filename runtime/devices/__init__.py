"""The processors that a program can run on, and how fast they are; what each must do is in ``runtime/device.py``."""
