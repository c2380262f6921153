"""Physical removal: channels, heads and neurons, gone for real."""
