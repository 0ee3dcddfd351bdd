"""moec: an ahead-of-time compiler for Mixture-of-Experts models and the runtime that executes what it emits."""

__version__ = "0.1.0"
