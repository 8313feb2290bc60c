"""Format floor: what bytes on storage mean (docs/format.md). Pure: no files, no network, no Ray, no threads."""
