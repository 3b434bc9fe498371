"""One paper, one file. Each registers its method on import; `studio.method.methods()` finds them."""
