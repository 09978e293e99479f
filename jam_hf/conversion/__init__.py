"""Checkpoints of others in, what the fusion takes out: VQ models of public parents, metaseq's OPT and CM3leon."""
