"""The cache of experts that the GPU keeps by itself: who is read from where, who leaves for whom, and the copies."""
