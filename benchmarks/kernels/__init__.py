"""Each kernel of a compiled module against its floor or against torch, after it was compared with float64."""
