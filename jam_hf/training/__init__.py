"""Training: the CM3 objective, data, recipes, and the image tokenizer. Knows models only by their interface."""
