"""transformers' layers: one small file an architecture, imported where that architecture is loaded."""
