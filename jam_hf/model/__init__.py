"""The files that travel into a checkpoint: flat, importing transformers, torch, diffusers and each other only."""
