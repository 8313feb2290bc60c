"""Runtime floor: the Ray actors that move shards, and the thin library inside the user's own."""
