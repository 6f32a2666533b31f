"""Finding where weights are used: in a trace (`fx`), in the tree of modules (`modules`), or by their keys (`keys`)."""
