"""Plan floor: who writes what, who reads which bytes, what to keep. Pure: no files, no network, no Ray, no threads."""
