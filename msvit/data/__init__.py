"""Pictures: built-in scenes, folders, label maps, and the loaders that yield them."""
