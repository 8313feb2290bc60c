"""State floor: trees, leaves, boxes and array adapters. Pure: no files, no network, no Ray, no threads."""
