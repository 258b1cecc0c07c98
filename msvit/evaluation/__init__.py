"""What a model does on a data set."""
