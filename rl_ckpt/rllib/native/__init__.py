"""Native RLlib checkpoints: reading, importing and exporting them."""
