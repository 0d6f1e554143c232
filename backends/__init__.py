"""The built-in backends, found through the entry-point group ``windlass.backends`` like everybody else's."""
