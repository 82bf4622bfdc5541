"""Stage 3: trait vectors fitted from activations, one direction per layer and method."""
