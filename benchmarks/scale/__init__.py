"""How planning and committing grow with workers and chunks, and what storage and network allow past one machine."""
