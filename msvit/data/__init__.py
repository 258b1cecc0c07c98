"""Pictures: built-in scenes, folders, label maps, and the loaders that yield them."""

IGNORE = 255  # label of pixels that no loss and no metric counts
