"""Machine code of a bundle on a GPU: which of it suits the GPU, and the library whose functions launch it."""
