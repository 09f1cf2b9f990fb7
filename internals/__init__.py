"""What keeps commands safe, resumable and fast. Nobody needs it to follow the science."""
