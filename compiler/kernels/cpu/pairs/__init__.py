"""Products of many tokens with weights of bfloat16: an instruction multiplies and adds adjacent columns in pairs."""
