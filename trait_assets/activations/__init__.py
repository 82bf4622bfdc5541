"""Stage 2: hidden states captured at every layer, split into train and held-out rows."""
