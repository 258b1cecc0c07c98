"""Methods that drop or merge tokens inside the network."""
