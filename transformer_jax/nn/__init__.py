"""The pieces every model is made of: layers, positions, attention, blocks."""
