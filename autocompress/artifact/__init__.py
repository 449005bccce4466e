"""Files that ship: how a compressed model is written and read back."""
