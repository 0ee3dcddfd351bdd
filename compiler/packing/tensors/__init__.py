"""The checkpoint's tensors, and how each weight of the bundle is made of them: named, checked, read row by row."""
